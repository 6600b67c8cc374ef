"""The one-file report: what is in it, as data and as text. In a browser: `test_browser.py`."""

import base64
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from runs import SmallRun
from scored_rows import Scored
from toy_rows import toy_row, toy_study

from harness.bundle import ImageScores
from harness.details import load_details, pick_mistakes, remake_details
from harness.html_cells import Intervals, count_scores, describe_cells, draw_roc
from harness.html_report import render_page
from harness.intervals import delong
from harness.metrics import image_metrics
from harness.tables import cell_colour, scale_stops


def no_details(cell_id):
    """Of a cell of which neither curves nor pictures were kept."""
    return {"curves": {}, "pictures": []}


def scores_of(score, label):
    return ImageScores(tuple(f"{place}.png" for place in range(len(score))), np.array(label), np.array(score, float))


def page_data(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found[1])


def picture(number, label=1, score=1.0, size=100):
    return {
        "name": f"{number}.png", "label": label, "defect": "dent", "score": score, "id": f"photo-{number}",
        "photo": "p" * size, "heat": "h" * size, "mask": "m" * size,
    }  # fmt: skip


@pytest.fixture
def scored():
    return Scored()


def test_a_roc_curve_counts_what_each_threshold_raises():
    roc = draw_roc(scores_of([5, 4, 4, 3, 1], [1, 1, 0, 1, 0]), 100)
    assert roc["threshold"] == [5, 4, 3, 1]
    assert (roc["true"], roc["false"]) == ([1, 2, 3, 3], [0, 1, 1, 2])
    assert (roc["normal"], roc["anomalous"]) == (2, 3)
    assert roc["threshold"][roc["best"]] == 3  # F1 6/7


def test_a_thinned_roc_curve_keeps_its_area_and_its_best_threshold():
    generator = np.random.default_rng(0)
    label = generator.integers(0, 2, 3000)
    scores = scores_of(generator.normal(size=3000) + label, label)
    full, thin = draw_roc(scores, 10_000), draw_roc(scores, 60)
    assert len(thin["threshold"]) <= 61
    assert thin["threshold"][thin["best"]] == full["threshold"][full["best"]]
    area = np.trapezoid([0, *thin["true"]], [0, *thin["false"]]) / thin["normal"] / thin["anomalous"]
    assert area == pytest.approx(image_metrics(scores.score, scores.label)["image_auroc"], abs=2e-3)


def test_a_histogram_counts_every_image():
    found = count_scores(scores_of([0.0, 1.0, 1.0, 2.0], [0, 0, 1, 1]))
    assert (found["low"], found["high"]) == (0.0, 2.0)
    assert (sum(found["normal"]), sum(found["anomalous"])) == (2, 2)
    flat = count_scores(scores_of([3.0, 3.0], [0, 1]))
    assert (sum(flat["normal"]), sum(flat["anomalous"])) == (1, 1)


def test_mistakes_are_the_lowest_anomalous_and_the_highest_normal_images():
    assert pick_mistakes(np.array([5.0, 1.0, 3.0, 2.0, 4.0]), np.array([1, 1, 0, 0, 1]), 2) == [1, 4, 2, 3]


# --- intervals ---


def test_the_interval_of_one_cell_is_that_of_delong(scored):
    row = scored(1.0)
    scores = scored.scores[row.cell_id]
    expected = delong(scores.score[None], scores.label, np.ones(1)).interval()
    assert Intervals(scored.scores).of([row]) == pytest.approx(expected)


def test_a_mean_of_categories_is_known_better_and_seeds_add_their_spread(scored):
    rows = [scored(1.0, category=name) for name in "abcd"]
    low, high = Intervals(scored.scores).of(rows)
    one_low, one_high = Intervals(scored.scores).of(rows[:1])
    assert high - low < 0.7 * (one_high - one_low)
    seeds = [scored(1.0, category="a", seed=seed) for seed in range(3)]
    found = Intervals(scored.scores).of(seeds)
    middle = np.mean([row.metrics["image_auroc"] for row in seeds])
    assert sum(found) / 2 == pytest.approx(middle)


