"""Real-IAD: published lists, several resolutions, five views, and lists that are not to be trusted."""

import json

import pytest
from trees import save_image, save_mask

from harness.contracts import AdgridError, Places
from harness.datasets import real_iad
from harness.datasets.checks import Counts
from harness.datasets.real_iad import CATEGORIES, DATASET, IMAGE_FOLDERS, LIST_FOLDERS

TIME = "20231021120000"


def image_path(sample, view, code=None, category="audiojack"):
    """Path below the category, as published: number of the object, camera, code of the defect or None."""
    kind = "OK" if code is None else f"NG_{code}"
    folder = f"{kind.replace('_', '/')}/S{sample:04d}"
    return f"{folder}/{category}_{sample:04d}_{kind}_C{view}_{TIME}.jpg"


def entry(sample, view, code=None, masked=False, category="audiojack"):
    path = image_path(sample, view, code, category)
    return {
        "category": category,
        "anomaly_class": "OK" if code is None else code,
        "image_path": path,
        "mask_path": path.replace(".jpg", ".png") if masked else None,
    }


def published(category="audiojack"):
    """Two normal objects to train on; a normal one and a scratched one, seen by two cameras of five, to test."""
    train = [entry(sample, view, category=category) for sample in (1, 2) for view in range(1, 6)]
    test = [entry(3, view, category=category) for view in range(1, 6)]
    test += [entry(4, view, "HS", masked=view in (1, 3), category=category) for view in range(1, 6)]
    return {"meta": {"prefix": f"{category}/", "normal_class": "OK"}, "train": train, "test": test}


def write_list(root, content, category="audiojack", variant="multi_view"):
    path = root / LIST_FOLDERS[variant] / f"{category}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def make_tree(root, resolution="realiad_512", category="audiojack"):
    content = published(category)
    for item in content["train"] + content["test"]:
        save_image(root / resolution / category / item["image_path"])
        if item["mask_path"]:
            save_mask(root / resolution / category / item["mask_path"])
    write_list(root, content, category)
    return content


def open_iad(root, variant=None):
    return DATASET("real_iad", str(root), Places(cache_dir="unused"), variant)


def broken(root, content, variant="multi_view"):
    """What is said of a list; the same from `category()` and `check()`, with the file and no traceback."""
    path = write_list(root, content, variant=variant)
    dataset = open_iad(root, variant)
    with pytest.raises(AdgridError) as caught:
        dataset.category("audiojack")
    assert str(path) in str(caught.value)
    problem = dataset.check(["audiojack"])[0]
    assert problem.what in str(caught.value)
    return str(caught.value)


def test_the_multi_view_split_has_samples_views_and_labels(tmp_path):
    make_tree(tmp_path)
    dataset = open_iad(tmp_path)
    assert dataset.missing() is None
    assert (dataset.variant, dataset.category_names()) == ("multi_view", ("audiojack",))
    category = dataset.category("audiojack")
    assert category.has_masks
    assert [(s.sample_id, s.view) for s in category.train] == [
        (f"audiojack_000{sample}_OK", f"C{view}") for sample in (1, 2) for view in range(1, 6)
    ]
    assert {(s.split, s.label, s.defect_type, s.mask_path) for s in category.train} == {("train", 0, "good", None)}
    scratched = [s for s in category.test if s.sample_id == "audiojack_0004_NG_HS"]
    # A camera that does not see the defect shows a normal image of a defective object.
    assert [(s.view, s.label, s.defect_type) for s in scratched] == [
        ("C1", 1, "HS"), ("C2", 0, "good"), ("C3", 1, "HS"), ("C4", 0, "good"), ("C5", 0, "good"),
    ]  # fmt: skip
    assert scratched[0].path == f"{tmp_path}/realiad_512/audiojack/{image_path(4, 1, 'HS')}"
    assert scratched[0].mask_path == scratched[0].path.replace(".jpg", ".png")
    assert scratched[1].mask_path is None
    assert list(category.test) == sorted(category.test, key=lambda sample: sample.path)
    assert len({(s.sample_id, s.view) for s in category.train + category.test}) == 20
    assert dataset.check(["audiojack"], decode=True) == []


def test_a_mask_of_the_normal_class_is_not_read(tmp_path):
    content = make_tree(tmp_path)
    content["test"][0]["mask_path"] = "OK/not/there.png"
    write_list(tmp_path, content)
    first = next(s for s in open_iad(tmp_path).category("audiojack").test if s.sample_id == "audiojack_0003_OK")
    assert (first.label, first.mask_path) == (0, None)


