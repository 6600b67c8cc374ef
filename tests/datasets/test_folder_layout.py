"""The MVTec AD layout with every quirk that people's folders have, and what is said when it is broken."""

import os
import shutil
import unicodedata

import pytest
from trees import make_category, save_image, save_mask

from harness.contracts import AdgridError, Places, Preprocessing
from harness.datasets.base import Counts
from harness.datasets.folder import DATASET, Folder
from harness.datasets.images import load_mask, read_image


def open_folder(root, name="mine"):
    return DATASET(name, str(root), Places(cache_dir="unused"))


def broken(root, category="bottle"):
    """What `category()` says; the same complaints must come from `check()`."""
    dataset = open_folder(root)
    with pytest.raises(AdgridError) as caught:
        dataset.category(category)
    told = str(caught.value)
    assert any(problem.what in told and problem.remedy in told for problem in dataset.check([category]))
    assert "'mine'" in told
    return told


def test_a_category_is_listed_with_splits_labels_and_masks(tmp_path):
    make_category(tmp_path)
    dataset = open_folder(tmp_path)
    assert dataset.missing() is None
    assert dataset.category_names() == ("bottle",)
    category = dataset.category("bottle")
    assert [sample.sample_id for sample in category.train] == [f"train/good/00{i}.png" for i in range(3)]
    assert [sample.sample_id for sample in category.test] == [
        "test/crack/000.png",
        "test/crack/001.png",
        "test/good/000.png",
        "test/good/001.png",
    ]
    assert {(sample.split, sample.label, sample.defect_type) for sample in category.train} == {("train", 0, "good")}
    crack, good = category.test[1], category.test[2]
    assert (crack.split, crack.label, crack.defect_type) == ("test", 1, "crack")
    assert crack.path == f"{tmp_path}/bottle/test/crack/001.png"
    assert crack.mask_path == f"{tmp_path}/bottle/ground_truth/crack/001_mask.png"
    assert (good.label, good.defect_type, good.mask_path) == (0, "good", None)
    assert category.has_masks
    assert dataset.check() == []
    assert dataset.check(decode=True) == []


def test_without_a_ground_truth_folder_there_are_no_masks(tmp_path):
    make_category(tmp_path, masks=False)
    category = open_folder(tmp_path).category("bottle")
    assert not category.has_masks
    assert all(sample.mask_path is None for sample in category.test)


def test_masks_are_paired_by_stem_and_never_by_order(tmp_path):
    folder = make_category(tmp_path, masks=False)
    for image in ("002.jpg", "010.BMP", "a b.tif"):
        save_image(folder / "test" / "crack" / image, 50)
    # Sorted, these masks stand in another order than their images: some with `_mask`, all in other formats.
    for mask in ("000_mask.bmp", "001.png", "002_MASK.png", "010.tiff", "a b_mask.png"):
        save_mask(folder / "ground_truth" / "crack" / mask)
    category = open_folder(tmp_path).category("bottle")
    paired = {
        os.path.basename(sample.path): os.path.basename(sample.mask_path) for sample in category.test if sample.label
    }
    assert paired == {
        "000.png": "000_mask.bmp",
        "001.png": "001.png",
        "002.jpg": "002_MASK.png",
        "010.BMP": "010.tiff",
        "a b.tif": "a b_mask.png",
    }


def test_an_image_whose_own_name_ends_in_mask_keeps_its_mask(tmp_path):
    folder = make_category(tmp_path)
    save_image(folder / "test" / "crack" / "face_mask.png")
    save_mask(folder / "ground_truth" / "crack" / "face_mask.png")
    masks = {sample.path: sample.mask_path for sample in open_folder(tmp_path).category("bottle").test}
    assert masks[f"{folder}/test/crack/face_mask.png"] == f"{folder}/ground_truth/crack/face_mask.png"


def test_hidden_files_and_other_files_are_no_images(tmp_path):
    folder = make_category(tmp_path)
    for place in ("train/good", "test/good", "test/crack", "ground_truth/crack"):
        for clutter in (".DS_Store", "Thumbs.db", "._000.png", "desktop.ini", "notes.txt", ".hidden.png"):
            (folder / place / clutter).write_bytes(b"clutter")
    for place in (".ipynb_checkpoints", "test/.cache", "test/__MACOSX"):
        save_image(folder / place / "000.png")
    make_category(tmp_path, ".trash")
    dataset = open_folder(tmp_path)
    assert dataset.category_names() == ("bottle",)
    assert (len(dataset.category("bottle").train), len(dataset.category("bottle").test)) == (3, 4)
    assert dataset.check(decode=True) == []


