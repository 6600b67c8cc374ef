"""Pixels: reading images and masks of any common format, and bringing both to one fixed size.

What happens to unusual files, the same for every dataset:

- Grey images become three equal channels. 16 bit become 8 bit by dropping the low byte, as Pillow does for 16-bit
  colour, so 0..65535 covers 0..255 in every image alike; nothing is stretched to the brightness of one image.
- Transparency is dropped and the colour under it kept, as every published loader does. Palettes are looked up, CMYK is
  converted, colour profiles are ignored. Of several frames or pages the first counts.
- Images and masks are turned upright by their own EXIF orientation. A mask belongs to the upright image.
- A mask pixel is a defect when it is drawn in any other colour than black: small class ids, 255, 16 bit and colours
  alike. A palette counts by its colours, and a fully transparent pixel is not drawn. In lossy formats (JPEG, WebP)
  compression leaves faint grey around every edge, so there a defect is 128 and more. A mask in which this cannot be
  told (a lossy one that is dark all over; 16-bit colour, of which Pillow keeps the upper half, with nothing in it) is
  refused.

Opening is restricted to the raster formats below, whatever the extension says; Pillow would otherwise hand some files
to other programs. So is the size: Pillow refuses images above 2 * `PIL.Image.MAX_IMAGE_PIXELS`, 179 million pixels.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from harness.contracts import AdgridError, Preprocessing, Sample
from harness.datasets.files import open_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")

_LOSSY_FORMATS = frozenset({"JPEG", "MPO", "WEBP"})
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to the turn that undoes it (EXIF 2.32, tag 0x0112)."""
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


