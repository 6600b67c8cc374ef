"""VisA: the published tree with its lists, the trees that its authors' script makes of them, and broken lists."""

import csv
import shutil

import fsspec
import numpy as np
import pytest
from PIL import Image
from published_trees import build_visa_1cls, build_visa_2cls, build_visa_raw
from trees import save_image

from harness.contracts import AdgridError, Places
from harness.datasets.images import read_mask
from harness.datasets.visa import COUNTS, DATASET

NAME = "pcb1"
IMAGES = f"{NAME}/Data/Images"


@pytest.fixture
def root(tmp_path):
    return build_visa_raw(tmp_path / "visa", [NAME])


def open_visa(root, variant=None):
    return DATASET("visa", str(root), Places(cache_dir="unused"), variant)


def list_samples(dataset):
    category = dataset.category(NAME)
    return [(s.sample_id, s.split, s.label, s.defect_type) for s in (*category.train, *category.test)]


def read_list(root, variant):
    with (root / "split_csv" / f"{variant}.csv").open() as file:
        return list(csv.DictReader(file))


def prepare(root, target, variant):
    """What the authors' prepare_data.py does with one list, in a few lines."""
    for row in read_list(root, variant):
        label = "good" if row["label"] == "normal" else "bad"
        image = target / row["object"] / row["split"] / label / row["image"].split("/")[-1]
        image.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / row["image"], image)
        if label == "bad":
            truth = target / row["object"] / "ground_truth" / ("" if variant == "1cls" else row["split"]) / label
            truth.mkdir(parents=True, exist_ok=True)
            mask = np.asarray(Image.open(root / row["mask"]))
            Image.fromarray(np.where(mask != 0, 255, 0).astype(np.uint8)).save(truth / row["mask"].split("/")[-1])
    return target


def test_masks_with_small_ids_look_black_and_mark_defects(root):
    samples = [sample for sample in open_visa(root).category(NAME).test if sample.label == 1]
    ids = [np.asarray(Image.open(sample.mask_path)).max() for sample in samples]
    assert ids == [1, 2, 3, 1]
    assert [read_mask(sample.mask_path).sum() for sample in samples] == [12] * 4
    assert all(sample.path.endswith(".JPG") for sample in samples)


@pytest.mark.parametrize("variant", list(DATASET.variants))
def test_the_published_and_the_prepared_tree_hold_the_same_samples(root, tmp_path, variant):
    prepared = open_visa(prepare(root, tmp_path / "VisA_pytorch" / variant, variant), variant)
    raw = open_visa(root, variant)
    assert raw.category_names() == prepared.category_names() == (NAME,)
    assert list_samples(raw) == list_samples(prepared)
    for ours, theirs in zip(raw.category(NAME).test, prepared.category(NAME).test, strict=True):
        assert (ours.mask_path is None) == (theirs.mask_path is None) == (ours.label == 0)
        if ours.mask_path:
            np.testing.assert_array_equal(read_mask(ours.mask_path), read_mask(theirs.mask_path))


def test_anomalous_training_images_of_a_2cls_list_are_left_out(root):
    listed = read_list(root, "2cls_highshot")
    left_out = {row["image"].split("/")[-1] for row in listed if (row["split"], row["label"]) == ("train", "anomaly")}
    assert left_out == {"002.JPG", "003.JPG"}
    category = open_visa(root, "2cls_highshot").category(NAME)
    assert {sample.label for sample in category.train} == {0}
    names = {s.path.rpartition("/")[2] for s in (*category.train, *category.test) if s.label == 1}
    assert names == {"000.JPG", "001.JPG"}
    # They are named by the list all the same, so they are not extra.
    problems = open_visa(root, "2cls_highshot").check([NAME])
    assert all("are published" in problem.what for problem in problems)


def test_without_a_variant_the_split_is_that_of_anomaly_detection(root):
    assert list_samples(open_visa(root)) == list_samples(open_visa(root, "1cls"))


@pytest.mark.parametrize("variant", ["2cls_highshot", "2cls_fewshot"])
def test_full_trees_of_the_other_lists_have_the_published_counts(tmp_path, variant):
    dataset = open_visa(build_visa_raw(tmp_path, ["pcb1", "capsules"], full=True), variant)
    assert dataset.check(["pcb1", "capsules"]) == []