def test_without_scores_or_variance_there_is_no_interval(scored):
    row = scored(1.0)
    assert Intervals({}).of([row]) is None
    perfect = scored(50.0)
    assert Intervals(scored.scores).of([perfect]) is None


# --- the budget of pictures ---


def test_the_pictures_of_all_cells_are_never_held_at_once(scored):
    rows = [scored(1.0, category=str(number)) for number in range(20)]
    asked = []

    def details(cell_id):
        asked.append(cell_id)
        return {"pictures": [picture(cell_id)]}

    cells, photos = describe_cells(rows, {}, details, picture_bytes=3 * 300)
    assert len(photos) == 3
    # Once each for what they take, and again those that fit.
    assert asked == [row.cell_id for row in rows] + [cell["id"] for cell in cells if cell["pictures"]]


def test_every_cell_gets_its_worst_mistake_before_any_gets_a_second(scored):
    rows = [scored(1.0, category=name) for name in "ab"]
    pictures = {row.cell_id: {"pictures": [picture(f"{row.category}{n}") for n in range(3)]} for row in rows}
    cells, photos = describe_cells(rows, {}, pictures.__getitem__, picture_bytes=4 * 300)
    assert [[one["name"] for one in cell["pictures"]] for cell in cells] == [["a0.png", "a1.png"], ["b0.png", "b1.png"]]
    assert len(photos) == 4
    cells, photos = describe_cells(rows, {}, pictures.__getitem__, picture_bytes=3 * 300)
    assert [len(cell["pictures"]) for cell in cells] == [2, 1]
    assert describe_cells(rows, {}, pictures.__getitem__, 0)[1] == {}


def test_a_photo_that_several_cells_show_is_kept_once(scored):
    rows = [scored(1.0, method=name) for name in ("padim", "patchcore")]
    pictures = {row.cell_id: {"pictures": [picture("same")]} for row in rows}
    cells, photos = describe_cells(rows, {}, pictures.__getitem__, picture_bytes=300 + 200)
    assert [len(cell["pictures"]) for cell in cells] == [1, 1]
    assert list(photos) == ["photo-same"]
    assert "photo" not in cells[0]["pictures"][0]


# --- the page ---


def test_a_page_names_nothing_outside_itself(scored):
    rows = [scored(1.0, category=name) for name in "ab"]
    page = render_page(rows, scored.scores, no_details, title="toys", command="adgrid run toys.yaml")
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"'$]""", page)
    assert not re.findall(r"@import|url\(", page)


def test_the_data_are_those_of_the_rows(scored):
    rows = [scored(shift, category=name, method=method) for method, shift in (("padim", 1.0), ("patchcore", 2.0))
            for name in "ab"]  # fmt: skip
    rows.append(toy_row(None, category="b", method="draem", backbone=None))
    data = page_data(render_page(rows, scored.scores, no_details, title="t", command="c"))
    assert [one["name"] for one in data["metrics"]] == ["image_auroc", "image_ap", "image_f1_max"]
    matrix = next(one for one in data["matrices"] if one["metric"] == "image_auroc" and one["dataset"] is None)
    first, second, hole = (line["cells"][0] for line in matrix["rows"])
    mean = np.mean([row.metrics["image_auroc"] for row in rows[:2]])
    assert first["value"] == pytest.approx(mean, abs=1e-5)
    assert first["interval"][0] < mean < first["interval"][1]
    assert (second["rank"], hole["state"]) == ("best", "hole")
    per_category = next(one for one in data["matrices"] if one["metric"] == "image_auroc" and one["dataset"] == "parts")
    assert per_category["columns"] == ["a", "b", "mean"]
    assert len(data["cells"]) == 4
    assert data["cells"][0]["roc"]["anomalous"] == 60
    assert data["variants"][matrix["rows"][1]["variant"]][0] == "patchcore"
    assert [tuple(stop) for stop in data["scale"]] == [
        cell_colour(place / (len(scale_stops()) - 1), (0.0, 1.0)) for place in range(len(scale_stops()))
    ]