class ImageProblem(AdgridError):
    """An image or mask that cannot be used: what is wrong, with the path, and the remedy."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)  # both in `args`, so that the error survives pickling
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


def read_image(path: str) -> Image.Image:
    """Decodes an image to upright 8-bit RGB.

    Raises:
        ImageProblem: the file is missing, empty, truncated, no image, or has pixels without a fixed range.
    """
    with _decoding(path, "image") as image:
        image.load()
        image = _turn_upright(image)
        if image.mode == "RGB":
            return image
        if image.mode.startswith("I;16"):
            return Image.fromarray(_drop_low_bits(image)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ImageProblem(
                f"cannot read image {path}: its pixels are 32-bit or signed numbers without a fixed range",
                "save it with 8 or 16 bits per channel",
            )
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # Pillow warns when a palette with transparency goes to RGB in one step
        return image.convert("RGB")


def read_mask(path: str) -> NDArray[np.uint8]:
    """Decodes a ground-truth mask.

    Returns:
        (H, W) uint8, 1 = defect, 0 = normal; upright.

    Raises:
        ImageProblem: the file cannot be read, or its defects cannot be told from compression noise or lost bits.
    """
    with _decoding(path, "mask") as image:
        lossy = image.format in _LOSSY_FORMATS or image.info.get("compression") == "jpeg"
        layouts = str(image.tile)  # type: ignore[attr-defined]  # such as "RGB;16B", until it is loaded
        deep_colour = ";16" in layouts and len(image.getbands()) > 1
        image.load()
        image = _turn_upright(image)
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")
        elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            image = image.convert("RGB")
        pixels = np.asarray(image)
        has_alpha = image.mode in ("LA", "RGBA")
    visible = pixels[..., -1] > 0 if has_alpha else None
    if pixels.ndim == 3:
        pixels = pixels[..., :-1].max(axis=2) if has_alpha else pixels.max(axis=2)
    if lossy:
        peak = int(pixels.max())
        if 0 < peak < 128:
            raise ImageProblem(
                f"cannot read mask {path}: it is a lossy file whose brightest pixel is {peak}, so defects cannot be "
                "told from compression noise",
                "save masks as PNG, or as 0 and 255",
            )
        pixels = pixels >= 128
    if deep_colour and not pixels.any():
        raise ImageProblem(
            f"cannot read mask {path}: it has 16 bits per colour and no value above 255, and the lower 8 bits are lost "
            "in decoding",
            "save masks with 8 bits, or as 16-bit grey",
        )
    defect = pixels != 0
    if visible is not None:
        defect &= visible
    return defect.astype(np.uint8)


def read_size(path: str, kind: Literal["image", "mask"] = "image") -> tuple[int, int]:
    """(H, W) of the upright image, from the file's header alone.

    Raises:
        ImageProblem: the file is missing, empty or no image.
    """
    with _decoding(path, kind) as image:
        width, height = image.size
        # Pillow reports (and decodes) TIFF upright already.
        turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def load_image(path: str, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Reads an image and brings it to `preprocessing.image_size`.

    Returns:
        (3, H, W) uint8 RGB, contiguous.

    Raises:
        ImageProblem: the file cannot be read, or is smaller than the crop after resizing.
    """
    image = _resize_and_crop(read_image(path), preprocessing, _RESAMPLING[preprocessing.interpolation], path)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def load_mask(sample: Sample, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Reads the mask of an image and brings it to `preprocessing.image_size` exactly as the image is.

    The resize takes the nearest pixel, so the mask keeps its size on average and stays binary; a crop may cut the
    whole defect away and leave zeros.

    Returns:
        (H, W) uint8, 1 = defect; zeros for a normal image without a mask.

    Raises:
        ImageProblem: an anomalous image has no mask, the mask cannot be read, or its size is not that of its image.
    """
    if sample.mask_path is None:
        if sample.label == 1:
            raise ImageProblem(f"the anomalous image {sample.path} has no mask", "pixel metrics need one")
        return np.zeros(preprocessing.image_size, dtype=np.uint8)
    mask = read_mask(sample.mask_path)
    match_sizes(sample, read_size(sample.path), mask.shape)
    image = _resize_and_crop(Image.fromarray(mask), preprocessing, Image.Resampling.NEAREST, sample.mask_path)
    return np.array(image)


def match_sizes(sample: Sample, size: tuple[int, int], mask_size: tuple[int, ...]) -> None:
    """Compares the upright (H, W) of an image and of its mask. Raises ImageProblem where they differ."""
    if mask_size == size:
        return
    turned = " (is it turned by an EXIF orientation?)" if mask_size == size[::-1] else ""
    raise ImageProblem(
        f"the mask {sample.mask_path} is {mask_size[0]} x {mask_size[1]} pixels (H x W) but its image {sample.path} "
        f"is {size[0]} x {size[1]}{turned}",
        "make the mask as large as its upright image",
    )


def _resize_and_crop(
    image: Image.Image, preprocessing: Preprocessing, resampling: Image.Resampling, path: str
) -> Image.Image:
    """The geometry of torchvision's Resize and CenterCrop on a Pillow image, rounding included."""
    height, width = preprocessing.image_size
    if preprocessing.resize is None:
        return image.resize((width, height), resampling)
    shorter = preprocessing.resize
    old_width, old_height = image.size
    if old_width <= old_height:
        new_width, new_height = shorter, int(shorter * old_height / old_width)
    else:
        new_width, new_height = int(shorter * old_width / old_height), shorter
    if new_height < height or new_width < width:
        raise ImageProblem(
            f"the crop image_size {height} x {width} (H x W) does not fit into {path} resized to {new_height} x "
            f"{new_width}",
            f"raise protocol.resize (now {shorter}) or lower protocol.image_size",
        )
    image = image.resize((new_width, new_height), resampling)
    left, top = round((new_width - width) / 2), round((new_height - height) / 2)
    return image.crop((left, top, left + width, top + height))


@contextmanager
def _decoding(path: str, kind: Literal["image", "mask"]) -> Iterator[Image.Image]:
    """Opens an image; whatever goes wrong inside becomes one AdgridError with the path and a remedy."""
    try:
        with open_file(path) as file, Image.open(file, formats=FORMATS) as image:
            yield image
    except (AdgridError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageProblem(
            f"cannot read {kind} {path}: it is too large to decode safely ({error})",
            "cut it into tiles, or scale it down",
        ) from error
    except FileNotFoundError as error:
        raise ImageProblem(f"cannot read {kind} {path}: no such file", "copy it again from its source") from error
    except (
        Exception
    ) as error:  # Pillow raises nearly anything on a broken file: SyntaxError, struct.error, zlib.error ...
        raise ImageProblem(
            f"cannot read {kind} {path}: {_explain(path, error)}", "copy it again from its source, or remove it"
        ) from error


def _explain(path: str, error: Exception) -> str:
    try:
        with open_file(path) as file:
            if not file.read(1):
                return "the file has zero bytes"
    except OSError as again:
        return str(again)
    if isinstance(error, Image.UnidentifiedImageError):
        return f"its content is none of {', '.join(FORMATS)}"
    return f"{type(error).__name__}: {error}"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 where there is none or the EXIF block is broken."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a broken EXIF block next to good pixels is no reason to refuse the image
        return 1


def _turn_upright(image: Image.Image) -> Image.Image:
    """Undoes the EXIF orientation. To be called after `load()`, which drops the tag where it has turned the image."""
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _drop_low_bits(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W) 16-bit pixels to 8 bit; TIFF also packs 12 bits, which Pillow leaves as 0..4095."""
    bits = 16
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (16,))[0]  # type: ignore[attr-defined]  # BitsPerSample
    return (np.asarray(image) >> (bits - 8)).astype(np.uint8)