def test_a_prepared_tree_needs_no_lists(tmp_path):
    dataset = open_visa(build_visa_1cls(tmp_path, [NAME]))
    assert dataset.missing() is None
    assert not (tmp_path / "split_csv").exists()
    sample = dataset.category(NAME).test[0]
    assert sample.mask_path == f"{tmp_path}/{NAME}/ground_truth/bad/000.png"


def test_the_folder_of_prepared_trees_is_read_by_variant(tmp_path):
    build_visa_1cls(tmp_path / "VisA_pytorch" / "1cls", [NAME])
    build_visa_2cls(tmp_path / "VisA_pytorch" / "2cls_fewshot", "2cls_fewshot", [NAME])
    for root in (tmp_path, tmp_path / "VisA_pytorch"):
        for variant in ("1cls", "2cls_fewshot"):
            dataset = open_visa(root, variant)
            assert dataset.root == f"{tmp_path}/VisA_pytorch/{variant}"
            assert dataset.category(NAME).has_masks
            assert all(problem.what.endswith("are published") for problem in dataset.check([NAME]))


@pytest.mark.parametrize(
    ("made_for", "variant"),
    [("1cls", "2cls_fewshot"), ("2cls_fewshot", "1cls"), ("2cls_fewshot", "2cls_highshot")],
)
def test_a_tree_prepared_for_another_split_is_refused(tmp_path, made_for, variant):
    tree = tmp_path / made_for
    if made_for == "1cls":
        build_visa_1cls(tree, [NAME])
    else:
        build_visa_2cls(tree, made_for, [NAME])
    with pytest.raises(
        AdgridError, match=f"prepared for another split than variant '{variant}'.*--split-type {variant}"
    ):
        open_visa(tree, variant).category(NAME)
    assert open_visa(tree, made_for).category(NAME).train


@pytest.mark.parametrize("folder", ["split_csv", f"{NAME}/Data/Masks/Anomaly"])
def test_a_root_beside_or_below_the_categories_is_too_low(root, folder):
    told = open_visa(root / folder).missing()
    assert f"too low in the tree: the categories lie in {root}" in told


def rewrite(root, change):
    path = root / "split_csv" / "1cls.csv"
    path.write_bytes(change(path.read_bytes().decode()).encode())
    return path


def reorder(text):
    rows = [line.split(",") for line in text.split()]
    return "\n".join(", ".join([row[4], row[2], "x", row[0], row[3], row[1]]) for row in rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\r\n", "\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\r\n", "\r\n\r\n"),
        lambda text: text.replace(f"{NAME}/Data", f"./{NAME}/Data"),
        lambda text: text.replace("/", "\\"),
        lambda text: text.replace("normal", "Normal").replace("train", "TRAIN").replace("object", " Object"),
        reorder,
    ],
    ids=["unix lines", "byte order mark", "blank lines", "dot paths", "backslashes", "case", "other columns"],
)
def test_lists_that_an_editor_has_touched_are_read_all_the_same(root, change):
    before = list_samples(open_visa(root))
    rewrite(root, change)
    assert list_samples(open_visa(root)) == before


def test_a_copy_with_names_in_lower_case_is_found(root):
    before = list_samples(open_visa(root))
    for image in list((root / IMAGES).rglob("*.JPG")):
        image.rename(image.with_suffix(".jpg"))
    dataset = open_visa(root)
    assert list_samples(dataset) == before
    assert dataset.category(NAME).train[0].path == f"{root}/{IMAGES}/Normal/0000.jpg"
    assert all("are published" in problem.what for problem in dataset.check([NAME]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace("object,", "category,"), "has no column object (its first line is 'category,split"),
        (lambda text: text.replace(",", ";"), "has no column object, split, label, image, mask"),
        (lambda text: "", "has no column"),
        (lambda text: text.replace("test,normal", "val,normal", 1), "line 5: split must be train or test"),
        (lambda text: text.replace("train,normal", "train,good", 1), "line 2: split must be train or test and label"),
        (lambda text: text.replace("test,normal", "test,anomaly", 1), "line 5: the object, the image, or the mask"),
        (lambda text: text.replace("0001.JPG", "0000.JPG"), f"line 3: {IMAGES}/Normal/0000.JPG is also in line 2"),
        (lambda text: text.replace(f"{NAME}/Data", "../other", 1), "line 2: ../other/Images/Normal/0000.JPG leads out"),
        (lambda text: text.replace(f"{NAME}/Data", "/etc", 1), "line 2: /etc/Images/Normal/0000.JPG leads out"),
        (lambda text: text.replace(f"{NAME}/Data", "s3://bucket", 1), "leads out of the dataset"),
        (lambda text: text + '"' + "x" * 200_000, "cannot read the list"),
    ],
)
def test_a_broken_list_is_refused_with_the_place_and_the_remedy(root, change, told):
    path = rewrite(root, change)
    dataset = open_visa(root)
    message = dataset.missing()
    assert str(path) in message
    assert told in message
    assert "copy split_csv again from https://github.com/amazon-science/spot-diff" in message
    (problem,) = dataset.check()
    assert problem.what in message
    with pytest.raises(AdgridError, match=r"1cls\.csv"):
        dataset.category(NAME)


