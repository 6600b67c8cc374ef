"""The solar cells of the package elpv-dataset, or of any folder with its files."""

import importlib.util
import shutil

import numpy as np
import pytest
from trees import save_image

from harness.contracts import AdgridError, Places, Preprocessing
from harness.datasets.elpv import DATASET
from harness.datasets.images import load_image

ROWS = [("cell1.png", "0.0", "mono"), ("cell2.png", "1.0", "mono"), ("cell3.png", "0.3333333333333333", "mono")]
ROWS += [(f"cell{number}.png", "0.0", "mono") for number in range(4, 13)]
ROWS += [("cell13.png", "0.6666666666666666", "poly"), ("cell14.png", "1.0", "poly"), ("cell15.png", "0.0", "poly")]


@pytest.fixture
def small(tmp_path):
    """A folder like the package's with 10 normal mono cells."""
    for name, _, _ in ROWS:
        save_image(tmp_path / "elpv" / "images" / name)
    lines = [f"images/{name}  {grade}   {kind}\n" for name, grade, kind in ROWS]
    (tmp_path / "elpv" / "labels.csv").write_text("".join(lines))
    return tmp_path / "elpv"


def open_elpv(root=None):
    return DATASET("elpv", None if root is None else str(root), Places(cache_dir="unused"))


def test_probability_zero_is_normal_one_anomalous_and_the_rest_left_out(small):
    dataset = open_elpv(small)
    assert dataset.missing() is None
    assert dataset.category_names() == ("mono", "poly")
    mono = dataset.category("mono")
    assert (len(mono.train), len(mono.test), mono.has_masks) == (7, 4, False)
    normal = {f"images/{name}" for name, grade, kind in ROWS if kind == "mono" and grade == "0.0"}
    assert {sample.sample_id for sample in mono.train + mono.test if sample.label == 0} == normal
    assert {sample.sample_id for sample in mono.train} < normal
    (defective,) = [sample for sample in mono.test if sample.label == 1]
    assert (defective.sample_id, defective.defect_type, defective.mask_path) == ("images/cell2.png", "defective", None)
    assert defective.path == f"{small}/images/cell2.png"
    for part in (mono.train, mono.test):
        assert list(part) == sorted(part, key=lambda sample: sample.path)
        assert {sample.category for sample in part} == {"mono"}


def test_the_split_depends_on_file_names_alone(small, tmp_path):
    first = open_elpv(small).category("mono")
    shutil.copytree(small, tmp_path / "elsewhere")
    lines = (small / "labels.csv").read_text().splitlines()
    (tmp_path / "elsewhere" / "labels.csv").write_text("\n".join(reversed(lines)))
    second = open_elpv(tmp_path / "elsewhere").category("mono")
    assert [s.sample_id for s in first.train + first.test] == [s.sample_id for s in second.train + second.test]
    assert {s.sample_id for s in first.train} == {f"images/cell{number}.png" for number in (4, 5, 6, 7, 8, 9, 12)}


def test_without_the_package_the_command_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    dataset = open_elpv()
    assert 'pip install "adgrid[quickstart]"' in dataset.missing()
    assert dataset.category_names() == ()
    with pytest.raises(AdgridError, match="not installed"):
        dataset.category("mono")


@pytest.mark.parametrize("labels", [None, "", "images/cell1.png 0.0\n", "images/cell1.png high mono\n"])
def test_a_root_without_readable_labels_is_missing(tmp_path, labels):
    if labels is not None:
        (tmp_path / "labels.csv").write_text(labels)
    assert f"{tmp_path} has no readable labels.csv" in open_elpv(tmp_path).missing()


def test_absent_images_and_unknown_categories_are_errors(small):
    (small / "images" / "cell5.png").unlink()
    with pytest.raises(AdgridError, match=r"1 images that labels\.csv names .*cell5\.png"):
        open_elpv(small).category("mono")
    with pytest.raises(AdgridError, match="did you mean 'poly'"):
        open_elpv(small).category("polly")


@pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="the package elpv-dataset is optional")
def test_the_package_is_whole():
    dataset = open_elpv()
    assert dataset.missing() is None
    assert dataset.check() == []  # counts, files, classes
    mono, poly = dataset.category("mono"), dataset.category("poly")
    assert (len(mono.train), len(mono.test), len(poly.train), len(poly.test)) == (412, 489, 644, 678)
    assert {s.path for s in mono.train}.isdisjoint(s.path for s in mono.test)
    assert not {s.path for s in mono.train + mono.test} & {s.path for s in poly.train + poly.test}
    pixels = load_image(mono.train[0].path, Preprocessing(image_size=(64, 64)))
    np.testing.assert_array_equal(pixels[0], pixels[2])
    assert pixels.std() > 5
