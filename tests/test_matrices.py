import dataclasses
import statistics

import pytest
from toy_rows import toy_row

from harness.report import build_matrices, rows_frame


def matrix_of(rows, metric="image_auroc", **options):
    (matrix,) = build_matrices(rows_frame(rows), [metric], **options)
    return matrix


def only_cell(rows, metric="image_auroc"):
    (row,) = matrix_of(rows, metric).rows
    (cell,) = row.cells
    return cell


def test_a_number_is_the_mean_over_categories():
    cell = only_cell([toy_row(0.8, category="bolt"), toy_row(0.9, category="nut"), toy_row(1.0, category="pin")])
    assert cell.value == pytest.approx(0.9, abs=1e-12)
    assert cell.std is None


def test_seeds_are_averaged_after_categories_and_give_a_sample_deviation():
    values = {(0, "bolt"): 0.8, (0, "nut"): 0.9, (1, "bolt"): 0.7, (1, "nut"): 0.7, (2, "bolt"): 1.0, (2, "nut"): 0.8}
    cell = only_cell([toy_row(value, category=name, seed=seed) for (seed, name), value in values.items()])
    assert cell.value == pytest.approx((0.85 + 0.7 + 0.9) / 3, abs=1e-12)
    assert cell.std == pytest.approx(statistics.stdev([0.85, 0.7, 0.9]), abs=1e-12)


def test_one_failed_category_makes_a_hole_and_no_mean_over_the_rest():
    cell = only_cell([toy_row(0.8), toy_row(None, category="nut")])
    assert (cell.state, cell.value, cell.note) == ("hole", None, "1 of 2 failed")
    assert cell.reason == "nut, seed 0: ValueError: all features are NaN"


def test_a_category_that_another_method_has_is_missed():
    matrix = matrix_of(
        [toy_row(0.8), toy_row(0.9, method="patchcore"), toy_row(0.7, method="patchcore", category="nut")]
    )
    padim, patchcore = (row.cells[0] for row in matrix.rows)
    assert (padim.state, padim.note) == ("hole", "1 of 2 missing")
    assert patchcore.value == pytest.approx(0.8)
    assert (matrix.cells_done, matrix.cells_expected) == (3, 4)


def test_a_seed_without_one_category_is_a_hole():
    rows = [toy_row(0.8, category=name, seed=seed) for seed in (0, 1) for name in ("bolt", "nut")]
    assert only_cell(rows[:3]).note == "1 of 4 missing"


def test_different_ends_are_counted_apart():
    rows = [
        toy_row(0.8),
        toy_row(None, category="nut"),
        toy_row(None, category="pin", status="skipped", reason="projector failed"),
        toy_row(None, category="rod", status="stopped", reason=""),
    ]
    assert only_cell(rows).note == "1 failed, 1 skipped, 1 stopped of 4"


def test_a_dataset_that_a_method_did_not_run_on_is_said_to_be_not_run():
    rows = [toy_row(0.8), toy_row(0.7, dataset="cells"), toy_row(0.9, method="draem", backbone=None)]
    matrix = matrix_of(rows)
    assert matrix.columns == ("parts", "cells")
    assert matrix.rows[1].labels == ("draem", "–")
    assert matrix.rows[1].cells[1].note == "not run"
    assert matrix.cells_expected == 3


def test_a_dataset_without_masks_has_no_pixel_metric_even_where_rows_failed_or_are_not_there():
    rows = [
        toy_row(0.9, dataset="cells", category="mono"),
        toy_row(None, dataset="cells", category="mono", method="patchcore"),
        toy_row(0.9, pixel=0.8),
        toy_row(0.9, pixel=0.7, method="patchcore"),
        toy_row(0.9, pixel=0.6, method="draem", backbone=None),
    ]
    matrix = matrix_of(rows, "pixel_auroc")
    cells = [row.cells[matrix.columns.index("cells")] for row in matrix.rows]
    assert [cell.state for cell in cells] == ["unavailable"] * 3
    assert [cell.value for cell in cells] == [None] * 3


def test_a_metric_that_one_category_lacks_is_not_averaged_over_the_others():
    cell = only_cell([toy_row(0.9, pixel=0.8), toy_row(0.9, category="nut")], "pixel_auroc")
    assert (cell.state, cell.note) == ("unavailable", "not available for nut")


def test_protocols_are_never_mixed():
    rows = [toy_row(0.8), toy_row(0.6, protocol={"aupro_limit": 0.05})]
    first, second = build_matrices(rows_frame(rows), ["image_auroc"])
    assert first.protocol_id != second.protocol_id
    assert [matrix.rows[0].cells[0].value for matrix in (first, second)] == [0.8, 0.6]
    assert "FPR 0.3" in first.protocol
    assert "FPR 0.05" in second.protocol


def test_a_state_picked_on_test_data_is_shouted():
    assert "STATE PICKED ON TEST DATA" in matrix_of([toy_row(protocol={"selection": "test_best"})]).protocol


def test_an_unknown_protocol_field_is_told_by_name():
    assert "border 8" in matrix_of([toy_row(protocol={"border": 8})]).protocol


def test_a_finished_row_counts_before_a_failed_one_in_any_order():
    rows = [toy_row(None), toy_row(0.8)]
    assert only_cell(rows).value == only_cell(rows[::-1]).value == 0.8


