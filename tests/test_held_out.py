"""Held-out training images with painted defects: what sweeps are tuned on where no test image may be."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.contracts import AdgridError, DatasetRef
from harness.datasets.held_out import KINDS, paint_defect
from harness.registry import build_dataset
from harness.resolve import open_dataset, read_category


def held_out(places, layout="toy_squares"):
    return open_dataset(DatasetRef(name=f"{layout}-held-out", layout=layout, held_out=True), places)


def test_training_images_are_on_one_side_and_no_test_image_on_any(places):
    source = open_dataset(DatasetRef(name="toy_squares", layout="toy_squares"), places).category("small")
    category = held_out(places).category("small")
    fitted, normal = {s.path for s in category.train}, {s.path for s in category.test if s.label == 0}
    assert not fitted & normal
    assert fitted | normal == {sample.path for sample in source.train}
    assert len(normal) == 2  # a third of 6
    assert len(category.test) == 2 * 2
    assert {sample.path for sample in category.test}.isdisjoint(sample.path for sample in source.test)
    assert len({sample.sample_id for sample in category.test}) == 4
    assert {sample.defect_type for sample in category.test} == {"good", *KINDS[:2]}


def test_a_second_look_paints_nothing_and_gives_the_same_hashes(places):
    first = read_category(held_out(places), "small", None, 0, places.cache_dir)
    painted = [sample.path for sample in first.test if sample.label]
    times = [Path(path).stat().st_mtime_ns for path in painted]
    second = read_category(held_out(places), "small", None, 0, places.cache_dir)
    assert [Path(path).stat().st_mtime_ns for path in painted] == times
    assert (second.images_id, second.truth_id) == (first.images_id, first.truth_id)
    for path in painted:
        Path(path).unlink()
    again = read_category(held_out(places), "small", None, 0, places.cache_dir)
    assert (again.images_id, again.truth_id) == (first.images_id, first.truth_id)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(256, 256), (90, 200), (500, 333)])
def test_only_pixels_of_the_mask_change_much_and_some_do(kind, size):
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([(np.sin(x / 7) + 1) / 2, (np.cos(y / 5) + 1) / 2, np.full(size, 0.4)], axis=2)
    before = np.rint(image * 255).astype(int)
    for seed in range(3):
        after, mask = paint_defect(image, kind, seed)
        assert after.shape == (*size, 3)
        assert mask.shape == size
        assert 1e-4 * mask.size <= mask.sum() < 0.4 * mask.size
        changed = np.abs(after.astype(int) - before).max(axis=2)
        assert changed[mask].max() > 1
        # What lies outside are specks of the change that are too small to be drawn.
        assert (changed[~mask] > 1).mean() < 0.01
        assert np.array_equal(paint_defect(image, kind, seed)[0], after)


def test_an_even_image_gets_a_visible_defect_too():
    after, mask = paint_defect(np.full((128, 128, 3), 0.5), "blur", 0)
    assert mask.any()
    assert np.unique(after[mask], axis=0).shape[0] > 1


def test_masks_are_those_of_the_painted_images(places):
    sample = next(s for s in held_out(places).category("large").test if s.label)
    with Image.open(sample.mask_path) as mask, Image.open(sample.path) as image:
        assert set(np.unique(np.asarray(mask))) == {0, 255}
        assert mask.size == image.size


def test_a_category_with_few_images_is_refused(places):
    root = Path(places.data_root) / "parts/nut"
    for split in ("train/good", "test/good", "test/dent"):
        (root / split).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (32, 32), (index, 0, 0)).save(root / split / f"{index}.png")
    dataset = build_dataset(
        DatasetRef(name="parts-held-out", layout="folder", root=str(root.parent), held_out=True), places
    )
    with pytest.raises(AdgridError, match="3 training images are too few"):
        dataset.category("nut")
