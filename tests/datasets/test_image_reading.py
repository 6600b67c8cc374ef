"""Images and masks of every common kind, and the geometry that brings both to one size."""

import pickle
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from harness.contracts import AdgridError, Preprocessing, Sample, SampleKey
from harness.datasets.images import load_image, load_mask, read_image, read_mask, read_size
from harness.image_split import ImageSplit


def anomalous(path, mask_path):
    return Sample(
        path=str(path),
        category="c",
        sample_id="s",
        split="test",
        label=1,
        defect_type="crack",
        mask_path=None if mask_path is None else str(mask_path),
    )


def save(array, path, **options):
    Image.fromarray(array).save(path, **options)
    return str(path)


@pytest.fixture
def colours():
    """(10, 14, 3) pixels that are all different, so that any turn or mix-up shows."""
    return np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.bmp", "a.BMP", "a.tif", "a.TIFF"])
def test_lossless_colour_comes_back_unchanged(tmp_path, colours, name):
    image = read_image(save(colours, tmp_path / name))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), colours)


def test_grey_becomes_three_equal_channels(tmp_path, colours):
    grey = colours[..., 0]
    pixels = np.asarray(read_image(save(grey, tmp_path / "grey.png")))
    np.testing.assert_array_equal(pixels, np.repeat(grey[..., None], 3, axis=2))


def test_bilevel_becomes_black_and_white(tmp_path):
    bits = np.array([[True, False, True]])
    pixels = np.asarray(read_image(save(bits, tmp_path / "bits.png")))
    np.testing.assert_array_equal(pixels[..., 0], [[255, 0, 255]])


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bit_drops_the_low_byte_and_stretches_nothing(tmp_path, name):
    deep = np.array([[0, 255, 256, 4095, 65535]], dtype=np.uint16)
    pixels = np.asarray(read_image(save(deep, tmp_path / name)))
    np.testing.assert_array_equal(pixels[..., 1], [[0, 0, 1, 15, 255]])
    dark = np.full((4, 4), 300, dtype=np.uint16)
    assert np.asarray(read_image(save(dark, tmp_path / name))).max() == 1


def test_big_endian_sixteen_bit_tiff(tmp_path):
    path = tmp_path / "big.tif"
    values = [0, 256, 65535, 32768]
    path.write_bytes(tiff(">", 4, 16, struct.pack(">4H", *values)))
    np.testing.assert_array_equal(np.asarray(read_image(str(path)))[..., 0], [[0, 1, 255, 128]])


def test_packed_twelve_bit_tiff_uses_its_own_range(tmp_path):
    path = tmp_path / "twelve.tif"
    # 0x000, 0xFFF, 0x800, 0x010 in six bytes
    path.write_bytes(tiff("<", 4, 12, bytes.fromhex("000fff800010")))
    np.testing.assert_array_equal(np.asarray(read_image(str(path)))[..., 0], [[0, 255, 128, 1]])


def tiff(order, width, bits, data):
    """A grey TIFF of one row, by hand: Pillow writes neither big-endian nor packed 12-bit files."""
    entries = [
        (256, 3, width),
        (257, 3, 1),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, 1),
        (279, 4, len(data)),
    ]
    data += b"\0" * (len(data) % 2)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    rows = b""
    for tag, kind, value in entries:
        field = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
        rows += struct.pack(order + "HHI", tag, kind, 1) + field
    return head + data + struct.pack(order + "H", len(entries)) + rows + struct.pack(order + "I", 0)


