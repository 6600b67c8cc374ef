"""Held-out training images of another dataset, half of them with painted defects: what a sweep may be tuned on without
touching a test image.

Of each category a third of the normal training images (at most 50) are held out: as they are they stand for normal test
images, and a copy of each with one painted defect for anomalous ones, mask included. The others remain for fitting. The
draw depends on the names of the images alone. Painted defects are not real ones: a configuration that wins here finds
small local changes, which is what is asked of it most of the time, and nothing says that it finds a missing part.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from harness.contracts import AdgridError, Category, Dataset, LayoutProblem, Places, Sample, derive_seed
from harness.datasets.defects import DEFECTS
from harness.datasets.fingerprint import content_hashes
from harness.datasets.images import read_image
from harness.datasets.surfaces import SIZE, Surface

VERSION = 1
"""Raised, and with it the folder's name, when the painters move a pixel."""
SHARE, MOST = 1 / 3, 50
"""Of a category's training images that are held out."""
KINDS = ("blur", "colour_shift", "crack", "dent", "displaced", "scratch", "stain")
"""The painters of `harness.datasets.defects` that need to know nothing of the surface."""
STRENGTHS = (0.2, 1.0)
_VISIBLE = 1.5 / 255
"""A pixel belongs to the mask when a colour changed by more than this."""


class HeldOut:
    """Wraps a dataset: same categories, parts of their training images on both sides."""

    summary = "held-out training images, half of them with painted defects"

    def __init__(self, name: str, source: Dataset, places: Places) -> None:
        """Args: name as in the rows; the dataset whose training images are used; where painted images are kept."""
        self.name, self._source = name, source
        self.root = source.root
        self.licence, self.home_page, self.citation = source.licence, source.home_page, source.citation
        self._cache_dir = places.cache_dir

    def missing(self) -> str | None:
        """Why the source is not here, or None when it is."""
        return self._source.missing()

    def prepare(self) -> None:
        """Makes what the source makes; a category's defects are painted when it is listed."""
        self._source.prepare()

    def category_names(self) -> tuple[str, ...]:
        """Those of the source."""
        return self._source.category_names()

    def check(self, categories: Sequence[str] | None = None, decode: bool = False) -> list[LayoutProblem]:
        """Every complaint about the source."""
        return self._source.check(categories)

    def category(self, name: str) -> Category:
        """The training images in two parts; defects that are not painted yet are painted now.

        Raises:
            AdgridError: fewer than four training images, or one that cannot be read.
        """
        images = self._source.category(name).train
        number = min(int(len(images) * SHARE), MOST)
        if number < 1 or len(images) < 4:
            raise AdgridError(
                f"dataset {self.name!r}, category {name!r}: {len(images)} training images are too few to hold some out "
                f"for tuning; tune on the categories of another dataset"
            )
        ranked = sorted(images, key=lambda sample: derive_seed("held out", name, sample.sample_id, sample.view))
        chosen = {sample.path for sample in ranked[:number]}
        hashes = content_hashes([sample.path for sample in images if sample.path in chosen], self._cache_dir)
        test: list[Sample] = []
        for place, sample in enumerate(sample for sample in images if sample.path in chosen):
            kind = KINDS[place % len(KINDS)]
            image, mask = self._paint(sample, kind, hashes[sample.path])
            test += [
                _test_sample(sample, sample.path, "good", None),
                _test_sample(sample, str(image), kind, str(mask)),
            ]
        train = tuple(sample for sample in images if sample.path not in chosen)
        return Category(name=name, train=train, test=tuple(test), has_masks=True)

    def _paint(self, sample: Sample, kind: str, digest: str) -> tuple[Path, Path]:
        """Paths of the painted image and its mask, found by the content of the image and so never stale."""
        folder = Path(self._cache_dir, "held_out", f"v{VERSION}")
        image_path, mask_path = folder / f"{digest[:32]}-{kind}.png", folder / f"{digest[:32]}-{kind}-mask.png"
        if not (image_path.exists() and mask_path.exists()):
            pixels = np.asarray(read_image(sample.path), np.float64) / 255
            painted, mask = paint_defect(pixels, kind, derive_seed("held out", digest, kind))
            folder.mkdir(parents=True, exist_ok=True)
            _save(mask.astype(np.uint8) * 255, mask_path)
            _save(painted, image_path)
        return image_path, mask_path


def paint_defect(image: NDArray[np.float64], kind: str, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Paints one defect into an image of any size.

    The painters work at 256 x 256; the change that they make is brought to the size of the image and added to it, so
    that every pixel outside the defect stays as it was.

    Args:
        image: (H, W, 3) in [0, 1].
        kind: one of `KINDS`.
        seed: of place, shape and strength.

    Returns:
        The (H, W, 3) uint8 image and the (H, W) mask of what changed visibly, which is never nothing.
    """
    height, width = image.shape[:2]
    small = _resize(image, SIZE, SIZE)
    before = np.rint(image * 255).astype(np.uint8)
    for attempt in range(8):  # a change can vanish, such as a blur in front of an even background
        rng = np.random.default_rng([seed, attempt])
        surface = Surface(image=small, angle=rng.uniform(0, np.pi))
        changed, _ = DEFECTS[kind](surface, rng, rng.uniform(*STRENGTHS))
        painted = np.clip(image + _resize(changed - small, height, width), 0, 1)
        after = np.rint(painted * 255).astype(np.uint8)
        mask = _close_gaps((np.abs(after.astype(np.int16) - before) > _VISIBLE * 255).any(axis=2))
        if mask.sum() >= 1e-4 * mask.size:
            return after, mask
        kind = "stain" if attempt >= 3 else kind
    raise AdgridError(f"no defect of kind {kind!r} shows on an image of {width} x {height} pixels")


def _close_gaps(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A change mask without pinholes and specks: the defect as a person would outline it."""
    closed = ndimage.binary_closing(mask, iterations=max(2, min(mask.shape) // 128)) | mask
    regions, number = ndimage.label(closed)
    if number < 2:
        return closed
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    return (sizes >= 0.05 * sizes.max())[regions]


def _resize(image: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    channels = [
        Image.fromarray(image[..., channel].astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
        for channel in range(3)
    ]
    return np.stack([np.asarray(channel, np.float64) for channel in channels], axis=2)


def _test_sample(sample: Sample, path: str, defect_type: str, mask_path: str | None) -> Sample:
    normal = defect_type == "good"
    return Sample(
        path=path,
        category=sample.category,
        sample_id=sample.sample_id if normal else f"{sample.sample_id}-{defect_type}",
        view=sample.view,
        split="test",
        label=0 if normal else 1,
        defect_type=defect_type,
        mask_path=mask_path,
    )


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    temporary = path.with_name(f".{uuid.uuid4().hex}.png")
    try:
        Image.fromarray(pixels).save(temporary, compress_level=1)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
