"""The published layouts: every quirk of the real trees, and what is said when something is not as published."""

import shutil

import pytest
from published_trees import BUILDERS, DEFECT_PIXELS, FEW, MVTEC_3D_DEFECTS, build_visa_1cls
from trees import save_image, save_mask

from harness.contracts import AdgridError, DatasetRef, Places, Preprocessing
from harness.datasets.images import load_mask, read_image, read_mask
from harness.registry import build_dataset, dataset_layouts, load_dataset_class

ALL_BUILDERS = [*BUILDERS.items(), ("visa", build_visa_1cls)]
EACH_TREE = pytest.mark.parametrize(
    ("layout", "build"), ALL_BUILDERS, ids=[build.__name__ for _, build in ALL_BUILDERS]
)
EACH_LAYOUT = pytest.mark.parametrize("layout", BUILDERS)
NUM_IMAGES = {
    "mvtec_ad": (15, 3629, 467, 1258),
    "visa": (12, 8659, 962, 1200),
    "btad": (3, 1799, 451, 290),
    "mvtec_3d_ad": (10, 2656, 249, 948),
    "mpdd": (6, 888, 176, 282),
}
"""Categories, training images, normal and anomalous test images, as the papers give them."""
FOLDERS = {  # training images, anomalous test images and their masks in the first category
    "mvtec_ad": ("bottle/train/good", "bottle/test/broken_large", "bottle/ground_truth/broken_large"),
    "visa": ("candle/Data/Images/Normal", "candle/Data/Images/Anomaly", "candle/Data/Masks/Anomaly"),
    "btad": ("01/train/ok", "01/test/ko", "01/ground_truth/ko"),
    "mvtec_3d_ad": ("bagel/train/good/rgb", "bagel/test/hole/rgb", "bagel/test/hole/gt"),
    "mpdd": ("bracket_black/train/good", "bracket_black/test/hole", "bracket_black/ground_truth/hole"),
}


def open_layout(layout, root=None, data_root=None, name=None, variant=None):
    places = Places(data_root=None if data_root is None else str(data_root), cache_dir="unused")
    ref = DatasetRef(name=name or layout, layout=layout, root=None if root is None else str(root), variant=variant)
    return build_dataset(ref, places)


def first_category(layout):
    return FOLDERS[layout][0].split("/")[0]


def list_samples(dataset):
    """(category, sample id, label, type, name of the mask) of every image."""
    return [
        (
            name,
            sample.sample_id,
            sample.label,
            sample.defect_type,
            sample.mask_path and sample.mask_path.rpartition("/")[2],
        )
        for name in dataset.category_names()
        for category in [dataset.category(name)]
        for sample in (*category.train, *category.test)
    ]


@EACH_TREE
def test_a_full_tree_is_as_published(tmp_path, layout, build):
    dataset = open_layout(layout, build(tmp_path, full=True))
    assert dataset.missing() is None
    assert dataset.missing_categories() == ()
    assert dataset.check() == []
    categories = [dataset.category(name) for name in dataset.category_names()]
    labels = [sample.label for category in categories for sample in category.test]
    num_train = sum(len(category.train) for category in categories)
    assert (len(categories), num_train, labels.count(0), labels.count(1)) == NUM_IMAGES[layout]


@EACH_TREE
def test_anomalous_images_have_their_masks_and_normal_ones_none(tmp_path, layout, build):
    dataset = open_layout(layout, build(tmp_path))
    assert dataset.category_names() == tuple(sorted(dataset.expected))
    for name in dataset.category_names():
        category = dataset.category(name)
        assert category.has_masks
        assert {(s.split, s.label, s.defect_type, s.mask_path) for s in category.train} == {("train", 0, "good", None)}
        assert len(category.train) == FEW["train"]
        assert sum(sample.label == 0 for sample in category.test) == FEW["good"]
        assert {s.mask_path for s in category.test if s.label == 0} == {None}
        preprocessing = Preprocessing(image_size=(16, 20))
        for sample in category.test:
            assert (sample.defect_type == "good") == (sample.label == 0)
            assert load_mask(sample, preprocessing).sum() == DEFECT_PIXELS * sample.label
    # Nothing but the numbers differs from what is published.
    assert all("are published" in problem.what for problem in dataset.check(decode=True))