def test_links_to_folders_and_files_are_followed(tmp_path):
    folder = make_category(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "bottle").symlink_to(folder)
    (folder / "train" / "good" / "link.png").symlink_to(folder / "train" / "good" / "000.png")
    dataset = open_folder(tmp_path / "linked")
    category = dataset.category("bottle")
    assert len(category.train) == 4
    # The user's own path is kept, not the place the link leads to.
    assert category.train[0].path.startswith(f"{tmp_path}/linked/bottle/")
    assert dataset.check() == []


def test_a_link_that_leads_nowhere_is_reported(tmp_path):
    folder = make_category(tmp_path)
    (folder / "train" / "good" / "lost.png").symlink_to(folder / "gone.png")
    (problem,) = open_folder(tmp_path).check()
    assert "lost.png: no such file" in problem.what


def test_spaces_and_accents_in_names(tmp_path):
    # A Mac stores ü as two characters; the mask's name and the search space have it as one.
    two, one = unicodedata.normalize("NFD", "Tür grün"), unicodedata.normalize("NFC", "Tür grün")
    folder = make_category(tmp_path, two)
    save_image(folder / "test" / unicodedata.normalize("NFD", "größer 漢字") / unicodedata.normalize("NFD", "é 1.png"))
    save_mask(folder / "ground_truth" / "größer 漢字" / unicodedata.normalize("NFC", "é 1_mask.png"))
    dataset = open_folder(tmp_path)
    assert dataset.category_names() == (one,)
    for spelling in (one, two):
        category = dataset.category(spelling)
        (sample,) = [sample for sample in category.test if sample.defect_type == "größer 漢字"]
        assert sample.category == category.name == one
        assert sample.sample_id == unicodedata.normalize("NFC", "test/größer 漢字/é 1.png")
        assert load_mask(sample, Preprocessing(image_size=(10, 12))).sum() == 12
        assert read_image(sample.path).size == (12, 10)
    assert dataset.check(decode=True) == []


def test_order_and_sample_ids_do_not_depend_on_where_the_data_lie(tmp_path):
    make_category(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "another place" / "b")
    first, second = (
        open_folder(root).category("bottle") for root in (tmp_path / "a", tmp_path / "another place" / "b")
    )
    assert [s.sample_id for s in first.train + first.test] == [s.sample_id for s in second.train + second.test]