def test_a_missing_list_is_told_before_anything_runs(root):
    (root / "split_csv" / "1cls.csv").unlink()
    assert f"the list {root}/split_csv/1cls.csv is missing; copy split_csv again" in open_visa(root).missing()
    assert open_visa(root, "2cls_fewshot").missing() is None
    (root / "split_csv" / "1cls.csv").write_bytes(b"\xff\xfe\x00binary")
    assert "cannot read the list" in open_visa(root).missing()


def test_listed_files_that_are_not_there_are_counted_and_named(root):
    (root / IMAGES / "Normal" / "0001.JPG").unlink()
    (root / NAME / "Data" / "Masks" / "Anomaly" / "003.png").unlink()
    with pytest.raises(AdgridError, match=rf"2 files that .*1cls\.csv names.*{NAME}/Data/Masks/Anomaly/003\.png"):
        open_visa(root).category(NAME)
    told = " ".join(problem.what for problem in open_visa(root).check([NAME]))
    assert f"{IMAGES}/Normal/0001.JPG, {NAME}/Data/Masks/Anomaly/003.png" in told


def test_files_that_no_list_names_are_told_by_the_check_and_not_used(root):
    before = list_samples(open_visa(root))
    save_image(root / IMAGES / "Anomaly" / "999.JPG")
    dataset = open_visa(root)
    assert list_samples(dataset) == before
    (problem,) = [problem for problem in dataset.check([NAME]) if "are published" not in problem.what]
    assert f"1 files are not named in {root}/split_csv/1cls.csv and not used" in problem.what
    assert f"{IMAGES}/Anomaly/999.JPG" in problem.what


def test_a_category_that_the_list_does_not_know_is_refused(root):
    save_image(root / "pcb9" / "Data" / "Images" / "Normal" / "0000.JPG")
    with pytest.raises(AdgridError, match=r"1cls\.csv names no image of category 'pcb9'"):
        open_visa(root).category("pcb9")
    assert open_visa(root).category(NAME).train


def test_the_published_tree_is_read_at_an_address(root):
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/visa_bucket/visa", recursive=True)
    far = DATASET("visa", None, Places(data_root="memory://visa_bucket", cache_dir="unused"))
    assert far.missing() is None
    assert list_samples(far) == list_samples(open_visa(root))
    sample = far.category(NAME).test[0]
    assert sample.path.startswith("memory://visa_bucket/visa/pcb1/Data/Images/")
    assert read_mask(sample.mask_path).sum() == 12


@pytest.mark.data
@pytest.mark.parametrize("variant", list(DATASET.variants))
def test_the_real_lists_hold_the_published_counts(data_root, tmp_path, variant):
    (tmp_path / "split_csv").mkdir()
    shutil.copy(data_root / "visa_split_csv" / f"{variant}.csv", tmp_path / "split_csv")
    rows = read_list(tmp_path, variant)
    assert len(rows) == 10_821
    source = tmp_path / "first.png"
    save_image(source)
    for row in rows:
        for path in filter(None, (row["image"], row["mask"])):
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(source)
    dataset = open_visa(tmp_path, variant)
    assert dataset.check() == []
    paths = [s.path for name in dataset.category_names() for c in [dataset.category(name)] for s in (*c.train, *c.test)]
    left_out = sum((row["split"], row["label"]) == ("train", "anomaly") for row in rows)
    assert len(paths) == len(set(paths)) == 10_821 - left_out
    assert left_out == 12 * (100 - next(iter(COUNTS[variant].values())).defects["bad"])
