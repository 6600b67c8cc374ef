import dataclasses
import json

import pytest
from toy_rows import toy_row

from harness.matching import match_rows


def match(first, second, **options):
    """Two runs of rows; ids of the second differ, as those of another code version would."""
    others = [
        dataclasses.replace(row, cell_id=f"b{row.cell_id}", prediction_id=f"b{row.prediction_id}") for row in second
    ]
    return match_rows({"a": first, "b": others}, options.pop("axis", "run"), **options)


def reasons(matches):
    return [item.reason for item in matches.unmatched]


def resolved(row, **fields):
    return dataclasses.replace(row, resolved_protocol={**row.protocol, **fields})


def test_rows_are_paired_where_all_but_the_axis_is_equal():
    first = [toy_row(category=name) for name in ("bolt", "nut")]
    found = match(first, first)
    assert [(pair.place.category, pair.candidate, pair.baseline) for pair in found.pairs] == [
        ("bolt", "b", "a"),
        ("nut", "b", "a"),
    ]
    assert (found.unmatched, found.notes) == ((), ())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"protocol": {"aupro_limit": 0.05}}, "protocol.aupro_limit: 0.3 against 0.05"),
        (
            {"protocol": {"resize": 256, "selection": "test_best"}},
            "protocol.resize: null against 256; protocol.selection: last against test_best",
        ),
        ({"params": {"ratio": 0.01}}, "params.ratio: 0.1 against 0.01"),
        ({"layers": ("layer1",)}, "layers: layer2+layer3 against layer1"),
        ({"shots": 8}, "shots: all against 8"),
    ],
)
def test_a_difference_is_named_field_by_field(change, expected):
    found = match([toy_row(), toy_row(category="nut")], [toy_row(**change), toy_row(category="nut")])
    assert [pair.place.category for pair in found.pairs] == ["nut"]
    assert reasons(found) == [expected]


def test_what_stands_on_one_side_alone_is_told():
    found = match([toy_row(), toy_row(method="old")], [toy_row(), toy_row(method="new")])
    assert reasons(found) == ["only in a", "only in b"]
    assert [item.has_baseline for item in found.unmatched] == [True, False]


def test_an_extra_setting_is_not_held_against_a_matched_one():
    found = match([toy_row()], [toy_row(), toy_row(params={"ratio": 0.01})])
    assert len(found.pairs) == 1
    assert reasons(found) == ["only in b"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"provenance": {"truth_fingerprint": "y", "metric_version": "1"}},
            "ground truth of the test images: not the same",
        ),
        ({"provenance": {"truth_fingerprint": "x", "metric_version": "2"}}, "version of the metrics: not the same"),
        ({"stamps": ("random weights",)}, "weights: trained against random"),
    ],
)
def test_other_ground_truth_metrics_or_random_weights_are_not_compared(change, expected):
    plain = dataclasses.replace(toy_row(), provenance={"truth_fingerprint": "x", "metric_version": "1"})
    found = match([plain], [dataclasses.replace(plain, **change)])
    assert (found.pairs, reasons(found)) == ((), [expected])


def test_what_a_protocol_leaves_to_the_method_may_differ_between_methods_alone():
    first, second = resolved(toy_row(), smoothing=4.0), resolved(toy_row(), smoothing=0.0)
    assert reasons(match([first], [second])) == ["protocol.smoothing: 4 against 0"]
    others = dataclasses.replace(second, method="patchcore")
    assert len(match([first], [others], axis="method").pairs) == 1
    told = resolved(toy_row(protocol={"smoothing": 2.0}), smoothing=2.0)
    assert reasons(match([told], [dataclasses.replace(told, method="patchcore", resolved_protocol={"smoothing": 1.0})],
                         axis="method"))[0].startswith("protocol.")  # fmt: skip


def test_other_weights_versions_and_images_are_noted():
    first = dataclasses.replace(
        toy_row(), provenance={"weights_fingerprint": "x", "images_fingerprint": "i", "git_commit": "1"}
    )
    second = dataclasses.replace(
        first, provenance={"weights_fingerprint": "y", "images_fingerprint": "j", "git_commit": "2"}
    )
    found = match([first], [second])
    assert len(found.pairs) == 1
    assert found.notes == (
        "weights of the backbone: not the same in 1 of 1 pairs",
        "images: not the same in 1 of 1 pairs",
        "commit of adgrid: not the same in 1 of 1 pairs",
    )


def test_ignored_fields_are_matched_and_told():
    found = match([toy_row()], [toy_row(params={"ratio": 0.01})], ignore=["params.ratio"])
    assert len(found.pairs) == 1
    assert found.notes == ("params.ratio may differ between the rows compared (--ignore params.ratio)",)


def test_methods_may_have_other_params_and_layers_and_a_backbone_of_none_stands_beside_all():
    rows = [toy_row(backbone=name) for name in ("r18", "r50")]
    rows += [toy_row(method="draem", backbone=None, params={"epochs": 3})]
    found = match_rows({"a": rows}, "method")
    assert [(pair.place.backbone, pair.candidate) for pair in found.pairs] == [("r18", "draem"), ("r50", "draem")]
    assert found.unmatched == ()


def test_a_method_without_backbone_has_no_place_on_that_axis():
    rows = [toy_row(backbone=name) for name in ("r18", "r50")] + [toy_row(method="draem", backbone=None)]
    found = match_rows({"a": rows}, "backbone")
    assert (found.baseline, found.candidates, len(found.pairs), found.unmatched) == ("r18", ("r50",), 1, ())


def test_a_parameter_is_an_axis():
    rows = [toy_row(params={"ratio": ratio, "k": k}) for k in (1, 9) for ratio in (0.1, 0.01)]
    found = match_rows({"a": rows}, "params.ratio")
    assert (found.baseline, found.candidates) == ("0.1", ("0.01",))
    assert [json.loads(pair.place.params) for pair in found.pairs] == [{"k": 1}, {"k": 9}]


def test_a_finished_row_counts_before_a_failed_one_and_then_the_newer():
    finished = dataclasses.replace(toy_row(0.9), provenance={"finished_at": "1"})
    failed = dataclasses.replace(toy_row(None), provenance={"finished_at": "2"})
    found = match([toy_row(0.8)], [failed, finished])
    assert found.pairs[0].candidate_rows[0].metrics == {"image_auroc": 0.9}
    newer = dataclasses.replace(failed, provenance={"finished_at": "3"}, reason="newer")
    assert "newer" in reasons(match([toy_row(0.8)], [failed, newer]))[0]


def test_stamps_of_one_side_alone_are_noted():
    found = match([toy_row(stamps=("rescored", "both say"))], [toy_row(stamps=("both say", "one says"))])
    assert found.notes == ("one says: said of one side alone in 1 of 1 pairs",)


def test_several_axes_are_compared_as_one():
    rows = [toy_row(method=method, backbone=name) for method in ("padim", "patchcore") for name in ("r18", "r50")]
    rows.append(toy_row(method="draem", backbone=None))
    found = match_rows({"a": rows}, "method+backbone", "draem")
    assert found.candidates == ("padim · r18", "padim · r50", "patchcore · r18", "patchcore · r50")
    assert (len(found.pairs), found.unmatched) == (4, ())