@EACH_TREE
def test_defect_types_are_the_folders_names(tmp_path, layout, build):
    dataset = open_layout(layout, build(tmp_path))
    for name, counts in dataset.expected.items():
        kinds = MVTEC_3D_DEFECTS[name] if layout == "mvtec_3d_ad" else counts.defects
        found = {sample.defect_type for sample in dataset.category(name).test if sample.label == 1}
        assert found == set(kinds)


@EACH_TREE
def test_hidden_and_other_files_change_nothing(tmp_path, layout, build):
    dataset = open_layout(layout, build(tmp_path))
    before = list_samples(dataset)
    for folder in [path for path in tmp_path.rglob("*") if path.is_dir()]:
        for clutter in (".DS_Store", "Thumbs.db", "._000.png", "desktop.ini", "readme.txt"):
            (folder / clutter).write_bytes(b"clutter")
    save_image(tmp_path / "__MACOSX" / FOLDERS[layout][0] / "000.png")
    save_image(tmp_path / ".trash" / FOLDERS[layout][0] / "000.png")
    assert list_samples(dataset) == before
    assert all("are published" in problem.what for problem in dataset.check())


@EACH_LAYOUT
def test_masks_belong_to_images_by_stem_and_never_by_order(tmp_path, layout):
    root = BUILDERS[layout](tmp_path, [first_category(layout)])
    images, masks = (sorted((root / folder).iterdir()) for folder in FOLDERS[layout][1:])
    images[0].unlink()
    masks[1].unlink()  # as many masks as images are left, and none fits
    dataset = open_layout(layout, root)
    with pytest.raises(AdgridError) as caught:
        dataset.category(first_category(layout))
    assert masks[1].name in str(caught.value) or images[1].name in str(caught.value)
    told = " ".join(problem.what for problem in dataset.check([first_category(layout)]))
    assert masks[0].name in told or images[0].name in told


@EACH_LAYOUT
def test_missing_and_extra_images_are_counted_against_the_published_numbers(tmp_path, layout):
    root, name = BUILDERS[layout](tmp_path, [first_category(layout)], full=True), first_category(layout)
    train, test, masks = (sorted((root / folder).iterdir()) for folder in FOLDERS[layout])
    dataset = open_layout(layout, root)
    shutil.copy(train[0], train[0].with_name(f"extra{train[0].suffix}"))
    test[-1].unlink()
    masks[-1].unlink()
    problems = {problem.what: problem.remedy for problem in dataset.check([name])}
    if layout == "visa":  # the list knows the files by name
        listed, data = f"{root}/split_csv/1cls.csv", "candle/Data"
        assert problems == {
            f"2 files that {listed} names are not there: {data}/Images/Anomaly/099.JPG, {data}/Masks/Anomaly/099.png": (
                "unpack VisA_20220922.tar again, or copy these files again"
            ),
            f"1 files are not named in {listed} and not used: {data}/Images/Normal/extra.JPG": (
                "remove those that are extra"
            ),
            "test/bad: 99 images where 100 are published": "copy the missing images again",
        }
        return
    counts = dataset.expected[name]
    kind = "test, anomalous" if counts.defects is None else f"test/{test[0].parent.name}"
    num_anomalous = counts.anomalous if counts.defects is None else counts.defects[test[0].parent.name]
    assert problems == {
        f"train: {counts.train + 1} images where {counts.train} are published": "remove those that are extra",
        f"{kind}: {num_anomalous - 1} images where {num_anomalous} are published": "copy the missing images again",
    }


@EACH_LAYOUT
def test_unreadable_files_and_masks_of_another_size_are_found(tmp_path, layout):
    root, name = BUILDERS[layout](tmp_path, [first_category(layout)]), first_category(layout)
    train, _, masks = (sorted((root / folder).iterdir()) for folder in FOLDERS[layout])
    train[0].write_bytes(b"")
    save_mask(masks[0], size=(9, 8))
    problems = [p.what for p in open_layout(layout, root).check([name]) if "are published" not in p.what]
    assert len(problems) == 2
    assert any(train[0].name in what and "zero bytes" in what for what in problems)
    assert any(masks[0].name in what and "is 8 x 9 pixels" in what for what in problems)