def test_palette_is_looked_up_and_transparency_dropped_without_a_warning(tmp_path, colours):
    flat = Image.fromarray(colours // 64 * 64).quantize(32)
    flat.save(tmp_path / "p.png", transparency=bytes(range(32)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.asarray(read_image(str(tmp_path / "p.png")))
    np.testing.assert_array_equal(pixels, np.asarray(flat.convert("RGB")))


def test_alpha_is_dropped_and_the_colour_under_it_kept(tmp_path, colours):
    alpha = np.zeros((10, 14, 1), dtype=np.uint8)
    pixels = read_image(save(np.concatenate([colours, alpha], axis=2), tmp_path / "rgba.png"))
    np.testing.assert_array_equal(np.asarray(pixels), colours)


def test_cmyk_jpeg_is_converted(tmp_path):
    Image.new("RGB", (16, 16), (200, 60, 30)).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    pixels = np.asarray(read_image(str(tmp_path / "c.jpg"))).astype(int)
    assert np.abs(pixels - (200, 60, 30)).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["turned.png", "turned.tif", "turned.jpg"])
def test_exif_orientation_is_undone(tmp_path, colours, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(colours, tmp_path / name, exif=exif)
    with Image.open(path) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(np.asarray(read_image(path)), upright)
    assert read_size(path) == upright.shape[:2] == ((10, 14) if orientation < 5 else (14, 10))


def test_orientation_six_is_turned_clockwise(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(np.array([[1, 2, 3], [4, 5, 6]], dtype=np.uint8), tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(path))[..., 0], [[4, 1], [5, 2], [6, 3]])
    np.testing.assert_array_equal(read_mask(path).shape, (3, 2))


def test_broken_exif_does_not_spoil_good_pixels(tmp_path, colours):
    path = save(colours, tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(np.asarray(read_image(path)), colours)
    assert read_size(path) == (10, 14)


def test_pixels_without_a_fixed_range_are_refused(tmp_path):
    path = save(np.linspace(0, 9, 12, dtype=np.float32).reshape(3, 4), tmp_path / "float.tif")
    with pytest.raises(AdgridError, match=r"float\.tif.*8 or 16 bits"):
        read_image(path)


def broken_files(folder, colours):
    save(np.tile(colours, (20, 20, 1)), folder / "whole.png")
    save(np.tile(colours, (20, 20, 1)), folder / "whole.jpg")
    for kind in ("png", "jpg"):
        whole = (folder / f"whole.{kind}").read_bytes()
        (folder / f"truncated.{kind}").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "postscript.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "folder.png").mkdir()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("truncated.png", "truncated|broken"),
        ("truncated.jpg", "truncated"),
        ("empty.png", "zero bytes"),
        ("text.jpg", "none of PNG, JPEG"),
        ("postscript.png", "none of PNG, JPEG"),
        ("folder.png", "directory"),
        ("absent.png", "no such file"),
    ],
)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_a_file_that_cannot_be_read_is_named_with_a_remedy(tmp_path, colours, name, why, read):
    broken_files(tmp_path, colours)
    with pytest.raises(AdgridError, match=why) as caught:
        read(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "copy it again" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


DEFECT = np.array([[0, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=np.uint8)


def mask_files(folder):
    """One file per kind of mask, all with the same defect."""
    made = {
        "255.png": Image.fromarray(DEFECT * 255),
        "small ids.png": Image.fromarray(DEFECT * np.array([[1, 1, 2, 3]], dtype=np.uint8)),
        "bits.png": Image.fromarray(DEFECT.astype(bool)),
        "deep.png": Image.fromarray(DEFECT.astype(np.uint16) * 256),
        "deep low byte.tif": Image.fromarray(DEFECT.astype(np.uint16)),
        "float.tif": Image.fromarray(DEFECT.astype(np.float32) * 0.5),
        "colour.png": Image.fromarray(np.stack([0 * DEFECT, 0 * DEFECT, 7 * DEFECT], axis=2)),
        "grey.bmp": Image.fromarray(DEFECT * 255),
        "UPPER.BMP": Image.fromarray(DEFECT * 9),
        # transparent white around an opaque red defect
        "rgba.png": Image.fromarray(np.where(DEFECT[..., None], (200, 0, 0, 255), (255, 255, 255, 0)).astype(np.uint8)),
        "grey alpha.png": Image.merge("LA", [Image.new("L", (4, 3), 255), Image.fromarray(DEFECT * 255)]),
    }
    ids = Image.fromarray(DEFECT).convert("P")
    ids.putpalette([0, 0, 0, 128, 0, 0])
    made["class ids.png"] = ids
    swapped = Image.fromarray(1 - DEFECT).convert("P")  # index 0 is the defect, as small-palette writers may do
    swapped.putpalette([255, 255, 255, 0, 0, 0])
    made["swapped palette.png"] = swapped
    for name, image in made.items():
        image.save(folder / name)
    return sorted(made)


def test_every_kind_of_mask_reads_as_zero_and_one(tmp_path):
    for name in mask_files(tmp_path):
        mask = read_mask(str(tmp_path / name))
        assert mask.dtype == np.uint8, name
        np.testing.assert_array_equal(mask, DEFECT, err_msg=name)


@pytest.mark.parametrize("name", ["m.jpg", "m.JPEG", "m.webp"])
def test_compression_noise_around_a_lossy_mask_is_no_defect(tmp_path, name):
    truth = np.zeros((64, 64), dtype=np.uint8)
    truth[20:41, 13:37] = 1
    path = save(truth * 255, tmp_path / name, quality=60)
    with Image.open(path) as stored:
        assert ((np.asarray(stored.convert("L")) != 0) != truth).any()
    np.testing.assert_array_equal(read_mask(path), truth)


def test_an_all_black_lossy_mask_is_normal_and_a_dim_one_refused(tmp_path):
    assert not read_mask(save(np.zeros((16, 16), dtype=np.uint8), tmp_path / "black.jpg")).any()
    with pytest.raises(AdgridError, match=r"dim\.jpg.*compression noise.*PNG"):
        read_mask(save(np.full((16, 16), 2, dtype=np.uint8), tmp_path / "dim.jpg"))


def test_without_a_crop_an_image_is_stretched_straight_to_its_size(tmp_path, colours):
    path = save(colours, tmp_path / "a.png")
    for interpolation, resampling in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        pixels = load_image(path, Preprocessing(image_size=(6, 8), interpolation=interpolation))
        expected = np.asarray(Image.fromarray(colours).resize((8, 6), resampling)).transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels, expected)
        assert pixels.shape == (3, 6, 8)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous


def test_a_big_jpeg_is_decoded_whole_before_it_is_resized(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (512, 640, 3), dtype=np.uint8)
    path = save(pixels, tmp_path / "big.jpg", quality=90)
    with Image.open(path) as stored:
        expected = np.asarray(stored.resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(load_image(path, Preprocessing(image_size=(32, 32))).transpose(1, 2, 0), expected)


# Width, height, shorter side, crop (H, W), and by hand from torchvision's rules: the resized width and height
# and the first column and row of the crop. The longer side is cut to an integer, half a pixel rounds to even.
CROPS = [
    (8, 4, 4, (4, 4), (8, 4), (2, 0)),
    (7, 4, 4, (4, 4), (7, 4), (2, 0)),
    (5, 4, 4, (4, 4), (5, 4), (0, 0)),
    (4, 9, 4, (3, 3), (4, 9), (0, 3)),
    (10, 3, 2, (2, 4), (6, 2), (1, 0)),
    (6, 6, 5, (3, 4), (5, 5), (0, 1)),
]


@pytest.mark.parametrize(("width", "height", "shorter", "crop", "resized", "corner"), CROPS)
def test_resize_and_centre_crop_follow_torchvision(tmp_path, width, height, shorter, crop, resized, corner):
    pixels = np.arange(width * height, dtype=np.uint8).reshape(height, width)
    path = save(pixels, tmp_path / "a.png")
    whole = np.asarray(Image.fromarray(pixels).resize(resized, Image.Resampling.NEAREST))
    expected = whole[corner[1] : corner[1] + crop[0], corner[0] : corner[0] + crop[1]]
    loaded = load_image(path, Preprocessing(image_size=crop, resize=shorter, interpolation="nearest"))
    np.testing.assert_array_equal(loaded[0], expected)


@pytest.mark.parametrize(
    "preprocessing", [Preprocessing(image_size=(20, 30)), Preprocessing(image_size=(24, 24), resize=33)]
)
def test_a_mask_is_cut_exactly_as_its_image(tmp_path, preprocessing):
    defect = np.random.default_rng(2).integers(0, 2, (50, 70), dtype=np.uint8)
    image, mask = save(defect * 200, tmp_path / "a.png"), save(defect, tmp_path / "a_mask.png")
    nearest = Preprocessing(image_size=preprocessing.image_size, resize=preprocessing.resize, interpolation="nearest")
    loaded = load_mask(anomalous(image, mask), preprocessing)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, load_image(image, nearest)[0] // 200)


def test_a_defect_outside_the_crop_leaves_an_empty_mask(tmp_path):
    defect = np.zeros((40, 80), dtype=np.uint8)
    defect[:, :10] = 1
    sample = anomalous(save(defect, tmp_path / "a.png"), save(defect, tmp_path / "m.png"))
    assert not load_mask(sample, Preprocessing(image_size=(40, 40), resize=40)).any()
    assert load_mask(sample, Preprocessing(image_size=(40, 40))).any()


def test_a_normal_image_without_a_mask_has_a_mask_of_zeros(tmp_path):
    normal = Sample(path="x.png", category="c", sample_id="s", split="test", label=0, defect_type="good")
    mask = load_mask(normal, Preprocessing(image_size=(5, 7)))
    np.testing.assert_array_equal(mask, np.zeros((5, 7), dtype=np.uint8))


def test_an_anomalous_image_without_a_mask_is_refused(tmp_path):
    with pytest.raises(AdgridError, match="has no mask"):
        load_mask(anomalous("x.png", None), Preprocessing())


def test_a_mask_of_another_size_is_refused_with_both_sizes(tmp_path, colours):
    image = save(colours, tmp_path / "a.png")
    other = save(np.zeros((9, 14), dtype=np.uint8), tmp_path / "m.png")
    with pytest.raises(AdgridError, match=r"m\.png is 9 x 14 .*a\.png is 10 x 14"):
        load_mask(anomalous(image, other), Preprocessing())
    turned = save(np.zeros((14, 10), dtype=np.uint8), tmp_path / "t.png")
    with pytest.raises(AdgridError, match="EXIF"):
        load_mask(anomalous(image, turned), Preprocessing())


def test_a_mask_is_compared_with_the_upright_image(tmp_path, colours):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = save(colours, tmp_path / "a.png", exif=exif)
    mask = save(np.ones((14, 10), dtype=np.uint8), tmp_path / "m.png")
    assert load_mask(anomalous(image, mask), Preprocessing(image_size=(8, 8))).all()


def test_a_crop_larger_than_the_resized_image_is_refused(tmp_path, colours):
    path = save(colours, tmp_path / "a.png")
    with pytest.raises(AdgridError, match=r"32 x 32 .*resize \(now 16\)"):
        load_image(path, Preprocessing(image_size=(32, 32), resize=16))


def test_every_value_of_a_pixel_becomes_its_share_of_255_exactly(tmp_path):
    path = save(np.arange(256, dtype=np.uint8).reshape(16, 16), tmp_path / "a.png")
    split = ImageSplit([SampleKey(path=path, category="c", sample_id="a")], Preprocessing(image_size=(16, 16)))
    expected = torch.arange(256, dtype=torch.float32).div(255).reshape(16, 16).expand(1, 3, 16, 16)
    assert torch.equal(split.take([0]).images, expected)
