import dataclasses
import json
import re

import pandas as pd
import pytest
from toy_rows import toy_row

from harness.contracts import AdgridError
from harness.metrics import METRICS
from harness.report import build_matrices, rows_frame, write_report
from harness.tables import cell_colour


@pytest.fixture
def rows():
    return [
        *(
            toy_row(0.9, category=name, pixel=0.8, method=method)
            for method in ("padim", "patchcore")
            for name in ("a", "b")
        ),
        toy_row(0.7, dataset="cells", category="mono"),
        toy_row(None, dataset="cells", category="mono", method="patchcore"),
    ]


def write(folder, rows, **options):
    return write_report(folder, rows, title="toys", command="adgrid run toys.yaml", **options)


# --- the flat table ---


def test_a_frame_has_one_line_per_row_in_the_order_given(rows):
    frame = rows_frame(rows)
    assert list(frame["cell_id"]) == [row.cell_id for row in rows]
    assert list(frame["status"]) == ["ok"] * 5 + ["failed"]
    assert frame["layers"].iloc[0] == "layer2+layer3"


def test_a_metric_that_is_not_available_is_missing_and_never_a_number(rows):
    frame = rows_frame(rows)
    assert set(METRICS) <= set(frame.columns)
    assert frame["pixel_auroc"].isna().tolist() == [False] * 4 + [True] * 2
    assert frame["aupro"].isna().all()
    assert frame["image_auroc"].iloc[5] is pd.NA
    assert frame["pixel_auroc"].mean() == pytest.approx(0.8)


def test_parameters_that_vary_within_a_method_get_columns():
    rows = [toy_row(params={"ratio": ratio, "k": 9, "sizes": (1, 2)}) for ratio in (0.1, 0.2)]
    rows.append(toy_row(method="padim2", params={"width": 100}))
    frame = rows_frame(rows)
    assert [name for name in frame.columns if name.startswith("param.")] == ["param.ratio"]
    assert frame["param.ratio"].tolist()[:2] == [0.1, 0.2]
    assert frame["param.ratio"].isna().tolist() == [False, False, True]
    assert json.loads(frame["params"].iloc[0]) == {"ratio": 0.1, "k": 9, "sizes": [1, 2]}


def test_costs_bounds_stamps_and_provenance_are_columns():
    row = dataclasses.replace(toy_row(stamps=("rescored", "random weights")), metric_bounds={"aupro": 1e-7})
    frame = rows_frame([row, toy_row(None, category="nut")])
    assert frame["fit_seconds"].iloc[0] == 2.0
    assert frame["fit_seconds"].isna().iloc[1]
    assert frame["aupro_bound"].iloc[0] == 1e-7
    assert frame["stamps"].tolist() == ["rescored; random weights", ""]
    assert frame["provenance.git_commit"].tolist() == ["abc1234"] * 2
    assert frame["reason"].iloc[1] == "ValueError: all features are NaN"


def test_no_rows_make_an_empty_frame_and_no_matrix():
    assert len(rows_frame([])) == 0
    assert build_matrices(rows_frame([])) == []


def test_the_frame_survives_a_csv_file(rows, tmp_path):
    frame = rows_frame(rows)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    again = pd.read_csv(tmp_path / "rows.csv")
    pd.testing.assert_series_equal(again["image_auroc"], frame["image_auroc"].astype("float64"))


# --- which matrices ---


def test_metrics_come_in_their_own_order_and_those_without_values_are_left_out(rows):
    assert [matrix.metric for matrix in build_matrices(rows_frame(rows))] == ["image_auroc", "pixel_auroc"]


def test_where_nothing_finished_one_matrix_shows_the_holes():
    (matrix,) = build_matrices(rows_frame([toy_row(None)]))
    assert (matrix.metric, matrix.rows[0].cells[0].note) == ("image_auroc", "1 of 1 failed")


def test_an_unknown_metric_or_dataset_is_refused_with_the_known_ones(rows):
    with pytest.raises(AdgridError, match=r"unknown metric 'auroc'; known: image_auroc, "):
        build_matrices(rows_frame(rows), ["auroc"])
    with pytest.raises(AdgridError, match=r"unknown metric 'category'"):
        build_matrices(rows_frame(rows), ["category"])
    with pytest.raises(AdgridError, match=r"unknown dataset 'mvtec'; the rows have: parts, cells"):
        build_matrices(rows_frame(rows), dataset="mvtec")


# --- the report folder ---


def test_a_report_is_complete(rows, tmp_path):
    files = write(tmp_path / "report", rows)
    names = [str(path.relative_to(tmp_path / "report")) for path in files]
    assert names[0] == "report.md"
    assert sorted(names[1:]) == sorted(
        ["rows.csv"]
        + [
            f"matrices/{m}.{kind}"
            for m in ("image_auroc", "pixel_auroc")
            for kind in ("csv", "html", "json", "md", "png", "tex")
        ]
        + [f"categories/parts/{m}.{kind}" for m in ("image_auroc", "pixel_auroc") for kind in ("csv", "md", "tex")]
    )
    assert all(path.stat().st_size > 0 for path in files)