def test_the_single_view_split_reads_its_own_lists(tmp_path):
    content = make_tree(tmp_path)
    only = {part: [item for item in content[part] if "_C1_" in item["image_path"]] for part in ("train", "test")}
    write_list(tmp_path, {**content, **only}, variant="single_view")
    category = open_iad(tmp_path, "single_view").category("audiojack")
    assert {s.view for s in category.train + category.test} == {"C1"}
    assert (len(category.train), len(category.test)) == (2, 2)


def test_a_noisy_split_keeps_the_true_labels_of_its_training_images(tmp_path):
    content = make_tree(tmp_path)
    noise = content["test"].pop(5)
    content["train"].append(noise)
    write_list(tmp_path, content, variant="fuiad_0.4")
    dataset = open_iad(tmp_path, "fuiad_0.4")
    (anomalous,) = [s for s in dataset.category("audiojack").train if s.label]
    assert (anomalous.split, anomalous.defect_type, anomalous.view) == ("train", "HS", "C1")
    assert anomalous.mask_path is not None
    # Where noise is tested as well, that is how the split was published; within one part nothing occurs twice.
    content["test"].append(noise)
    write_list(tmp_path, content, variant="fuiad_0.4")
    assert len(dataset.category("audiojack").test) == 10
    content["train"].append(noise)
    assert "train[11].image_path is that of train[10]" in broken(tmp_path, content, "fuiad_0.4")


@pytest.mark.parametrize("variant", ["multi_view", "single_view", "fuiad_0.0"])
def test_anomalous_training_images_are_refused_in_a_split_without_noise(tmp_path, variant):
    content = make_tree(tmp_path)
    content["train"].append(content["test"].pop(5))
    told = broken(tmp_path, content, variant)
    assert (
        f"1 entries are anomalous training images, which variant {variant!r} has not: train[10].anomaly_class" in told
    )


def test_every_variant_of_the_lists_has_its_folder():
    assert tuple(DATASET.variants) == (*LIST_FOLDERS, "folders")
    assert LIST_FOLDERS["fuiad_0.1"] == "realiad_jsons_fuiad_0.1"
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 30


@pytest.mark.parametrize("resolution", IMAGE_FOLDERS)
def test_every_resolution_is_found_under_the_root_and_as_the_root(tmp_path, resolution):
    make_tree(tmp_path, resolution)
    for root in (tmp_path, tmp_path / resolution):
        category = open_iad(root).category("audiojack")
        assert category.train[0].path.startswith(f"{tmp_path}/{resolution}/audiojack/OK/S0001/")


def test_of_several_resolutions_the_one_of_the_authors_is_read_and_another_by_its_own_root(tmp_path):
    for resolution in ("realiad_256", "realiad_512", "realiad_1024"):
        make_tree(tmp_path, resolution)
    read = [
        open_iad(root).category("audiojack").test[0].path.removeprefix(f"{tmp_path}/").split("/")[0]
        for root in (tmp_path, tmp_path / "realiad_256")
    ]
    assert read == ["realiad_1024", "realiad_256"]


def test_lists_may_lie_in_the_folder_their_archive_unpacks_to(tmp_path):
    content = make_tree(tmp_path)
    (tmp_path / "realiad_jsons").rename(tmp_path / "inner")
    for variant in ("multi_view", "single_view"):
        write_list(tmp_path / "realiad_jsons", content, variant=variant)
        assert len(open_iad(tmp_path, variant).category("audiojack").train) == 10


def test_the_prefix_leads_from_the_images_to_the_category(tmp_path):
    content = make_tree(tmp_path)
    content["meta"]["prefix"] = "./"
    for item in content["train"] + content["test"]:
        item["image_path"] = f"audiojack//{item['image_path']}"
        item["mask_path"] = item["mask_path"] and f"audiojack/{item['mask_path']}"
    write_list(tmp_path, content)
    assert open_iad(tmp_path).check(["audiojack"]) == []
    assert len(open_iad(tmp_path).category("audiojack").test) == 10


def test_only_categories_with_images_and_a_list_are_there_and_the_others_are_named(tmp_path):
    for category in ("audiojack", "zipper"):
        make_tree(tmp_path, category=category)
    write_list(tmp_path, published("mint"), "mint")  # all lists come in one archive, images one by one
    save_image(tmp_path / "realiad_512" / "tape" / image_path(1, 1, category="tape"))
    dataset = open_iad(tmp_path)
    assert dataset.category_names() == ("audiojack", "zipper")
    assert dataset.missing_categories() == tuple(name for name in CATEGORIES if name not in ("audiojack", "zipper"))
    assert {problem.category for problem in dataset.check()} == set(dataset.missing_categories())
    with pytest.raises(AdgridError, match=r"published category 'mint' is not in .*realiad_jsons\.zip"):
        dataset.category("mint")


