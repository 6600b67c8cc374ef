"""Magnetic tiles as published: masks beside the pictures, a split by runs of frames."""

import shutil

import pytest
from trees import save_image, save_mask

from harness.contracts import AdgridError, Places, derive_seed
from harness.datasets.folder import DATASET as FOLDER
from harness.datasets.magnetic_tile import DATASET, DEFECT_TYPES, EMPTY_MASKS, draw_training_pictures


def name(frame, exposure=1):
    return f"exp{exposure}_num_{frame}.jpg"


def make_tree(root):
    """Ten normal tiles in two exposures each, the last one in a run with a crack; one picture of each other defect."""
    for tile in range(10):
        for exposure in (1, 2):
            picture = root / "MT_Free" / "Imgs" / name(1000 * tile + 20 * exposure, exposure)
            save_image(picture)
            save_mask(picture.with_suffix(".png"), value=0)
    for number, kind in enumerate(DEFECT_TYPES):
        frame = 9100 if kind == "crack" else 20_000 + 1000 * number
        picture = root / f"MT_{kind.capitalize()}" / "Imgs" / name(frame)
        save_image(picture)
        save_mask(picture.with_suffix(".png"))
    return root


def open_tiles(root, dataset_name="magnetic_tile"):
    return DATASET(dataset_name, str(root), Places(cache_dir="unused"))


def test_pictures_and_masks_lie_in_one_folder_and_normal_masks_are_not_read(tmp_path):
    make_tree(tmp_path)
    dataset = open_tiles(tmp_path)
    assert dataset.missing() is None
    assert dataset.category_names() == ("magnetic_tile",)
    category = dataset.category("magnetic_tile")
    assert category.has_masks
    anomalous = [s for s in category.test if s.label]
    assert [s.defect_type for s in anomalous] == sorted(DEFECT_TYPES)
    assert anomalous[0].path == f"{tmp_path}/MT_Blowhole/Imgs/exp1_num_20000.jpg"
    assert anomalous[0].mask_path == f"{tmp_path}/MT_Blowhole/Imgs/exp1_num_20000.png"
    normal = [s for s in category.train + category.test if not s.label]
    assert len(normal) == 20
    assert {(s.defect_type, s.mask_path) for s in normal} == {("good", None)}
    assert category.train[0].sample_id.startswith("MT_Free/Imgs/exp")
    for part in (category.train, category.test):
        assert list(part) == sorted(part, key=lambda sample: sample.path)


