import csv
import dataclasses
import io

import pytest
from rich.console import Console
from toy_rows import toy_row

from harness.contracts import AdgridError
from harness.leaderboard import boards_csv, build_boards, newest_rows, terminal_board


def dated(row, day, **changes):
    return dataclasses.replace(
        row, provenance={"finished_at": f"2026-01-{day:02}"}, cell_id=f"{row.cell_id}-{day}", **changes
    )


def rows(value, method, datasets=("parts", "cells"), day=1, **changes):
    return [dated(toy_row(value, method, dataset=name, **changes), day) for name in datasets]


def places(board):
    return [line.labels[0] for line in board.lines]


def shown(board, width=160):
    console = Console(width=width, file=io.StringIO())
    console.print(terminal_board(board, width))
    return console.file.getvalue()


def test_the_newest_finished_row_of_a_cell_counts():
    old, new = dated(toy_row(0.9), 1), dated(toy_row(0.8), 2)
    failed = dated(toy_row(None), 3)
    other = dated(toy_row(0.7, seed=1), 1)
    assert newest_rows([new, old, failed, other]) == [new, other]
    assert newest_rows([failed]) == []


def test_random_weights_never_replace_trained_ones():
    trained, random = dated(toy_row(0.9), 1), dated(toy_row(0.99), 2, stamps=("random weights",))
    assert newest_rows([trained, random]) == [trained, random]
    (board,) = build_boards([trained, random], "image_auroc")
    assert [line.labels[1] for line in board.lines] == ["resnet18 (random)", "resnet18"]


def test_lines_are_sorted_by_their_mean_and_incomplete_ones_follow():
    listed = [*rows(0.8, "good"), *rows(0.9, "best"), *rows(0.99, "partial", ("parts",)), *rows(0.7, "bad")]
    (board,) = build_boards(newest_rows(listed), "image_auroc")
    assert places(board) == ["best", "good", "bad", "partial"]
    assert [mean.value for mean in board.means] == [pytest.approx(0.9), pytest.approx(0.8), pytest.approx(0.7), None]
    text = shown(board)
    assert "— (1 of 2)" in text
    assert text.index("best") < text.index("good") < text.index("partial")


def test_a_narrow_terminal_folds_names_and_cuts_no_number():
    names = ("magnetic_tile", "mvtec_ad", "generated", "elpv")
    listed = [
        row
        for seed, value in enumerate((0.8, 0.912))
        for row in rows(value, "a_method", names, backbone="tf_efficientnet_lite0", seed=seed)
    ]
    (board,) = build_boards(listed, "image_auroc")
    wide, narrow = shown(board), shown(board, 72)
    assert wide.count("85.6 ± 7.9") == 4  # the mean over datasets has none
    assert "± is the sample" in wide
    assert narrow.count("85.6") == 5
    assert "±" not in narrow
    assert "tf_efficient" in narrow
    assert max(map(len, narrow.splitlines())) <= 72


def test_a_single_dataset_shows_its_categories():
    listed = [toy_row(value, method, category=name) for method, values in (("a", (0.9, 0.6)), ("b", (0.8, 0.8)))
              for name, value in zip(("bolt", "nut"), values, strict=True)]  # fmt: skip
    (board,) = build_boards(listed, "image_auroc")
    assert (board.matrix.columns, places(board)) == (("bolt", "nut", "mean"), ["b", "a"])


def test_protocols_stand_on_boards_of_their_own():
    listed = [*rows(0.8, "a"), *rows(0.9, "a", protocol={"aupro_limit": 0.05})]
    boards = build_boards(listed, "image_auroc")
    assert [board.means[0].value for board in boards] == [pytest.approx(0.8), pytest.approx(0.9)]


def test_a_board_as_csv_holds_rates():
    (board,) = build_boards([*rows(0.8, "a"), *rows(0.9, "b", ("parts",))], "image_auroc")
    lines = list(csv.DictReader(io.StringIO(boards_csv([board]))))
    assert [(line["place"], line["line"], line["on"], line["value"]) for line in lines] == [
        ("1", "a · resnet18", "parts", "0.8"),
        ("1", "a · resnet18", "cells", "0.8"),
        ("1", "a · resnet18", "mean", "0.8"),
        ("2", "b · resnet18", "parts", "0.9"),
        ("2", "b · resnet18", "cells", ""),
        ("2", "b · resnet18", "mean", ""),
    ]


def test_a_metric_that_nobody_has_is_told():
    with pytest.raises(AdgridError, match="they have image_auroc"):
        build_boards([toy_row()], "aupro")
    with pytest.raises(AdgridError, match="did you mean 'image_auroc'"):
        build_boards([toy_row()], "image_auc")