def test_without_lists_the_folder_for_them_and_the_other_variants_are_named(tmp_path):
    make_tree(tmp_path)
    for root in (tmp_path, tmp_path / "realiad_512"):
        told = open_iad(root, "fuiad_0.2").missing()
        assert f"variant 'fuiad_0.2' in {tmp_path}/realiad_jsons_fuiad_0.2 are missing" in told
        assert "choose another variant: multi_view, single_view" in told
        assert open_iad(root).missing() is None
    write_list(tmp_path, published("mint"), "mint", variant="fuiad_0.2")
    assert "of other categories alone" in open_iad(tmp_path, "fuiad_0.2").missing()


def test_a_missing_or_misplaced_root_is_told(tmp_path):
    assert "ask for access" in (told := open_iad(tmp_path / "nothing").missing())
    assert f"{tmp_path}/nothing/realiad_1024/<category>/OK" in told
    assert "--data-root" in DATASET("real_iad", None, Places(cache_dir="unused")).missing()
    make_tree(tmp_path / "deep")
    assert f"too high in the tree: the categories lie in {tmp_path}/deep/realiad_512" in open_iad(tmp_path).missing()
    low = open_iad(tmp_path / "deep" / "realiad_512" / "audiojack")
    assert f"too low in the tree: the categories lie in {tmp_path}/deep/realiad_512" in low.missing()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "Expecting value"),
        ('{"meta": ', "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[]", "must be an object with meta, train and test, not a list"),
        ("{}", "the field meta is missing or no object"),
        ('{"meta": {"normal_class": "OK"}}', "the field meta.prefix is missing or no text"),
        ('{"meta": {"prefix": "audiojack/", "normal_class": 0}}', "the field meta.normal_class is missing or no text"),
        ('{"meta": {"prefix": "../x", "normal_class": "OK"}}', "the field meta.prefix '../x' leaves the folder"),
        ('{"meta": {"prefix": "a", "normal_class": "OK"}, "test": []}', "the field train is missing or no list"),
        ('{"meta": {"prefix": "a", "normal_class": "OK"}, "train": [], "test": 3}', "the field test is missing"),
    ],
)
def test_a_list_that_is_no_list_names_file_and_field(tmp_path, text, what):
    make_tree(tmp_path)
    told = broken(tmp_path, text)
    assert what in told
    assert "unpack realiad_jsons.zip again" in told


def test_a_list_of_other_bytes_than_text_is_refused(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "realiad_jsons" / "audiojack.json").write_bytes(b"\xff\xfe\x00\x81{")
    with pytest.raises(AdgridError, match=r"cannot use .*audiojack\.json"):
        open_iad(tmp_path).category("audiojack")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda e: e.pop("image_path"), "1 entries lack a field: test[5].image_path"),
        (lambda e: e.pop("mask_path"), "1 entries lack a field: test[5].mask_path"),
        (lambda e: e.update(anomaly_class=None), "have a field that is no text: test[5].anomaly_class"),
        (lambda e: e.update(mask_path=7), "have a field that is no text: test[5].mask_path"),
        (lambda e: e.update(category="mint"), "are of another category: test[5].category 'mint'"),
        (lambda e: e.update(image_path=""), "leave the folder of images: test[5].image_path ''"),
        (lambda e: e.update(image_path="/etc/a_0001_OK_C1_0.jpg"), "leave the folder of images: test[5].image_path"),
        (lambda e: e.update(image_path="../../a_0001_OK_C1_0.jpg"), "leave the folder of images: test[5].image_path"),
        (lambda e: e.update(image_path="OK\\..\\a_0001_OK_C1_0.jpg"), "leave the folder of images: test[5].image"),
        (lambda e: e.update(image_path="OK/\0/a_0001_OK_C1_0.jpg"), "leave the folder of images: test[5].image"),
        (lambda e: e.update(mask_path="OK/../../../secret.png"), "leave the folder of images: test[5].mask_path"),
        (
            lambda e: e.update(image_path="OK/S0001/0001.jpg"),
            "do not name sample and view (..._0001_OK_C1_...): test[5]",
        ),
        (lambda e: e.update(image_path="OK/S0001/a_0001_OK_C6_0.jpg"), "do not name sample and view"),
        (lambda e: e.update(image_path=image_path(4, 2, "HS")), "are listed before: test[6].image_path is that of"),
        (lambda e: e.update(image_path=image_path(1, 1)), "are listed before: test[5].image_path is that of train[0]"),
        (lambda e: e.update(image_path=image_path(9, 1)), "name files that are not there: test[5].image_path /"),
        (lambda e: e.update(mask_path="NG/HS/S0004/gone.png"), "name files that are not there: test[5].mask_path /"),
    ],
)
def test_an_entry_that_cannot_be_used_names_its_place_and_field(tmp_path, change, what):
    content = make_tree(tmp_path)
    change(content["test"][5])
    assert what in broken(tmp_path, content)


