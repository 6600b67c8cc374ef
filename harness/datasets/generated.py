"""A small dataset with pixel masks, painted on first use: four surfaces, four kinds of defect on each.

It needs no download and is made of our own numbers, so that every part of the harness, pixel metrics included, can be
tried at once. It is for trying and testing, not for ranking methods: results on it say nothing about real parts.

The images of a version never change; a change of the painters raises `VERSION`, and with it the folder's name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harness.contracts import AdgridError, Category, LayoutProblem, Places, derive_seed
from harness.datasets.base import Counts
from harness.datasets.defects import DEFECTS
from harness.datasets.files import is_uri, resolve_path
from harness.datasets.folder import Folder
from harness.datasets.surfaces import SURFACES

VERSION = 1
NUM_TRAIN, NUM_GOOD, NUM_PER_DEFECT = 40, 16, 8
NOISE = 0.012
"""Standard deviation of the camera's noise, in shares of full white."""
DEFECT_TYPES = {
    "brushed_metal": ("blur", "dent", "scratch", "stain"),
    "granite": ("blur", "crack", "scratch", "stain"),
    "printed_tile": ("colour_shift", "crack", "displaced", "missing"),
    "woven_fabric": ("colour_shift", "displaced", "scratch", "stain"),
}
STRENGTHS = {
    "brushed_metal": (0.0, 0.3),
    "granite": (0.3, 1.0),
    "printed_tile": (0.3, 1.0),
    "woven_fabric": (0.15, 0.9),
}
"""Strength of a category's faintest and plainest defects; a calm surface hides less, so its defects are fainter."""
_ABANDONED_SECONDS = 3600
"""A half-made folder this old belongs to a process that was killed."""


class Generated(Folder):
    """Paints the dataset into the cache, in the layout of MVTec AD, and reads it from there."""

    summary = (
        "four painted surfaces with eight kinds of defect and pixel masks, made on first use; for trying things out"
    )
    licence = "Apache-2.0, made by adgrid itself"
    home_page = "none: nothing to download"
    citation = f"adgrid, generated dataset, version {VERSION}"
    expected = {
        name: Counts(train=NUM_TRAIN, good=NUM_GOOD, defects=dict.fromkeys(kinds, NUM_PER_DEFECT))
        for name, kinds in DEFECT_TYPES.items()
    }

    def find_root(self, root: str | None, places: Places) -> str:
        """`<cache>/generated/v<version>`, or the version's folder inside the given root."""
        base = resolve_path(root) if root is not None else f"{resolve_path(places.cache_dir)}/generated"
        if is_uri(base):
            raise AdgridError(
                f"dataset {self.name!r}: its root {base} is no local folder; it is painted on local disks"
            )
        return f"{base}/v{VERSION}"

    def locate_problem(self) -> LayoutProblem | None:
        """Never missing: it is painted where it is not."""
        return None

    def category_names(self) -> tuple[str, ...]:
        """The surfaces, whether painted yet or not."""
        return tuple(sorted(DEFECT_TYPES))

    def category(self, name: str) -> Category:
        """Lists one category, painted first if need be."""
        self.prepare()
        return super().category(name)

    def check(self, categories: Sequence[str] | None = None, decode: bool = False) -> list[LayoutProblem]:
        """Every complaint about the painted files, which are painted first if need be."""
        self.prepare()
        return super().check(categories, decode)

    def prepare(self) -> None:
        """Paints the dataset unless it is there.

        It is painted beside its place and moved there as a whole, so it is never seen half done; of several processes
        that paint at once the first one's folder stays.

        Raises:
            AdgridError: the place cannot be written.
        """
        target = Path(self.root)
        if target.is_dir():
            return
        workshop = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep_abandoned(target)
            workshop = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.tmp-"))
            workshop.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
            paint_dataset(workshop)
            try:
                os.replace(workshop, target)
            except OSError:
                if not target.is_dir():
                    raise
        except OSError as error:
            raise AdgridError(
                f"dataset {self.name!r}: cannot paint it into {target}: {error}; "
                "make room there, or name another --cache-dir"
            ) from error
        finally:
            if workshop is not None:
                shutil.rmtree(workshop, ignore_errors=True)


def paint_dataset(folder: Path) -> None:
    """Paints all categories into an existing folder, in the layout of MVTec AD."""
    for category, kinds in DEFECT_TYPES.items():
        for split, number in (("train", NUM_TRAIN), ("test", NUM_GOOD)):
            for index in range(number):
                image, _ = paint_sample(category, split, "good", index)
                _save(image, folder / category / split / "good" / f"{index:03d}.png")
        for kind in kinds:
            for index in range(NUM_PER_DEFECT):
                image, mask = paint_sample(category, "test", kind, index)
                _save(image, folder / category / "test" / kind / f"{index:03d}.png")
                _save(mask, folder / category / "ground_truth" / kind / f"{index:03d}_mask.png")


def paint_sample(category: str, split: str, kind: str, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One image, always the same for the same arguments.

    Args:
        category: a key of `DEFECT_TYPES`.
        split: `train` or `test`.
        kind: `good` or one of the category's defect types.
        index: number of the image; a defect grows plainer from the first to the last.

    Returns:
        (256, 256, 3) uint8 image and (256, 256) uint8 mask, 255 on the defect.
    """
    rng = np.random.default_rng(derive_seed("generated", VERSION, category, split, kind, index))
    surface = SURFACES[category](rng)
    image, mask = surface.image, np.zeros(surface.image.shape[:2], dtype=bool)
    if kind != "good":
        faintest, plainest = STRENGTHS[category]
        strength = faintest + (plainest - faintest) * index / (NUM_PER_DEFECT - 1)
        image, mask = DEFECTS[kind](surface, rng, strength)
    image = image + NOISE * rng.standard_normal(image.shape[:2])[..., None]
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8), np.where(mask, 255, 0).astype(np.uint8)


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)


def _sweep_abandoned(target: Path) -> None:
    """Removes the half-made folders of processes that were killed."""
    for folder in target.parent.glob(f"{target.name}.tmp-*"):
        if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


DATASET = Generated
