"""What real folders hold, read all the way: listed, hashed, decoded and batched as a cell reads them.

`test_image_reading.py` has single files of every kind, `test_folder_layout.py` what a folder may look like,
`test_dataset_files.py` data at a URI; here are the pitfalls that need the whole way, and the rarest files.
"""

import os
import struct
import zlib

import fsspec
import numpy as np
import pytest
from PIL import Image
from trees import make_category, save_image, save_mask

from harness.contracts import AdgridError, Places, Preprocessing
from harness.datasets import fingerprint
from harness.datasets.files import list_folder, list_images
from harness.datasets.fingerprint import content_hashes
from harness.datasets.folder import Folder
from harness.datasets.images import load_mask, read_image, read_mask, read_size
from harness.feature_store import FeatureStore
from harness.image_split import ImageSplit
from harness.resolve import read_category

AS_STORED = Preprocessing(image_size=(10, 12), interpolation="nearest")
"""The size of the pictures in `trees.py`: nothing is resized."""


def open_folder(root):
    return Folder("mine", str(root), Places(cache_dir="unused"))


def read_sample(folder, name, cache, preprocessing=AS_STORED):
    """(H, W, 3) pixels and (H, W) mask of one cracked image, listed, hashed and decoded as a cell does."""
    data = read_category(open_folder(folder.parent), folder.name, None, 0, str(cache))
    (sample,) = [sample for sample in data.test if sample.path.endswith(f"/crack/{name}")]
    batch = ImageSplit([sample], preprocessing, hashes=data.hashes, store=FeatureStore(str(cache))).take([0])
    return (batch.images[0] * 255).round().byte().numpy().transpose(1, 2, 0), load_mask(sample, preprocessing)


def write_png(path, width, height, bits, colour_type, rows):
    """A PNG by hand: Pillow writes no colour of 16 bits, and no header without its pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def write_deep_png(path, pixels, colour_type):
    """(H, W, channels) pixels of 0..65535 as a PNG with 16 bits per channel."""
    write_png(path, pixels.shape[1], pixels.shape[0], 16, colour_type, [row.astype(">u2").tobytes() for row in pixels])


# --- kinds of files ----------------------------------------------------------------------------------------------

COLOURS = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
GREY = np.repeat(COLOURS[..., :1], 3, axis=2)


def save_kind(name, path):
    """Saves a picture of the named kind; returns the (10, 12, 3) pixels that a backbone should see."""
    if name == "16 bit.png":
        Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 256 + 255).save(path)
        return GREY
    if name == "16 bit colour.png":
        write_deep_png(path, COLOURS.astype(np.uint16) * 256 + 255, colour_type=2)
        return COLOURS
    if name == "grey.TIF":
        Image.fromarray(COLOURS[..., 0]).save(path)
        return GREY
    if name == "palette.PNG":
        flat = Image.fromarray(COLOURS).quantize(16)
        flat.save(path, transparency=3)
        return np.asarray(flat.convert("RGB"))
    if name == "transparent.png":
        Image.fromarray(np.dstack([COLOURS, COLOURS[..., 0]])).save(path)
        return COLOURS
    if name == "a jpeg called.png":
        Image.fromarray(GREY).save(path, format="JPEG", quality=90)
        return np.asarray(Image.open(path).convert("RGB"))
    Image.fromarray(COLOURS).save(path)
    return COLOURS


@pytest.mark.parametrize(
    "name",
    [
        "16 bit.png",
        "16 bit colour.png",
        "grey.TIF",
        "palette.PNG",
        "transparent.png",
        "a jpeg called.png",
        "UPPER.BMP",
        "two.dots.png",
        "#1 100%?.png",
        "größe 漢字.png",
    ],
)
def test_unusual_images_reach_a_method_with_their_pixels_and_masks(tmp_path, name):
    folder = make_category(tmp_path / "mine")
    expected = save_kind(name, folder / "test/crack" / name)
    save_mask(folder / "ground_truth/crack" / f"{os.path.splitext(name)[0]}_mask.png", value=1)
    pixels, mask = read_sample(folder, name, tmp_path / "cache")
    np.testing.assert_array_equal(pixels, expected)
    assert mask.sum() == mask[:3, :4].sum() == 12
    assert open_folder(tmp_path / "mine").check(decode=True) == []


STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation to what a camera does to the upright picture before it stores it."""


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("mask_has_the_tag", [False, True])
def test_a_turned_photograph_and_its_mask_stay_aligned(tmp_path, orientation, mask_has_the_tag):
    # An annotator's mask is drawn upon the picture as one sees it, or turned by the same tag when both come from one
    # program. The defect is off the centre, so that any turn shows.
    upright = np.zeros((16, 24), dtype=np.uint8)
    upright[2:7, 3:14] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(upright).transpose(STORED_AS[orientation])
    folder = make_category(tmp_path / "mine")
    stored.save(folder / "test/crack/turned.png", exif=exif)
    truth = folder / "ground_truth/crack/turned_mask.png"
    if mask_has_the_tag:
        stored.save(truth, exif=exif)
    else:
        Image.fromarray(upright).save(truth)
    for preprocessing in (
        Preprocessing(image_size=(8, 12), interpolation="nearest"),
        Preprocessing(image_size=(6, 6), resize=8, interpolation="nearest"),
    ):
        pixels, mask = read_sample(folder, "turned.png", tmp_path / "cache", preprocessing)
        assert 0 < mask.sum() < mask.size
        np.testing.assert_array_equal(pixels[..., 0] == 255, mask == 1)
    assert open_folder(tmp_path / "mine").check(decode=True) == []