def test_entries_that_are_no_objects_are_counted_and_the_first_named(tmp_path):
    content = make_tree(tmp_path)
    content["test"] += [None, "x", [], 1]
    told = broken(tmp_path, content)
    assert "4 entries are no objects: test[10], test[11], test[12] and 1 more" in told


def test_missing_files_are_to_be_copied_and_broken_lists_to_be_unpacked_again(tmp_path):
    content = make_tree(tmp_path)
    content["test"][0].pop("category")
    content["test"][1]["image_path"] = image_path(8, 1)
    write_list(tmp_path, content)
    remedies = [problem.remedy for problem in open_iad(tmp_path).check(["audiojack"])]
    assert remedies == ["unpack realiad_jsons.zip again", "unpack the images of this category again"]


def test_the_folders_are_labelled_training_data_without_a_test_set(tmp_path):
    make_tree(tmp_path)
    folder = tmp_path / "realiad_512" / "audiojack"
    save_image(folder / "OK" / "S0001" / f"audiojack_0007_OK_C5_{TIME}.JPG")  # in no list
    (folder / "OK" / "S0001" / "Thumbs.db").write_bytes(b"clutter")
    (folder / "OK" / "S0001" / "notes.txt").write_text("clutter")
    for root in (tmp_path, tmp_path / "realiad_512"):
        dataset = open_iad(root, "folders")
        category = dataset.category("audiojack")
        assert category.test == ()
        assert (len(category.train), sum(s.label for s in category.train)) == (21, 2)
        views = {s.view: (s.label, s.defect_type) for s in category.train if s.sample_id == "audiojack_0004_NG_HS"}
        bare = (0, "HS")  # counts as normal without its mask, but is no reference
        assert views == {"C1": (1, "HS"), "C2": bare, "C3": (1, "HS"), "C4": bare, "C5": bare}
        assert all(s.defect_type == "good" for s in category.train if "_OK" in s.sample_id)
        assert all((s.mask_path is not None) == bool(s.label) for s in category.train)
        assert {s.split for s in category.train} == {"train"}
        assert dataset.check(["audiojack"], decode=True) == []


def test_the_folders_need_no_lists(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "realiad_jsons" / "audiojack.json").unlink()
    assert open_iad(tmp_path, "folders").missing() is None
    assert open_iad(tmp_path).missing() is not None


def test_stray_masks_nameless_images_and_empty_categories_in_the_folders_are_told(tmp_path):
    make_tree(tmp_path)
    folder = tmp_path / "realiad_512" / "audiojack"
    save_mask(folder / "NG" / "HS" / "S0004" / "lonely.png")
    save_image(folder / "OK" / "S0002" / "IMG_1.jpg")
    (tmp_path / "realiad_512" / "mint" / "OK").mkdir(parents=True)
    stray, empty = (open_iad(tmp_path, "folders").check([name]) for name in ("audiojack", "mint"))
    assert [problem.what.split(",")[0] for problem in stray] == [
        "1 images do not name sample and view (..._0001_OK_C1_...)",
        "1 masks belong to no image",
    ]
    assert [problem.what for problem in empty] == [f"{tmp_path}/realiad_512/mint has no images"]


def test_totals_are_compared_when_all_categories_are_there(tmp_path, monkeypatch):
    for category in CATEGORIES[:2]:
        make_tree(tmp_path, category=category)
    monkeypatch.setattr(real_iad, "CATEGORIES", CATEGORIES[:2])
    monkeypatch.setattr(DATASET, "expected", dict.fromkeys(CATEGORIES[:2], Counts()))
    dataset = open_iad(tmp_path)
    assert [(p.category, p.what) for p in dataset.check()] == [
        ("all categories", "test, anomalous: 4 images where 51329 are published"),
        ("all categories", "test, normal: 16 images where 63256 are published"),
        ("all categories", "train: 20 images where 36465 are published"),
    ]
    assert dataset.check([CATEGORIES[0]]) == []
    (whole,) = open_iad(tmp_path, "folders").check()
    assert whole.what == "train: 40 images where 151050 are published"
