import csv
import io
import json
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from matplotlib import colormaps
from rich.console import Console
from toy_rows import toy_row

from harness.matrices import MatrixCell
from harness.matrix_page import matrix_html
from harness.report import build_matrices, rows_frame
from harness.tables import (
    cell_colour,
    failures_table,
    format_percent,
    group_failures,
    is_dark,
    matrix_csv,
    matrix_json,
    matrix_latex,
    matrix_markdown,
    terminal_table,
)


@pytest.fixture
def rows():
    return [
        toy_row(0.912, pixel=0.95),
        toy_row(0.95, dataset="solar_cells", category="mono"),
        toy_row(0.87, pixel=0.9, method="patchcore"),
        toy_row(None, method="patchcore", dataset="solar_cells", category="mono"),
        toy_row(0.87, method="draem", backbone=None, stamps=("rescored",), pixel=0.91),
    ]


@pytest.fixture
def matrices(rows):
    image, pixel = build_matrices(rows_frame(rows), ["image_auroc", "pixel_auroc"])
    return image, pixel


def shown(table, width=120):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


def test_markdown_is_as_agreed(matrices):
    protocol = matrices[0].protocol
    assert matrix_markdown(matrices[0]) == (
        "**Image AUROC** in percent, mean over categories; best of each column in bold.\n"
        "\n"
        "| method | backbone | parts | solar_cells |\n"
        "| --- | --- | ---: | ---: |\n"
        "| padim | resnet18 | **91.2** | 95.0 |\n"
        "| patchcore | resnet18 | 87.0 | — (1 of 1 failed) |\n"
        "| draem | – | 87.0† | — (not run) |\n"
        "\n"
        f"- Protocol {matrices[0].protocol_id}: {protocol}.\n"
        "- † rescored.\n"
        "- 4 of 5 cells are done; a hole is never averaged over.\n"
    )


def test_latex_is_as_agreed(matrices):
    lines = matrix_latex(matrices[0]).splitlines()
    assert lines[:2] == ["\\begin{table}", "  \\centering"]
    assert lines[2].startswith(
        "  \\caption{Image AUROC in \\%, mean over categories; best of each column in bold, second"
    )
    assert "224$\\times$224 px" in lines[2]
    assert lines[3:] == [
        f"  \\label{{tab:image_auroc-{matrices[0].protocol_id}}}",
        "  \\begin{tabular}{llrr}",
        "    \\toprule",
        "    method & backbone & parts & solar\\_cells \\\\",
        "    \\midrule",
        "    padim & resnet18 & \\textbf{91.2} & 95.0 \\\\",
        "    patchcore & resnet18 & \\underline{87.0} & --- (1 of 1 failed) \\\\",
        "    draem & -- & \\underline{87.0}\\textsuperscript{\\textdagger{}} & --- (not run) \\\\",
        "    \\bottomrule",
        "  \\end{tabular}",
        "\\end{table}",
    ]


def test_latex_holds_no_character_that_breaks_a_document(rows):
    rows += [toy_row(0.5, method="a&b_c%d#e{f}~^\\<$>", seed=seed, stamps=("x_y",)) for seed in (0, 1)]
    text = matrix_latex(build_matrices(rows_frame(rows), ["image_auroc"])[0])
    assert text.isascii()
    assert (
        "a\\&b\\_c\\%d\\#e\\{f\\}\\textasciitilde{}\\textasciicircum{}\\textbackslash{}\\textless{}\\$\\textgreater{}"
        in text
    )


def test_a_metric_without_masks_is_printed_as_not_available(matrices):
    _, pixel = matrices
    column = [line.split(" | ")[-1] for line in matrix_markdown(pixel).splitlines() if line.startswith("| p")]
    assert column == ["n/a |", "n/a |"]
    for text in (matrix_latex(pixel), shown(terminal_table(pixel)), matrix_csv(pixel)):
        assert "n/a" in text
        assert "nan" not in text.lower()


def test_csv_holds_rates_and_tells_holes_in_a_column_of_their_own(matrices):
    header, *lines = csv.reader(io.StringIO(matrix_csv(matrices[0])))
    assert header == ["method", "backbone", "parts", "solar_cells", "solar_cells_note"]
    assert lines == [
        ["padim", "resnet18", "0.912", "0.95", ""],
        ["patchcore", "resnet18", "0.87", "", "1 of 1 failed"],
        ["draem", "–", "0.87", "", "not run"],
    ]


