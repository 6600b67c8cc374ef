import numpy as np
import pytest
from scored_rows import Scored
from toy_rows import toy_row

from harness.bundle import (
    ROWS_FILE,
    SCORES_FILE,
    ImageScores,
    load_image_scores,
    read_bundle,
    scores_from_parquet,
    scores_to_parquet,
    write_bundle,
)
from harness.store import Store


def publish(store, row, folder="/data/parts/test", scores=(3.0, 1.0, 2.0)):
    paths = [f"{folder}/{name}" for name in ("bad/0.png", "good/0.png", "good/1.png")]
    store.publish_row(row)
    store.publish_scores(row.cell_id, {"path": paths, "label": [1, 0, 0], "image_score": list(scores)})


def equal(first, second):
    return first.images == second.images and (first.label == second.label).all() and (first.score == second.score).all()


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "root"))


def test_rows_and_scores_come_back_complete(store, tmp_path):
    rows = [toy_row(0.9), toy_row(0.8, category="nut"), toy_row(None, category="screw")]
    for row in rows[:2]:
        publish(store, row)
    files = write_bundle(store, "run", rows, tmp_path / "report")
    assert [file.name for file in files] == [ROWS_FILE, SCORES_FILE]
    again, scores = read_bundle(tmp_path / "report")
    assert again == rows
    assert scores.keys() == {row.cell_id for row in rows[:2]}
    for found in scores.values():
        assert found.images == ("bad/0.png", "good/0.png", "good/1.png")
        assert found.label.tolist() == [1, 0, 0]
        assert found.score.tolist() == [3.0, 1.0, 2.0]


def test_names_of_images_do_not_depend_on_the_machine(store):
    rows = [toy_row(0.9), toy_row(0.8, category="nut")]
    for row, folder in zip(rows, ("/data/parts/test", "/mnt/elsewhere/x/test"), strict=True):
        publish(store, row, folder)
    first, second = (load_image_scores(store, row.cell_id) for row in rows)
    assert first.images == second.images
    assert load_image_scores(store, "absent") is None


def test_scores_of_an_earlier_bundle_are_not_read_again(store, tmp_path):
    row = toy_row(0.9)
    publish(store, row)
    write_bundle(store, "run", [row], store.local_path("runs/run/report"))
    store.delete(f"scores/{row.cell_id}.parquet")
    other = toy_row(0.8, category="nut")
    publish(store, other)
    write_bundle(store, "run", [row, other], tmp_path / "again")
    assert read_bundle(tmp_path / "again")[1].keys() == {row.cell_id, other.cell_id}


def test_a_bundle_holds_any_number_of_cells():
    assert scores_from_parquet(scores_to_parquet({})) == {}
    scored = Scored()
    for category in "abc":
        scored(category=category)
    found = scores_from_parquet(scores_to_parquet(scored.scores))
    assert found.keys() == scored.scores.keys()
    assert all(equal(found[name], scored.scores[name]) for name in found)


def test_scores_are_reordered_by_name_or_refused():
    scores = ImageScores(("a", "b", "c"), np.array([0, 1, 1]), np.array([1.0, 2.0, 3.0]))
    assert scores.reorder(("a", "b", "c")) is scores
    assert scores.reorder(("c", "a", "b")).score.tolist() == [3.0, 1.0, 2.0]
    assert scores.reorder(("a", "b")) is None
    assert scores.reorder(("a", "b", "d")) is None
    assert scores.reorder(("a", "a", "b", "c")) is None
    double = ImageScores(("a", "a"), np.array([0, 1]), np.array([1.0, 2.0]))
    assert double.reorder(("a", "b")) is None
