"""Ground truth at evaluation size: masks and their regions, read and labelled once per content and size.

The cache is keyed by the contents of the masks, so a changed mask is a new entry and stale ones are never read.
"""

from __future__ import annotations

import dataclasses
import io
import os
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness.contracts import Preprocessing, Sample
from harness.datasets.images import load_mask
from harness.identity import content_id
from harness.metrics import METRIC_VERSION, label_regions


@dataclasses.dataclass(frozen=True)
class Truth:
    """Defective pixels of the test images, sparse: most pixels are normal."""

    image_size: tuple[int, int]
    starts: np.ndarray
    """(N + 1,) where each image's pixels begin in the next two."""
    pixels: np.ndarray
    """Flat positions of defective pixels within their image."""
    labels: np.ndarray
    """Number of the 8-connected region of each, from 1 within its image."""

    def regions(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, H, W) int32 region labels of some images, 0 outside."""
        height, width = self.image_size
        dense = np.zeros((stop - start, height * width), dtype=np.int32)
        for row, image in enumerate(range(start, stop)):
            inside = slice(self.starts[image], self.starts[image + 1])
            dense[row, self.pixels[inside]] = self.labels[inside]
        return dense.reshape(-1, height, width)


def load_truth(test: Sequence[Sample], truth_id: str, preprocessing: Preprocessing, cache_dir: str) -> Truth:
    """Masks and regions of the test images.

    Args:
        test: the test images with their masks.
        truth_id: content fingerprint of labels and masks.
        preprocessing: size and crop; masks follow with nearest neighbour.
        cache_dir: node-local cache.

    Raises:
        AdgridError: a mask that cannot be read or has another size than its image.
    """
    size = preprocessing.image_size
    path = Path(cache_dir) / "truth" / f"{content_id([METRIC_VERSION, truth_id, size, preprocessing.resize])}.npz"
    try:
        with np.load(path) as stored:
            return Truth(size, stored["starts"], stored["pixels"], stored["labels"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass  # not there yet, or damaged: made again
    pixels, labels = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    counts = [0]
    for sample in test:
        regions = label_regions(load_mask(sample, preprocessing))[0].ravel() if sample.mask_path else np.zeros(0)
        inside = np.flatnonzero(regions)
        pixels.append(inside.astype(np.int32))
        labels.append(regions[inside].astype(np.int32))
        counts.append(len(inside))
    truth = Truth(size, np.cumsum(counts), np.concatenate(pixels), np.concatenate(labels))
    _keep(path, truth)
    return truth


def _keep(path: Path, truth: Truth) -> None:
    packed = io.BytesIO()
    np.savez_compressed(packed, starts=truth.starts, pixels=truth.pixels, labels=truth.labels)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(packed.getvalue())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full or read-only cache costs time, not the cell