def test_reading_writes_nothing_beside_the_data(tmp_path):
    make_category(tmp_path)
    before = sorted((path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*"))
    dataset = open_folder(tmp_path)
    dataset.prepare()
    dataset.category("bottle")
    dataset.check(decode=True)
    assert sorted((path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_the_default_place_is_a_folder_of_the_datasets_name(tmp_path, places):
    make_category(tmp_path / "data" / "mine")
    assert DATASET("mine", None, places).root == f"{places.data_root}/mine"
    assert DATASET("mine", None, places).category_names() == ("bottle",)


def test_a_relative_root_and_a_home_folder_become_absolute(tmp_path, monkeypatch):
    make_category(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in ("mine", "./mine/", "~/mine", f"file://{tmp_path}/mine"):
        assert open_folder(root).category("bottle").train[0].path == f"{tmp_path}/mine/bottle/train/good/000.png"


def test_missing_data_say_what_to_place_where(tmp_path, places):
    dataset = DATASET("mine", None, places)
    told = dataset.missing()
    assert f"there is no folder {places.data_root}/mine" in told
    assert f"{places.data_root}/mine/<category>/train/good" in told
    assert dataset.category_names() == ()
    with pytest.raises(AdgridError, match="there is no folder"):
        dataset.category("bottle")
    (problem,) = dataset.check()
    assert problem.what in told


def test_without_any_root_the_option_is_named():
    dataset = DATASET("mine", None, Places(cache_dir="unused"))
    assert "--data-root" in dataset.missing()
    assert dataset.category_names() == ()


@pytest.mark.parametrize("inside", ["bottle", "bottle/train", "bottle/train/good", "bottle/test/crack"])
def test_a_root_inside_a_category_is_too_low(tmp_path, inside):
    make_category(tmp_path / "mine")
    told = open_folder(tmp_path / "mine" / inside).missing()
    assert "too low" in told
    assert f"name {tmp_path}/mine as its root, or {tmp_path} as --data-root" in told


@pytest.mark.parametrize("above", ["", "unpacked"])
def test_a_root_above_the_dataset_is_too_high(tmp_path, above):
    make_category(tmp_path / above / "other")
    make_category(tmp_path / above / "some" / "visa")
    make_category(tmp_path / above / "set_b")
    told = open_folder(tmp_path / above, name="set_b").missing()
    assert "too high" in told
    # Several folders hold categories; the one with the dataset's name is meant.
    assert f"name {tmp_path / above / 'set_b'} as its root" in told


def test_a_data_root_one_level_off_is_recognised(tmp_path):
    make_category(tmp_path / "data" / "mine")
    low = DATASET("mine", None, Places(data_root=str(tmp_path / "data" / "mine"), cache_dir="unused")).missing()
    high = DATASET("mine", None, Places(data_root=str(tmp_path), cache_dir="unused")).missing()
    for told, level in ((low, "too low"), (high, "too high")):
        assert level in told
        assert f"name {tmp_path}/data/mine as its root, or {tmp_path}/data as --data-root" in told
    # Another dataset's folder is not offered in its place.
    for place in (tmp_path, tmp_path / "data", tmp_path / "data" / "mine"):
        told = DATASET("visa", None, Places(data_root=str(place), cache_dir="unused")).missing()
        assert told.startswith(f"there is no folder {place}/visa")


def test_a_folder_without_categories_says_what_it_holds(tmp_path):
    save_image(tmp_path / "01" / "train" / "ok" / "0.png")
    told = open_folder(tmp_path).missing()
    assert "looked for <category>/train/good; its folders are 01" in told


def test_an_unknown_category_is_answered_with_the_nearest(tmp_path):
    make_category(tmp_path, "bottle")
    make_category(tmp_path, "Cable")
    dataset = open_folder(tmp_path)
    for wrong, right in (("botle", "bottle"), ("cable", "Cable")):
        with pytest.raises(AdgridError, match=f"'{wrong}'.*did you mean '{right}'.*Found: Cable, bottle"):
            dataset.category(wrong)
        (problem,) = dataset.check([wrong])
        assert problem.category == wrong


def test_missing_masks_are_counted_and_the_first_few_named(tmp_path):
    folder = make_category(tmp_path)
    for number in range(2, 9):
        save_image(folder / "test" / "crack" / f"{number:03d}.png")
    told = broken(tmp_path)
    assert "7 anomalous images" in told
    assert "002.png, 003.png, 004.png, 005.png, 006.png and 2 more" in told
    assert f"{folder}/ground_truth/crack" in told


def test_a_defect_type_without_any_mask_is_reported(tmp_path):
    folder = make_category(tmp_path)
    save_image(folder / "test" / "hole" / "000.png")
    assert "1 anomalous images" in broken(tmp_path)


def test_masks_without_images_are_reported(tmp_path):
    folder = make_category(tmp_path)
    save_mask(folder / "ground_truth" / "crack" / "007_mask.png")
    assert "1 masks" in (told := broken(tmp_path))
    assert "007_mask.png" in told
    (folder / "ground_truth" / "crack" / "007_mask.png").unlink()
    save_mask(folder / "ground_truth" / "hole" / "000_mask.png")
    assert f"{folder}/ground_truth/hole belong to no image" in broken(tmp_path)


def test_two_masks_or_two_images_of_one_stem_are_reported(tmp_path):
    folder = make_category(tmp_path)
    save_mask(folder / "ground_truth" / "crack" / "000.png")
    assert "not one to one: 000.png" in broken(tmp_path)
    (folder / "ground_truth" / "crack" / "000.png").unlink()
    save_image(folder / "test" / "crack" / "001.jpg")
    assert "001.jpg, 001.png" in broken(tmp_path)


def test_masks_of_good_images_are_not_read(tmp_path):
    folder = make_category(tmp_path)
    save_mask(folder / "ground_truth" / "good" / "000_mask.png", value=0)
    category = open_folder(tmp_path).category("bottle")
    assert all(sample.mask_path is None for sample in category.test if sample.label == 0)


def test_empty_folders_are_reported_with_what_they_hold(tmp_path):
    folder = make_category(tmp_path)
    for image in (folder / "train" / "good").iterdir():
        image.unlink()
    (folder / "test" / "hole" / "rgb").mkdir(parents=True)
    told = broken(tmp_path)
    assert f"{folder}/train/good has no training images (it is empty or missing)" in told
    assert f"{folder}/test/hole has no test images (it holds rgb)" in told
    shutil.rmtree(folder / "test")
    assert f"{folder}/test has no test images" in broken(tmp_path)


def test_a_long_list_of_problems_is_cut_in_the_error_but_not_in_the_check(tmp_path):
    folder = make_category(tmp_path)
    for number in range(6):
        (folder / "test" / f"hole{number}").mkdir()
    assert "and 3 more problems" in broken(tmp_path)
    assert len([p for p in open_folder(tmp_path).check() if "hole" in p.what]) == 6


def test_a_test_set_of_one_class_is_reported_by_the_check_alone(tmp_path):
    folder = make_category(tmp_path)
    shutil.rmtree(folder / "test" / "good")
    dataset = open_folder(tmp_path)
    assert len(dataset.category("bottle").test) == 2
    (problem,) = dataset.check()
    assert "all 2 test images are anomalous" in problem.what


def test_unreadable_files_and_masks_of_another_size_are_found(tmp_path):
    folder = make_category(tmp_path)
    (folder / "train" / "good" / "001.png").write_bytes(b"")
    whole = (folder / "test" / "good" / "001.png").read_bytes()
    (folder / "test" / "good" / "001.png").write_bytes(whole[:45])  # the header and the beginning of the pixels
    save_mask(folder / "ground_truth" / "crack" / "000_mask.png", size=(11, 10))
    save_mask(folder / "ground_truth" / "crack" / "001_mask.png", value=0)
    dataset = open_folder(tmp_path)
    by_header = dataset.check()
    assert [problem.what.split(": ")[-1] for problem in by_header if "cannot read" in problem.what] == [
        "the file has zero bytes"
    ]
    assert any("000_mask.png is 10 x 11" in problem.what for problem in by_header)
    assert len(by_header) == 2
    by_pixel = dataset.check(decode=True)
    assert len(by_pixel) == 4
    assert any("good/001.png" in problem.what for problem in by_pixel)
    assert any("001_mask.png of an anomalous image marks no pixel" in problem.what for problem in by_pixel)
    assert all(problem.category == "bottle" and problem.remedy for problem in by_pixel)


def test_only_the_requested_categories_are_checked(tmp_path):
    make_category(tmp_path, "bottle")
    shutil.rmtree(make_category(tmp_path, "cable") / "test")
    dataset = open_folder(tmp_path)
    assert dataset.check(["bottle"]) == []
    assert {problem.category for problem in dataset.check()} == {"cable"}


def test_published_counts_are_data_of_a_derived_layout(tmp_path):
    class Products(Folder):
        normal_folder = "ok"
        tree = "<category>/train/ok"
        expected = {
            "01": Counts(train=3, good=2, defects={"ko": 2, "bad": 1}),
            "02": Counts(train=1, good=1, defects={"ko": 1}),
        }

    for image in (
        "train/ok/0.bmp",
        "train/ok/1.png",
        "test/ok/0.bmp",
        "test/ok/1.bmp",
        "test/ko/5.bmp",
        "test/ko/6.bmp",
    ):
        save_image(tmp_path / "01" / image)
    save_image(tmp_path / "01" / "test" / "extra" / "1.png")
    dataset = Products("products", str(tmp_path), Places(cache_dir="unused"))
    category = dataset.category("01")
    assert {sample.defect_type for sample in category.test} == {"good", "ko", "extra"}
    problems = {problem.what: problem.remedy for problem in dataset.check(["01"])}
    assert set(problems) == {
        "train: 2 images where 3 are published",
        "test/bad: 0 images where 1 are published",
        "test/extra: 1 images where 0 are published",
    }
    assert "extra" in problems["test/extra: 1 images where 0 are published"]
    # A published category that is not there is missed where all are asked for.
    assert [problem.category for problem in dataset.check()] == ["01", "01", "01", "02"]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "category", "train", "good", "defects", "has_masks"),
    [
        ("mvtec_ad", "bottle", 209, 20, {"broken_large": 20, "broken_small": 22, "contamination": 21}, True),
        ("mpdd", "metal_plate", 54, 26, {"major_rust": 14, "scratches": 34, "total_rust": 23}, True),
        (
            "magnetic_tile",
            "magnetic_tile",
            304,
            105,
            {"blowhole": 48, "break": 48, "crack": 51, "fray": 32, "uneven": 45},
            True,
        ),
        ("elpv", "mono", 150, 60, {"defective": 80}, False),
        ("elpv", "poly", 150, 60, {"defective": 80}, False),
    ],
)
def test_real_categories_have_their_published_counts(data_root, name, category, train, good, defects, has_masks):
    class Published(Folder):
        expected = {category: Counts(train=train, good=good, defects=defects)}

    dataset = Published(name, None, Places(data_root=str(data_root), cache_dir="unused"))
    assert category in dataset.category_names()
    assert dataset.check([category], decode=True) == []
    listing = dataset.category(category)
    assert listing.has_masks == has_masks
    assert all((sample.mask_path is not None) == (has_masks and sample.label == 1) for sample in listing.test)