@EACH_LAYOUT
def test_categories_that_are_not_there_are_named_and_the_rest_works(tmp_path, layout):
    categories = sorted(load_dataset_class(layout).expected)
    here, gone = categories[:2], tuple(categories[2:])
    dataset = open_layout(layout, BUILDERS[layout](tmp_path, here))
    assert dataset.missing() is None
    assert dataset.category_names() == tuple(here)
    assert dataset.missing_categories() == gone
    assert len(dataset.category(here[0]).train) == FEW["train"]
    problems = {problem.category: problem for problem in dataset.check() if "are published" not in problem.what}
    assert tuple(sorted(problems)) == gone
    assert f"the published category {gone[0]!r} is not in {tmp_path}" in problems[gone[0]].what
    assert dataset.home_page in problems[gone[0]].remedy
    assert ", ".join(here) in problems[gone[0]].remedy
    with pytest.raises(AdgridError, match=f"the published category '{gone[-1]}' is not in"):
        dataset.category(gone[-1])


@EACH_LAYOUT
def test_where_nothing_is_the_message_says_what_to_get_and_where_to_put_it(tmp_path, layout):
    dataset = open_layout(layout, data_root=tmp_path)
    told = dataset.missing()
    assert told.startswith(f"there is no folder {tmp_path}/{layout}; download ")
    assert dataset.home_page in told
    assert f"so that {tmp_path}/{layout}/{dataset.tree} exists for its {len(dataset.expected)} categories" in told
    assert first_category(layout) in told
    assert dataset.category_names() == ()
    assert dataset.missing_categories() == tuple(sorted(dataset.expected))


@EACH_LAYOUT
def test_the_archives_own_folder_may_stay_below_the_root(tmp_path, layout):
    for folder in open_layout(layout).unpacked:
        root = tmp_path / folder.replace("/", " ") / layout
        BUILDERS[layout](root / folder, [first_category(layout)])
        for dataset in (open_layout(layout, root), open_layout(layout, data_root=root.parent)):
            assert dataset.missing() is None
            assert dataset.root == f"{root}/{folder}"
            assert dataset.category(first_category(layout)).train[0].path.startswith(f"{root}/{folder}/")
    # Categories in the root itself come first.
    BUILDERS[layout](root, [first_category(layout)])
    assert open_layout(layout, root).root == str(root)


@EACH_LAYOUT
def test_an_unpacked_archive_beside_the_default_place_is_pointed_to(tmp_path, layout):
    BUILDERS[layout](tmp_path / "unpacked here", [first_category(layout)])
    told = open_layout(layout, data_root=tmp_path).missing()
    assert f"there is no folder {tmp_path}/{layout}, but the categories lie in {tmp_path}/unpacked here" in told
    assert f"name {tmp_path}/unpacked here as its root, or move it to {tmp_path}/{layout}" in told
    # A dataset of another kind is not offered in its place.
    other = "btad" if layout != "btad" else "mpdd"
    assert open_layout(other, data_root=tmp_path).missing().startswith(f"there is no folder {tmp_path}/{other};")


@EACH_LAYOUT
def test_a_root_inside_a_category_is_too_low(tmp_path, layout):
    BUILDERS[layout](tmp_path / "set", [first_category(layout)])
    for folder in FOLDERS[layout]:
        inside = tmp_path / "set" / folder
        while inside != tmp_path / "set":
            told = open_layout(layout, inside).missing()
            assert f"too low in the tree: the categories lie in {tmp_path}/set" in told
            inside = inside.parent


@EACH_LAYOUT
def test_a_root_above_the_dataset_is_too_high(tmp_path, layout):
    BUILDERS[layout](tmp_path / "data" / "set", [first_category(layout)])
    for root in (tmp_path, tmp_path / "data"):
        told = open_layout(layout, root).missing()
        assert f"too high in the tree: the categories lie in {tmp_path}/data/set" in told


def test_a_published_layout_does_not_take_any_folder_below_its_root_for_its_own(tmp_path):
    save_image(tmp_path / "mine" / "screws" / "train" / "good" / "0.png")
    told = open_layout("mvtec_ad", tmp_path).missing()
    assert told.startswith(f"{tmp_path} has no category (looked for <category>/train/good; its folders are mine)")


@EACH_LAYOUT
def test_licence_home_page_and_citation_are_known(layout):
    dataset = load_dataset_class(layout)
    assert layout in dataset_layouts()
    assert dataset.licence.startswith("CC BY")
    assert dataset.home_page.startswith("https://")
    assert "doi:" in dataset.citation or "arXiv:" in dataset.citation
    assert f"{NUM_IMAGES[layout][1]:,} training" in dataset.summary
    assert f"{sum(NUM_IMAGES[layout][2:]):,} test images" in dataset.summary