def test_a_tile_is_never_on_both_sides_and_not_trained_on_beside_its_defect(tmp_path):
    category = open_tiles(make_tree(tmp_path)).category("magnetic_tile")

    def tiles(samples):
        return {int(s.path.rpartition("_")[2].split(".")[0]) // 1000 for s in samples if not s.label}

    assert len(category.train) == 14
    assert tiles(category.train).isdisjoint(tiles(category.test))
    assert 9 in tiles(category.test)  # 60 frames before the crack
    ranked = sorted(range(9), key=lambda tile: derive_seed("magnetic_tile", "split", name(1000 * tile + 20)))
    assert tiles(category.train) == set(ranked[:7])


def test_frames_are_a_run_up_to_the_gap():
    near, far = [name(0), name(100)], [name(0), name(101)]
    assert draw_training_pictures(near, []) == set(near)
    assert len(draw_training_pictures(far, [])) == 2  # one run of one picture is less than the share
    assert draw_training_pictures(near, [name(200)]) == set()
    assert draw_training_pictures(near, [name(201)]) == set(near)


def test_pictures_without_a_frame_number_are_runs_of_their_own():
    names = [f"tile {number}.jpg" for number in range(10)]
    assert len(draw_training_pictures(names, ["crack.jpg"])) == 7


def test_the_split_does_not_depend_on_the_place(tmp_path):
    make_tree(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "c")
    first, second = (open_tiles(root).category("magnetic_tile") for root in (tmp_path / "a", tmp_path / "b" / "c"))
    assert [s.sample_id for s in first.train] == [s.sample_id for s in second.train]


def test_published_counts_are_compared(tmp_path):
    told = {problem.what for problem in open_tiles(make_tree(tmp_path)).check()}
    assert told == {
        "train: 14 images where 669 are published",
        "test, normal: 6 images where 283 are published",
        "test/blowhole: 1 images where 115 are published",
        "test/break: 1 images where 85 are published",
        "test/crack: 1 images where 57 are published",
        "test/fray: 1 images where 32 are published",
        "test/uneven: 1 images where 103 are published",
    }


def test_only_masks_that_are_published_empty_may_be_empty(tmp_path):
    make_tree(tmp_path)
    for mask in (tmp_path / EMPTY_MASKS[0], tmp_path / "MT_Fray" / "Imgs" / "exp1_num_7.png"):
        save_image(mask.with_suffix(".jpg"))
        save_mask(mask, value=0)
    told = [problem.what for problem in open_tiles(tmp_path).check(decode=True) if "marks no pixel" in problem.what]
    assert told == [f"the mask {tmp_path}/MT_Fray/Imgs/exp1_num_7.png of an anomalous image marks no pixel"]
    (empty,) = [
        s for s in open_tiles(tmp_path).category("magnetic_tile").test if s.mask_path == f"{tmp_path}/{EMPTY_MASKS[0]}"
    ]
    assert (empty.label, empty.defect_type) == (1, "uneven")


def test_missing_masks_and_missing_normal_pictures_are_told(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "MT_Fray" / "Imgs" / "exp1_num_23000.png").unlink()
    shutil.rmtree(tmp_path / "MT_Free")
    with pytest.raises(AdgridError) as caught:
        open_tiles(tmp_path).category("magnetic_tile")
    assert f"1 anomalous images in {tmp_path}/MT_Fray/Imgs have no mask" in str(caught.value)
    assert f"{tmp_path}/MT_Free/Imgs has no pictures" in str(caught.value)


def test_upper_case_extensions_and_clutter(tmp_path):
    make_tree(tmp_path)
    folder = tmp_path / "MT_Crack" / "Imgs"
    (folder / "exp1_num_9100.jpg").rename(folder / "exp1_num_9100.JPG")
    (folder / "exp1_num_9100.png").rename(folder / "exp1_num_9100.PNG")
    (folder / ".DS_Store").write_bytes(b"clutter")
    (crack,) = [s for s in open_tiles(tmp_path).category("magnetic_tile").test if s.defect_type == "crack"]
    assert crack.mask_path == f"{folder}/exp1_num_9100.PNG"


def test_a_root_one_level_off_is_told_and_that_of_the_repository_found(tmp_path):
    make_tree(tmp_path / "tiles")
    assert f"too high in the tree: the categories lie in {tmp_path}/tiles" in open_tiles(tmp_path).missing()
    for inside in ("MT_Free", "MT_Free/Imgs"):
        assert f"too low in the tree: the categories lie in {tmp_path}/tiles" in (
            open_tiles(tmp_path / "tiles" / inside).missing()
        )
    (tmp_path / "tiles").rename(tmp_path / "Magnetic-tile-defect-datasets.")
    assert open_tiles(tmp_path).missing() is None
    assert "MT_Free/Imgs exists" in open_tiles(tmp_path / "no" / "where").missing()


@pytest.mark.data
def test_the_same_pictures_in_the_folder_layout_keep_their_name(data_root):
    root = data_root / "magnetic_tile"
    dataset = FOLDER("magnetic_tile", str(root), Places(cache_dir="unused"))
    category = dataset.category("magnetic_tile")
    assert (dataset.name, len(category.train), len(category.test)) == ("magnetic_tile", 304, 329)
    assert dataset.check(["magnetic_tile"]) == []
    published = DATASET("magnetic_tile", str(root), Places(cache_dir="unused"))
    assert "add `layout: folder` to the dataset" in published.missing()