def test_a_mask_drawn_on_the_stored_pixels_of_a_turned_photograph_is_refused(tmp_path):
    folder = make_category(tmp_path / "mine")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (12, 10)).save(folder / "test/crack/turned.png", exif=exif)
    save_mask(folder / "ground_truth/crack/turned_mask.png", size=(12, 10))
    with pytest.raises(AdgridError, match="turned by an EXIF orientation"):
        read_sample(folder, "turned.png", tmp_path / "cache")


def test_a_jpeg_mask_counts_from_128_whatever_its_extension(tmp_path):
    truth = np.zeros((32, 48), dtype=np.uint8)
    truth[5:20, 7:30] = 1
    folder = make_category(tmp_path / "mine")
    save_image(folder / "test/crack/a.png", size=(48, 32))
    save_image(folder / "test/crack/b.png", size=(48, 32))
    Image.fromarray(truth * 255).save(folder / "ground_truth/crack/a_mask.jpg", quality=50)
    Image.fromarray(truth * 255).save(folder / "ground_truth/crack/b_mask.png", format="JPEG", quality=50)
    for name in ("a.png", "b.png"):
        _, mask = read_sample(folder, name, tmp_path / "cache", Preprocessing(image_size=(32, 48)))
        np.testing.assert_array_equal(mask, truth)


def test_an_empty_mask_is_told_by_the_check_and_read_as_no_defect(tmp_path):
    folder = make_category(tmp_path / "mine")
    save_mask(folder / "ground_truth/crack/000_mask.png", value=0)
    _, mask = read_sample(folder, "000.png", tmp_path / "cache")
    assert not mask.any()
    (problem,) = open_folder(tmp_path / "mine").check(decode=True)
    assert "000_mask.png of an anomalous image marks no pixel" in problem.what


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colour_masks_are_read_or_refused_but_never_silently_empty(tmp_path, colour_type, channels):
    pixels = np.zeros((4, 6, channels), dtype=np.uint16)
    if channels in (2, 4):
        pixels[..., -1] = 65535
    for value in (1, 255, 256, 65535):
        pixels[1:3, 2:5, 0] = value
        write_deep_png(tmp_path / "m.png", pixels, colour_type)
        if value < 256:  # Pillow keeps the upper 8 of 16 bits
            with pytest.raises(AdgridError, match=r"m\.png.*no value above 255.*8 bits"):
                read_mask(str(tmp_path / "m.png"))
        else:
            assert read_mask(str(tmp_path / "m.png")).sum() == 6


@pytest.mark.parametrize("read", [read_image, read_mask, read_size])
def test_a_picture_too_large_to_decode_is_refused_before_it_fills_the_memory(tmp_path, read):
    write_png(tmp_path / "big.png", 30_000, 30_000, 8, 2, [])
    with pytest.raises(AdgridError, match=r"big\.png.*too large to decode.*900000000 pixels.*cut it into tiles"):
        read(str(tmp_path / "big.png"))


# --- names, links and places ---------------------------------------------------------------------------------------


def test_names_that_differ_in_extension_alone_are_two_images_but_cannot_share_a_mask(tmp_path):
    folder = make_category(tmp_path / "mine")
    save_image(folder / "train/good/000.jpg", 200)
    save_image(folder / "test/good/000.PNG", 200)
    category = open_folder(tmp_path / "mine").category("bottle")
    ids = [sample.sample_id for sample in (*category.train, *category.test)]
    assert len(set(ids)) == len(ids) == 9
    save_mask(folder / "ground_truth/crack/000_mask.bmp")
    with pytest.raises(AdgridError, match=r"not one to one: 000\.png"):
        open_folder(tmp_path / "mine").category("bottle")


def test_links_in_a_circle_hide_nothing_and_end(tmp_path):
    folder = make_category(tmp_path / "mine")
    (folder / "train/good/a.png").symlink_to("b.png")
    (folder / "train/good/b.png").symlink_to("a.png")
    assert list_images(str(folder / "train/good")) == ["000.png", "001.png", "002.png", "a.png", "b.png"]
    problems = open_folder(tmp_path / "mine").check()
    assert len(problems) == 2
    assert all("cannot read image" in problem.what and "symbolic links" in problem.what for problem in problems)