def test_grey_categories_of_mvtec_ad_read_as_colour(tmp_path):
    dataset = open_layout("mvtec_ad", BUILDERS["mvtec_ad"](tmp_path, ["grid"]))
    assert read_image(dataset.category("grid").train[0].path).mode == "RGB"


def test_btad_has_ok_and_ko_folders_and_a_format_per_product(tmp_path):
    dataset = open_layout("btad", BUILDERS["btad"](tmp_path))
    formats = {"01": ("bmp", "png"), "02": ("png", "png"), "03": ("bmp", "bmp")}
    for name, (image, mask) in formats.items():
        test = dataset.category(name).test
        assert [(s.label, s.defect_type) for s in test] == [(1, "ko"), (1, "ko"), (0, "good"), (0, "good")]
        for sample in test[:2]:
            stem = sample.path.rpartition("/")[2].split(".")[0]
            assert sample.path == f"{tmp_path}/{name}/test/ko/{stem}.{image}"
            assert sample.mask_path == f"{tmp_path}/{name}/ground_truth/ko/{stem}.{mask}"
    # A copy that was converted in part is noticed: the same picture stands there twice.
    save_image(tmp_path / "01" / "test" / "ko" / "0000.png")
    with pytest.raises(AdgridError, match=r"not one to one: 0000\.bmp, 0000\.png"):
        dataset.category("01")


def test_mvtec_3d_ad_reads_colour_images_alone(tmp_path):
    category = open_layout("mvtec_3d_ad", BUILDERS["mvtec_3d_ad"](tmp_path)).category("bagel")
    assert all("/rgb/" in sample.path for sample in (*category.train, *category.test))
    assert category.test[0].sample_id == "test/combined/000.png"
    assert category.test[0].mask_path == f"{tmp_path}/bagel/test/combined/gt/000.png"
    shutil.rmtree(tmp_path / "bagel" / "test" / "hole" / "rgb")
    with pytest.raises(AdgridError, match=r"hole/rgb has no test images"):
        open_layout("mvtec_3d_ad", tmp_path).category("bagel")


def test_masks_of_good_images_are_zero_and_not_read(tmp_path):
    root = BUILDERS["mvtec_3d_ad"](tmp_path, ["bagel"])
    masks = sorted((root / "bagel" / "test" / "good" / "gt").iterdir())
    assert [read_mask(str(mask)).sum() for mask in masks] == [0, 0]
    masks[0].unlink()
    masks[1].write_bytes(b"broken")
    dataset = open_layout("mvtec_3d_ad", root)
    assert all(sample.mask_path is None for sample in dataset.category("bagel").test if sample.label == 0)
    assert all("are published" in problem.what for problem in dataset.check(["bagel"], decode=True))


def test_validation_images_of_mvtec_3d_ad_are_for_training_where_the_variant_says_so(tmp_path):
    root = BUILDERS["mvtec_3d_ad"](tmp_path, ["bagel"], full=True)
    alone, both = (open_layout("mvtec_3d_ad", root, variant=v) for v in ("train", "train_validation"))
    assert alone.variant == open_layout("mvtec_3d_ad", root).variant
    assert alone.check(["bagel"]) == both.check(["bagel"]) == []
    assert (len(alone.category("bagel").train), len(both.category("bagel").train)) == (244, 266)
    assert set(alone.category("bagel").train) < set(both.category("bagel").train)
    assert {sample.split for sample in both.category("bagel").train} == {"train"}
    assert alone.category("bagel").test == both.category("bagel").test
    assert sum(counts.train for counts in both.published_counts().values()) == 2656 + 294
    shutil.rmtree(root / "bagel" / "validation")
    assert alone.check(["bagel"]) == []
    with pytest.raises(AdgridError, match="validation/good/rgb has no training images"):
        both.category("bagel")


@pytest.mark.data
@pytest.mark.parametrize(("layout", "category"), [("mvtec_ad", "bottle"), ("mpdd", "metal_plate")])
def test_real_categories_are_as_published(data_root, layout, category):
    dataset = open_layout(layout, data_root=data_root)
    assert dataset.check([category], decode=True) == []
    assert {problem.category for problem in dataset.check()} == set(dataset.expected) - {category}