def test_csv_and_json_keep_full_precision_and_the_spread_over_seeds():
    rows = [toy_row(value, seed=seed) for seed, value in enumerate((1 / 3, 0.123456789012345))]
    (matrix,) = build_matrices(rows_frame(rows), ["image_auroc"])
    cell = matrix.rows[0].cells[0]
    (line,) = csv.DictReader(io.StringIO(matrix_csv(matrix)))
    assert (float(line["parts"]), float(line["parts_std"])) == (cell.value, cell.std)
    table = json.loads(matrix_json(matrix))
    assert dict(zip(table["columns"], table["data"][0], strict=True))["parts_std"] == cell.std


def test_percent_have_one_decimal_and_their_spread():
    assert format_percent(MatrixCell(state="value", value=0.97149)) == "97.1"
    assert format_percent(MatrixCell(state="value", value=1.0, std=0.0123)) == "100.0 ± 1.2"
    assert format_percent(MatrixCell(state="unavailable", note="not available for nut")) == "n/a"
    assert format_percent(MatrixCell(state="hole", note="1 of 2 failed")) == "— (1 of 2 failed)"


def test_the_terminal_table_says_what_the_matrix_says(matrices):
    text = shown(terminal_table(matrices[0]))
    for part in ("Image AUROC [%]", "91.2", "87.0†", "— (1 of 1 failed)", "— (not run)", "† rescored.", "4 of 5 cells"):
        assert part in text


def test_the_terminal_table_colours_numbers_and_nothing_else(matrices):
    table = terminal_table(matrices[0])
    best, hole = next(iter(table.columns[2].cells)), list(table.columns[3].cells)[1]
    assert best.style.bold
    assert best.style.bgcolor.triplet == cell_colour(0.912, matrices[0].colour_range())
    assert "on" not in str(hole.style)


def test_names_that_look_like_markup_are_shown_as_they_are():
    rows = [toy_row(0.5, method="[red]x[/red]"), toy_row(None, category="[b]", reason="[/] boom")]
    assert "[red]x[/red]" in shown(terminal_table(build_matrices(rows_frame(rows), ["image_auroc"])[0]))
    assert "[/] boom" in shown(failures_table(rows))


def test_colours_follow_viridis():
    places = np.linspace(0, 1, 101)
    ours = np.array([cell_colour(0.5 + place / 2, (0.5, 1.0)) for place in places])
    assert np.abs(ours - 255 * colormaps["viridis"](places)[:, :3]).max() < 6
    assert cell_colour(-1.0, (0.5, 1.0)) == cell_colour(0.5, (0.5, 1.0))


def test_text_on_every_colour_has_a_contrast_of_at_least_four_and_a_half():
    def luminance(colour):
        parts = [p / 255 / 12.92 if p / 255 <= 0.04045 else ((p / 255 + 0.055) / 1.055) ** 2.4 for p in colour]
        return float(np.dot([0.2126, 0.7152, 0.0722], parts))

    for place in np.linspace(0, 1, 101):
        colour = cell_colour(place, (0.0, 1.0))
        light, dark = sorted((luminance(colour), 1.0 if is_dark(colour) else 0.0), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_failures_with_one_reason_are_told_once():
    rows = [toy_row(None, category=name, seed=seed) for name in ("bolt", "nut") for seed in (0, 1)]
    rows += [toy_row(None, category="pin", status="skipped", reason="projector failed"), toy_row(0.9)]
    first, second = group_failures(rows)
    assert (first.categories, first.num_cells, first.status) == (("bolt", "nut"), 4, "failed")
    assert (second.categories, second.num_cells, second.reason) == (("pin",), 1, "projector failed")
    text = shown(failures_table(rows))
    assert "Without a number: 5 cells" in text
    assert text.count("all features are NaN") == 1


def test_a_page_shows_every_number_with_its_colour_and_escapes_names(rows):
    strange = toy_row(0.5, method="<b>", dataset="parts")
    (matrix,) = build_matrices(rows_frame([*rows, strange]), ["image_auroc"])
    page = ET.fromstring(matrix_html(matrix).partition("<body>")[2].partition("</body>")[0].join(["<a>", "</a>"]))
    lines = [list(line) for line in page.iter("tr")]
    assert [cell.text for cell in lines[0]] == [*matrix.header, *matrix.columns]
    assert [cell.text for cell in lines[-1]][:3] == ["<b>", "resnet18", "50.0"]
    first = lines[1][2]
    red, green, blue = cell_colour(0.912, matrix.colour_range())
    assert (first.text, first.get("class")) == ("91.2", "best")
    assert f"background:#{red:02x}{green:02x}{blue:02x}" in first.get("style")
    assert [cell.get("title") for cell in lines[2] if cell.get("class") == "hole"] == [
        "mono, seed 0: ValueError: all features are NaN"
    ]