def test_a_link_to_a_folder_above_is_not_followed_for_ever(tmp_path):
    folder = make_category(tmp_path / "mine")
    (tmp_path / "mine/again").symlink_to(tmp_path / "mine")
    (folder / "loop").symlink_to(folder)
    dataset = open_folder(tmp_path / "mine")
    assert dataset.category_names() == ("bottle",)
    assert dataset.check(decode=True) == []
    # Seen from the folder above, both places hold categories; the answer must come, and name a real one.
    assert "too high" in open_folder(tmp_path).missing()


@pytest.mark.parametrize("writable_cache", [True, False])
def test_a_read_only_data_folder_is_never_written_to(tmp_path, writable_cache):
    folder = make_category(tmp_path / "mine")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted((path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*"))
    # A file cannot hold a cache, not even for root.
    cache = tmp_path.parent / f"{tmp_path.name} cache" if writable_cache else folder / "train/good/000.png"
    try:
        dataset = open_folder(tmp_path / "mine")
        assert dataset.missing() is None
        assert dataset.check(decode=True) == []
        data = read_category(dataset, "bottle", 2, 0, str(cache))
        store = FeatureStore(str(cache)) if writable_cache else None
        split = ImageSplit(data.train, AS_STORED, hashes=data.hashes, dataset="mine", store=store)
        assert [len(batch) for batch in split] == [2]
        assert sorted((path, path.lstat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)


# --- content, wherever it lies -------------------------------------------------------------------------------------


def settle(folder, seconds=1_600_000_000):
    for path in folder.rglob("*.png"):
        os.utime(path, (seconds, seconds))


def test_two_copies_of_the_data_have_the_same_ids_and_a_new_date_changes_none(tmp_path, monkeypatch):
    reads = []
    original = fingerprint._hash_file
    monkeypatch.setattr(fingerprint, "_hash_file", lambda path: reads.append(path) or original(path))
    cache = str(tmp_path / "cache")
    found = []
    for root in (tmp_path / "here", tmp_path / "else where" / "b"):
        settle(make_category(root))
        found.append(read_category(open_folder(root), "bottle", None, 0, cache))
    assert len(reads) == 18  # seven images and two masks, in two places
    assert found[0].images_id == found[1].images_id
    assert found[0].truth_id == found[1].truth_id
    read_category(open_folder(tmp_path / "here"), "bottle", None, 0, cache)
    assert len(reads) == 18
    settle(tmp_path / "here", 1_650_000_000)
    again = read_category(open_folder(tmp_path / "here"), "bottle", None, 0, cache)
    assert len(reads) == 27
    assert (again.images_id, again.truth_id) == (found[0].images_id, found[0].truth_id)


def test_a_repainted_mask_changes_the_truth_and_a_repainted_image_both(tmp_path):
    folder = make_category(tmp_path / "mine")

    def ids():
        data = read_category(open_folder(tmp_path / "mine"), "bottle", None, 0, str(tmp_path / "cache"))
        return data.images_id, data.truth_id

    images, truth = ids()
    save_mask(folder / "ground_truth/crack/000_mask.png", value=7)
    assert ids()[0] == images
    assert ids()[1] != truth
    save_image(folder / "train/good/000.png", 201)
    assert ids()[0] != images


@pytest.fixture
def memory():
    """A file system that only a URI reaches, and that keeps no modification times for pyarrow."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.rm("/pitfalls", recursive=True)


def test_where_a_store_keeps_no_times_an_overwritten_file_is_noticed(tmp_path, memory):
    # Two BMP images of one size have equally many bytes.
    cache = str(tmp_path / "cache")
    memory.pipe("/pitfalls/a.bmp", b"first ")
    first = content_hashes(["memory://pitfalls/a.bmp"], cache)
    memory.pipe("/pitfalls/a.bmp", b"second")
    assert content_hashes(["memory://pitfalls/a.bmp"], cache) != first


def test_a_uri_with_unusual_names_is_read_as_it_is_written(tmp_path, memory):
    folder = make_category(tmp_path / "mine", "M8 #1 100%?")
    (folder / ".DS_Store").write_bytes(b"clutter")
    memory.put(str(folder), "/pitfalls/M8 #1 100%?", recursive=True)
    dataset = open_folder("memory://pitfalls")
    assert dataset.category_names() == ("M8 #1 100%?",)
    assert [entry.name for entry in list_folder("memory://pitfalls/M8 #1 100%?")] == ["ground_truth", "test", "train"]
    assert dataset.check(decode=True) == []
    far = read_category(dataset, "M8 #1 100%?", None, 0, str(tmp_path / "cache"))
    near = read_category(open_folder(tmp_path / "mine"), "M8 #1 100%?", None, 0, str(tmp_path / "cache"))
    assert (far.images_id, far.truth_id) == (near.images_id, near.truth_id)