def test_the_report_shows_and_explains_everything(rows, tmp_path):
    text = write(tmp_path, rows)[0].read_text()
    for part in (
        "# toys",
        "    adgrid run toys.yaml",
        "6 cells: 5 with numbers, 1 without.",
        "![Image AUROC](matrices/image_auroc.png)",
        "| padim | resnet18 | **90.0** | 70.0 |",
        "— (1 of 1 failed)",
        "<details><summary>parts</summary>",
        "| patchcore · resnet18 · cells | mono | 1 | failed | ValueError: all features are NaN |",
        "Traceback (most recent call last):",
        f"- Image AUROC: {METRICS['image_auroc'].definition}",
        "| git_commit | abc1234 |",
    ):
        assert part in text
    assert not re.search(r"\bnan\b", text.replace("features are NaN", ""), re.IGNORECASE)


def test_every_link_of_a_report_leads_to_a_file(rows, tmp_path):
    text = write(tmp_path, rows)[0].read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 2 * 5
    assert all((tmp_path / link).is_file() for link in links)


def test_rows_of_two_protocols_get_files_of_their_own(rows, tmp_path):
    other = toy_row(0.5, protocol={"image_size": [256, 256]})
    names = {path.name for path in write(tmp_path, [*rows, other])}
    assert {f"image_auroc-{row.protocol_id}.png" for row in (rows[0], other)} <= names


def test_missing_rows_are_said_to_be_missing(rows, tmp_path):
    assert "planned cells" not in write(tmp_path, rows, expected_cells=6)[0].read_text()
    assert "**3 of 9 planned cells have no row yet" in write(tmp_path, rows, expected_cells=9)[0].read_text()


def test_values_that_a_method_or_backbone_chose_are_told(tmp_path):
    resolved = {"smoothing": 4.0, "score_reduction": "max", "interpolation": "bicubic", "image_size": [224, 224]}
    text = write(tmp_path, [toy_row(resolved_protocol=resolved)])[0].read_text()
    for line in ("- smoothing: padim 4", "- score_reduction: padim max", "- interpolation: resnet18 bicubic"):
        assert line in text.splitlines()


def test_contact_sheets_are_linked(rows, tmp_path):
    sheets = {rows[0].cell_id: "sheets/one.png"}
    assert (
        "- parts, a: [padim · resnet18 · seed 0](sheets/one.png)"
        in write(tmp_path, rows, contact_sheets=sheets)[0].read_text()
    )


def test_a_second_report_removes_the_tables_that_no_longer_belong(rows, tmp_path):
    write(tmp_path, rows)
    (tmp_path / "matrices" / "notes.txt").write_text("mine")
    files = write(tmp_path, [row for row in rows if row.dataset == "cells"])
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(files) | {tmp_path / "matrices" / "notes.txt"}


def test_a_report_of_nothing_says_so(tmp_path):
    files = write(tmp_path, [], expected_cells=4)
    assert "There is nothing to show yet." in files[0].read_text()
    assert "**4 of 4 planned cells have no row yet" in files[0].read_text()


def test_odd_names_of_datasets_stay_inside_the_folder(tmp_path):
    rows = [toy_row(dataset="../up/and away", category=name) for name in ("a", "b")]
    files = write(tmp_path / "report", rows)
    assert all((tmp_path / "report").resolve() in path.resolve().parents for path in files)


def test_a_thousand_rows_are_matrices_in_a_blink():
    import time

    rows = [
        toy_row(
            0.5 + (b + m + c) % 7 / 20, method=f"m{m}", backbone=f"b{b}", dataset=f"d{d}", category=f"c{c}", pixel=0.7
        )
        for m in range(5)
        for b in range(5)
        for d in range(5)
        for c in range(8)
    ]
    start = time.process_time()
    matrices = build_matrices(rows_frame(rows))
    assert time.process_time() - start < 1.5
    assert [len(matrix.rows) for matrix in matrices] == [25, 25]


def test_figures_for_papers_have_the_same_colours_and_hold_text(rows, tmp_path):
    formats = {"also_figures": ("pdf", "svg")}
    files = {path.name: path for path in write(tmp_path / "report", rows, **formats)}
    assert "[SVG](matrices/image_auroc.svg)" in files["report.md"].read_text()
    (matrix,) = build_matrices(rows_frame(rows), ["image_auroc"])
    svg = files["image_auroc.svg"].read_text(encoding="utf-8")
    for number in matrix.numbers:
        red, green, blue = cell_colour(number, matrix.colour_range())
        assert f"#{red:02x}{green:02x}{blue:02x}" in svg
        assert f">{100 * number:.1f}</text>" in svg
    assert files["image_auroc.pdf"].read_bytes()[:5] == b"%PDF-"
    before = {name: path.read_bytes() for name, path in files.items() if name.endswith((".pdf", ".svg", ".png"))}
    write(tmp_path / "report", rows, **formats)
    assert {name: files[name].read_bytes() for name in before} == before
    write(tmp_path / "report", rows)
    assert not files["image_auroc.svg"].exists()
