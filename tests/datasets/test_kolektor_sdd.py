"""KolektorSDD: labels from the masks, a split by item, pictures that occur twice."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import save_image, save_mask

from harness.contracts import AdgridError, derive_seed
from harness.datasets.kolektor_sdd import DATASET

NUM_ITEMS = 10


def make_tree(root, num_items=NUM_ITEMS):
    """Items of three views, different pictures all; the last view shows the defect."""
    for item in range(1, num_items + 1):
        folder = root / f"kos{item:02d}"
        for part in range(3):
            save_image(folder / f"Part{part}.jpg", 20 * item + 5 * part)
            save_mask(folder / f"Part{part}_label.bmp", value=255 if part == 2 else 0)
    return root


def train_items(num_items=NUM_ITEMS):
    """The split as its docstring tells it."""
    items = [f"kos{item:02d}" for item in range(1, num_items + 1)]
    return set(sorted(items, key=lambda item: derive_seed("kolektor_sdd", "split", item))[: round(0.7 * num_items)])


@pytest.fixture
def root(places, tmp_path):
    return make_tree(tmp_path / "data" / "kolektor_sdd")


def open_kolektor(root, places):
    return DATASET("kolektor_sdd", str(root), places)


def test_an_image_is_normal_when_its_mask_marks_nothing(root, places):
    dataset = open_kolektor(root, places)
    assert dataset.missing() is None
    assert dataset.category_names() == ("kolektor_sdd",)
    category = dataset.category("kolektor_sdd")
    assert category.has_masks
    for sample in category.train + category.test:
        assert (sample.label == 1) == sample.path.endswith("Part2.jpg")
        assert (sample.sample_id, sample.view) == tuple(sample.path.removesuffix(".jpg").split("/")[-2:])
        defective = ("defective", sample.path.replace(".jpg", "_label.bmp"))
        assert (sample.defect_type, sample.mask_path) == (defective if sample.label else ("good", None))


def test_the_split_is_by_item_and_only_normal_images_are_trained_on(root, places):
    category = open_kolektor(root, places).category("kolektor_sdd")
    assert {(s.split, s.label) for s in category.train} == {("train", 0)}
    assert {s.sample_id for s in category.train} == train_items()
    assert len(category.train) == 14
    # All that is left is tested: the other items, and the defects of all.
    normal = {s.sample_id for s in category.test if s.label == 0}
    assert normal.isdisjoint(train_items())
    assert sum(s.label for s in category.test) == NUM_ITEMS
    assert len(category.train) + len(category.test) == 3 * NUM_ITEMS
    assert {s.split for s in category.test} == {"test"}
    for part in (category.train, category.test):
        assert list(part) == sorted(part, key=lambda sample: sample.path)


def test_the_split_does_not_depend_on_the_place_or_the_time(root, places, tmp_path):
    shutil.copytree(root, tmp_path / "elsewhere")
    first, second = (open_kolektor(place, places).category("kolektor_sdd") for place in (root, tmp_path / "elsewhere"))
    assert [(s.sample_id, s.view) for s in first.train] == [(s.sample_id, s.view) for s in second.train]


def test_a_picture_that_is_tested_is_not_trained_on_under_another_name(root, places):
    trained, tested = min(train_items()), min({f"kos{n:02d}" for n in range(1, NUM_ITEMS + 1)} - train_items())
    shutil.copy(root / tested / "Part0.jpg", root / trained / "Part1.jpg")  # normal in both
    shutil.copy(root / trained / "Part2.jpg", root / trained / "Part0.jpg")  # labelled both ways
    category = open_kolektor(root, places).category("kolektor_sdd")
    assert trained not in {s.sample_id for s in category.train}
    assert {s.view for s in category.test if s.sample_id == trained} == {"Part0", "Part1", "Part2"}
    contents = [{Path(s.path).read_bytes() for s in part} for part in (category.train, category.test)]
    assert contents[0].isdisjoint(contents[1])


def test_doubles_among_the_training_images_stay_there(root, places):
    first, second = sorted(train_items())[:2]
    shutil.copy(root / first / "Part0.jpg", root / second / "Part0.jpg")
    assert len(open_kolektor(root, places).category("kolektor_sdd").train) == 14


def test_totals_are_notes_and_do_not_refuse_a_part_of_the_data(root, places):
    dataset = open_kolektor(root, places)
    told = [problem.what for problem in dataset.check(decode=True)]
    assert told == [
        "10 items where 50 are published",
        "20 normal images, trained on and tested, where 347 are published",
        "test/defective: 10 images where 52 are published",
    ]
    assert len(dataset.category("kolektor_sdd").train) == 14


def test_an_image_without_its_mask_has_no_label_and_is_told(root, places):
    (root / "kos03" / "Part1_label.bmp").unlink()
    save_mask(root / "kos04" / "Part9_label.bmp")
    (root / "kos04" / "Thumbs.db").write_bytes(b"clutter")
    with pytest.raises(AdgridError) as caught:
        open_kolektor(root, places).category("kolektor_sdd")
    assert f"{root}/kos03 has 1 images without a mask" in str(caught.value)
    assert f"{root}/kos04 has 1 masks without an image: Part9_label.bmp" in str(caught.value)


def test_unreadable_masks_and_images_are_told(root, places):
    (root / "kos01" / "Part0_label.bmp").write_bytes(b"")
    (root / "kos02" / "Part0.jpg").unlink()
    (root / "kos02" / "Part0.jpg").symlink_to(root / "gone.jpg")
    with pytest.raises(AdgridError) as caught:
        open_kolektor(root, places).category("kolektor_sdd")
    assert "kos01/Part0_label.bmp: the file has zero bytes" in str(caught.value)
    assert "kos02/Part0.jpg" in str(caught.value)


def test_masks_of_class_ids_mark_defects_too(root, places):
    Image.fromarray(np.eye(10, 12, dtype=np.uint8)).save(root / "kos05" / "Part0_label.bmp")
    category = open_kolektor(root, places).category("kolektor_sdd")
    assert [s.view for s in category.test if s.sample_id == "kos05" and s.label] == ["Part0", "Part2"]


def test_the_root_may_be_the_folder_that_the_archive_unpacks_to_or_is_told(root, places, tmp_path):
    root.rename(tmp_path / "data" / "KolektorSDD")
    assert open_kolektor(tmp_path / "data", places).missing() is None
    low = open_kolektor(tmp_path / "data" / "KolektorSDD" / "kos01", places).missing()
    assert f"too low in the tree: the categories lie in {tmp_path}/data/KolektorSDD" in low
    assert f"too high in the tree: the categories lie in {tmp_path}/data/KolektorSDD" in (
        open_kolektor(tmp_path, places).missing()
    )
    assert "kos01/Part0.jpg exists" in open_kolektor(tmp_path / "no" / "where", places).missing()
    with pytest.raises(AdgridError, match="did you mean 'kolektor_sdd'"):
        open_kolektor(tmp_path / "data", places).category("kolektor")