def test_failures_stand_with_reason_and_traceback_as_text(scored):
    failed = dataclasses.replace(toy_row(None), reason="ValueError: <b> & co", traceback="Traceback\n  </script><x>")
    page = render_page([scored(1.0), failed], scored.scores, no_details, title="<t>", command="run --set a='<b>'",
                       expected_cells=5)  # fmt: skip
    assert "ValueError: &lt;b&gt; &amp; co" in page
    assert "&lt;/script&gt;&lt;x&gt;" in page
    assert "3 of 5 planned cells have no row yet" in page
    assert "<title>&lt;t&gt;</title>" in page
    assert page_data(page)["cells"]


def test_no_rows_make_a_page_too():
    page = render_page([], {}, no_details, title="empty", command="adgrid run empty.yaml")
    assert page_data(page)["matrices"] == []
    assert "0 cells" in page


def test_a_study_shows_its_trials_the_best_first_and_what_it_was_tuned_on(scored, tmp_path):
    study = toy_study(tmp_path / "parallel.png")
    page = render_page([scored(1.0)], scored.scores, no_details, title="t", command="c", studies=[study])
    section = re.search(r'<section id="studies".*?</section>', page, re.DOTALL)[0]
    assert "3 configurations by random search over ratio loguniform [0.01, 0.5]" in section
    assert "Tuned on parts/nut by Image AUROC, reported on parts/bolt" in section
    trials = re.findall(r'<th scope="row">(\d)</th><td>(.*?)</td><td class="num">(.*?)</td>', section)
    assert trials == [("1", "0.25", "<b>90.0</b>"), ("0", "0.1", "80.0"), ("2", "0.05", "stopped")]
    assert "<img" not in section  # no picture, no hole
    Image.new("RGB", (4, 3)).save(study[2])
    page = render_page([scored(1.0)], scored.scores, no_details, title="t", command="c", studies=[study])
    data = re.search(r'alt="Parallel coordinates of the trials" src="data:image/png;base64,(.*?)"', page)[1]
    assert base64.b64decode(data) == study[2].read_bytes()
    assert 'id="studies"' not in render_page([scored(1.0)], scored.scores, no_details, title="t", command="c")


def test_the_data_cannot_close_their_script(scored):
    row = dataclasses.replace(scored(1.0), params={"text": "</script><script>alert(1)</script>"})
    page = render_page([row], scored.scores, no_details, title="t", command="c")
    assert page_data(page)["cells"][0]["params"] == {"text": "</script><script>alert(1)</script>"}


# --- details of cells ---


def test_a_cell_keeps_its_curves_and_pictures_and_they_can_be_made_again(tmp_path, places):
    run = SmallRun(tmp_path, places)
    row = run(overrides=["datasets=toy_squares"], pictures=True)["small"]
    first = load_details(run.store, row.cell_id)
    curves = first["curves"]
    assert curves["false_positive_rate"][-1] == curves["region_overlap"][-1] == 1.0
    area = np.trapezoid(curves["true_positive_rate"], curves["false_positive_rate"])
    assert area == pytest.approx(row.metrics["pixel_auroc"], abs=5e-3)
    labels = [one["label"] for one in first["pictures"]]
    assert labels == sorted(labels, reverse=True)
    assert {0, 1} == set(labels)
    for one in first["pictures"]:
        photo, heat = (Image.open(io.BytesIO(base64.b64decode(one[name]))) for name in ("photo", "heat"))
        assert (max(photo.size), photo.mode) == (176, "RGB")
        assert (max(heat.size), heat.mode) == (88, "RGBA")
        assert ("mask" in one) == bool(one["label"])
    run.store.delete(f"details/{row.cell_id}.json")
    assert load_details(run.store, row.cell_id) == {"curves": {}, "pictures": []}
    assert remake_details(run.store, [row], places.cache_dir) == []
    assert load_details(run.store, row.cell_id) == first
    run.store.delete(f"details/{row.cell_id}.json")
    run.store.delete(f"predictions/{row.prediction_id}.arrow")
    (note,) = remake_details(run.store, [row], places.cache_dir)
    assert "not kept" in note