def test_the_later_of_two_scores_of_one_prediction_counts():
    assert only_cell([toy_row(0.8), toy_row(0.7, cell_id="rescored")]).value == 0.7


def test_two_predictions_for_one_cell_are_a_hole_not_a_choice():
    cell = only_cell([toy_row(0.8), toy_row(0.7, prediction_id="other weights")])
    assert (cell.state, cell.note) == ("hole", "1 of 1 ambiguous")
    assert "different predictions" in cell.reason


def test_only_what_varies_within_a_method_is_shown():
    rows = [toy_row(0.8, method="patchcore", params={"ratio": ratio, "k": 9}) for ratio in (0.25, 0.01, 0.1)]
    rows.append(toy_row(0.7, params={"width": 100}))
    matrix = matrix_of(rows)
    assert matrix.header == ("method", "backbone", "settings")
    assert [row.labels[2] for row in matrix.rows] == ["ratio=0.01", "ratio=0.1", "ratio=0.25", ""]


def test_layers_shots_and_representation_are_shown_when_they_vary():
    rows = [
        toy_row(0.8, shots=4),
        toy_row(0.8, shots=None),
        toy_row(0.8, shots=4, layers=("layer1",)),
        toy_row(0.8, shots=4, representation="adpretrain"),
    ]
    matrix = matrix_of(rows)
    assert matrix.header == ("method", "backbone", "representation", "shots", "settings")
    assert [row.labels[2:] for row in matrix.rows] == [
        ("plain", "4", "layers=layer1"),
        ("plain", "4", "layers=layer2+layer3"),
        ("plain", "all", "layers=layer2+layer3"),
        ("adpretrain", "4", "layers=layer2+layer3"),
    ]


def test_a_representation_that_all_share_is_said_once():
    assert matrix_of([toy_row(representation="adpretrain")]).common == ("representation adpretrain",)


def test_shots_that_belong_to_a_dataset_split_no_line_and_get_a_footnote():
    matrix = matrix_of([toy_row(0.8, shots=100, dataset="cells"), toy_row(0.9)])
    (row,) = matrix.rows
    assert [cell.value for cell in row.cells] == [0.8, 0.9]
    assert matrix.marks == {"100 shots": "†"}
    assert row.cells[0].stamps == ("100 shots",)


def test_stamps_of_all_numbers_are_shared_and_those_of_some_are_marked():
    rows = [
        toy_row(0.8, stamps=("random weights",)),
        toy_row(0.9, dataset="cells", stamps=("random weights", "rescored")),
    ]
    matrix = matrix_of(rows)
    assert matrix.stamps == ("random weights", "rescored")
    assert matrix.shared_stamps == ("random weights",)
    assert matrix.marks == {"rescored": "†"}


def test_lines_keep_the_order_of_methods_and_backbones():
    rows = [toy_row(0.5, method=m, backbone=b) for b in ("vit", "resnet18") for m in ("patchcore", "padim")]
    assert [row.labels for row in matrix_of(rows).rows] == [
        ("patchcore", "vit"),
        ("patchcore", "resnet18"),
        ("padim", "vit"),
        ("padim", "resnet18"),
    ]


def test_ranks_follow_what_is_printed_so_ties_share_them():
    rows = [toy_row(value, method=name) for name, value in (("a", 0.91234), ("b", 0.91199), ("c", 0.8), ("d", 0.7))]
    assert [line[0] for line in matrix_of(rows).ranks()] == ["best", "best", "second", ""]


def test_a_lone_number_is_not_called_the_best():
    assert matrix_of([toy_row(0.9), toy_row(None, method="b")]).ranks() == [[""], [""]]


def test_categories_of_a_dataset_with_their_mean_last():
    rows = [toy_row(0.8), toy_row(0.9, category="nut"), toy_row(0.1, dataset="cells", category="mono")]
    matrix = matrix_of(rows, dataset="parts")
    assert matrix.columns == ("bolt", "nut", "mean")
    assert [cell.value for cell in matrix.rows[0].cells] == pytest.approx([0.8, 0.9, 0.85])
    assert matrix.subject == "parts"


def test_a_failed_category_leaves_its_column_and_the_mean_empty():
    matrix = matrix_of([toy_row(0.8), toy_row(None, category="nut")], dataset="parts")
    assert [cell.state for cell in matrix.rows[0].cells] == ["value", "hole", "hole"]


def test_the_colour_range_is_rounded_to_five_percent():
    rows = [toy_row(0.812), toy_row(0.95, method="b"), toy_row(0.9, method="c")]
    assert matrix_of(rows).colour_range() == pytest.approx((0.8, 0.95))
    assert matrix_of([toy_row(1.0)]).colour_range() == pytest.approx((0.95, 1.0))
    low, high = matrix_of([toy_row(0.0)]).colour_range()
    assert (low, high) == pytest.approx((0.0, 0.05))


def test_the_mean_does_not_depend_on_the_order_of_rows():
    rows = [toy_row(value, category=str(number)) for number, value in enumerate((0.1, 0.7, 0.3, 0.9999, 1 / 3))]
    assert only_cell(rows).value == only_cell(rows[::-1]).value


def test_a_matrix_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        matrix_of([toy_row()]).metric = "other"
