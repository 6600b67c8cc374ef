"""Tables and pictures of comparisons."""

import csv
import io

import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from PIL import Image
from rich.console import Console
from scored_rows import Scored
from toy_rows import toy_row

from harness.compare import compare_rows
from harness.comparison_figures import BETTER, WORSE, draw_deltas, draw_ranks
from harness.comparison_tables import comparison_markdown, deltas_csv, ranks_csv, terminal_comparison, write_comparison
from harness.figures import HATCH
from harness.ranks import average_ranks


@pytest.fixture(scope="module")
def comparison():
    scored = Scored()
    rows = [
        scored(shift, method=method, category=category, seed=seed)
        for method, shift in (("plain", 1.0), ("strong", 2.0), ("weak", 0.1), ("equal", 1.0))
        for category in ("bolt", "nut", "screw")
        for seed in (0, 1)
    ]
    rows.append(toy_row(None, method="weak", category="washer"))
    return compare_rows({"run": rows}, scored.load, axis="method")


def shown(comparison, width=200):
    console = Console(width=width, file=io.StringIO())
    for part in terminal_comparison(comparison, width):
        console.print(part)
    return console.file.getvalue()


def drawn(draw, *arguments):
    stream = io.BytesIO()
    draw(*arguments, stream)
    return np.asarray(Image.open(stream).convert("RGB")).astype(int)


def count(picture, colour):
    return int((np.abs(picture - np.array(tuple(bytes.fromhex(colour[1:])))).max(axis=-1) <= 3).sum())


def test_the_terminal_shows_every_level_with_its_verdict(comparison):
    text = shown(comparison)
    assert "Image AUROC [%], method strong, weak, equal against plain" in text
    for line in ("everything, 3 pairs", "parts, bolt", "better", "worse", "not distinguishable", "over seeds"):
        assert line in text
    assert "not compared, 1 place of weak: only in weak" in text
    assert "average ranks over 3 categories (1 = best): strong 1.00" in text


def test_a_narrow_terminal_folds_names_and_cuts_no_number(comparison):
    text = " ".join(shown(comparison, 80).split())
    assert "over seeds" not in text
    for delta in comparison.select("image_auroc", "category"):
        low, high = delta.total.interval()
        assert f"{100 * delta.value:+.2f} {100 * low:+.2f} … {100 * high:+.2f}" in text


def test_numbers_in_files_are_rates_and_intervals_hold_the_difference(comparison):
    lines = list(csv.DictReader(io.StringIO(deltas_csv(comparison))))
    assert len(lines) == len(comparison.deltas) == 3 + 3 + 9
    for line in lines:
        difference = float(line["candidate_value"]) - float(line["baseline_value"])
        assert float(line["difference"]) == pytest.approx(difference)
        assert float(line["total_low"]) <= difference <= float(line["total_high"])
        assert float(line["total_high"]) - float(line["total_low"]) >= float(line["images_high"]) - float(
            line["images_low"]
        )
    ranks = list(csv.DictReader(io.StringIO(ranks_csv(comparison))))
    assert ranks[0]["name"] == "strong"
    assert ranks[-1]["name"] == "weak"


def test_a_folder_holds_the_page_and_every_picture_it_names(comparison, tmp_path):
    files = write_comparison(comparison, tmp_path / "new" / "folder", "adgrid compare run")
    text = comparison_markdown(comparison, "adgrid compare run")
    assert files[0].read_text() == text
    assert "    adgrid compare run" in text
    assert "only in weak" in text
    for name in ("differences_image_auroc.png", "critical_difference_image_auroc.png"):
        assert name in text
        with Image.open(tmp_path / "new" / "folder" / name) as picture:
            assert picture.size[0] > 500
    assert all(file.is_file() for file in files)


def test_verdicts_have_colours_and_words(comparison):
    picture = drawn(draw_deltas, comparison, "image_auroc")
    assert count(picture, BETTER) > 300
    assert count(picture, WORSE) > 300
    calm = compare_rows({"a": [toy_row(0.9)], "b": [toy_row(0.9, cell_id="b")]}, lambda cell_id: None)
    picture = drawn(draw_deltas, calm, "image_auroc")
    assert count(picture, BETTER) == count(picture, WORSE) == 0


def test_contestants_that_do_not_differ_are_joined():
    close = average_ranks(["a", "b", "c"], np.array([[0.9, 0.8, 0.7]] * 2 + [[0.7, 0.8, 0.9]]))
    apart = average_ranks(["a", "b", "c"], np.array([[0.9, 0.8, 0.7]] * 60))
    assert count(drawn(draw_ranks, close, "Image AUROC"), HATCH) > 1000
    assert count(drawn(draw_ranks, apart, "Image AUROC"), HATCH) < 100  # the softened edges of letters


@pytest.mark.parametrize("number", [2, 3, 9])
def test_ranks_of_any_number_fit_the_picture(number):
    names = [f"a rather long name of contestant {place}" for place in range(number)]
    values = np.random.default_rng(0).random((5, number))
    picture = drawn(draw_ranks, average_ranks(names, values), "Pixel AUROC")
    assert (picture[:, :6] == 255).all()
    assert (picture[:, -6:] == 255).all()
    assert picture.min() < 60


def test_drawing_leaves_no_window_and_no_figure_behind(comparison):
    draw_deltas(comparison, "image_auroc", io.BytesIO())
    assert Gcf.figs == {}
