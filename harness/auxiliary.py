"""Labelled auxiliary images: what a representation is trained on, with masks, and none of it reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from harness.contracts import AdgridError, Batch, Dataset, LabelledBatch, Preprocessing, Sample, SampleKey, Split
from harness.datasets.fingerprint import content_hashes
from harness.datasets.images import load_mask
from harness.identity import images_fingerprint, truth_fingerprint

NORMAL = "good"
"""Defect type of a normal image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledCategory:
    """All images of a category, training and test, with the hashes of their contents."""

    dataset: str
    category: str
    samples: tuple[Sample, ...]
    hashes: Mapping[str, str]
    """Path -> SHA-256 of the file, masks included."""

    @property
    def normal(self) -> tuple[Sample, ...]:
        """Images that may be references; one that merely lacks a mask names a defect and is none."""
        return tuple(sample for sample in self.samples if sample.defect_type == NORMAL)

    @property
    def fingerprint(self) -> list[str]:
        """Images, labels and masks as they enter an id."""
        truth = truth_fingerprint(self.samples, self.hashes, True)
        return [self.dataset, self.category, images_fingerprint(self.samples, self.hashes), truth]


def read_labelled(dataset: Dataset, category: str, cache_dir: str) -> LabelledCategory:
    """Lists and hashes a category. Raises AdgridError if an anomalous image has no mask."""
    listing = dataset.category(category)
    samples = (*listing.train, *listing.test)
    bare = [sample.path for sample in samples if sample.label == 1 and sample.mask_path is None]
    if bare:
        raise AdgridError(
            f"dataset {dataset.name!r}, category {category!r}: pretraining needs masks of all anomalous images, and "
            f"{len(bare)} have none, first {bare[0]}; leave the category out of the representation's `data`"
        )
    files = [sample.path for sample in samples]
    files += [sample.mask_path for sample in samples if sample.mask_path]
    return LabelledCategory(
        dataset=dataset.name, category=category, samples=samples, hashes=content_hashes(files, cache_dir)
    )


class LabelledImages:
    """Images of several categories with labels and masks; satisfies `harness.contracts.LabelledSplit`.

    Masks are kept, eight pixels to a byte, after their first use: a small part of what the images take.
    """

    def __init__(self, samples: Sequence[Sample], images: Split, preprocessing: Preprocessing) -> None:
        """Args: the images with their truth; the same as pixels; their size, which masks follow."""
        self.samples: tuple[SampleKey, ...] = images.samples
        self._truth, self._images, self._preprocessing = samples, images, preprocessing
        self._masks: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[LabelledBatch]:
        start = 0
        for batch in self._images:
            places = range(start, start + len(batch))
            start += len(batch)
            yield self._labelled(places, batch.images)

    def take(self, indices: Sequence[int]) -> LabelledBatch:
        """The images at these positions as one batch."""
        return self._labelled(indices, self._images.take(indices).images)

    def _labelled(self, places: Sequence[int], images: torch.Tensor | None) -> LabelledBatch:
        return LabelledBatch(
            samples=tuple(self.samples[place] for place in places),
            images=images,
            labels=torch.tensor([self._truth[place].label for place in places]),
            masks=torch.from_numpy(np.stack([self._mask(place) for place in places])),
        )

    def _mask(self, place: int) -> np.ndarray:
        """(H, W) uint8."""
        height, width = self._preprocessing.image_size
        sample = self._truth[place]
        if sample.mask_path is None:
            return np.zeros((height, width), np.uint8)
        if place not in self._masks:
            self._masks[place] = np.packbits(load_mask(sample, self._preprocessing))
        return np.unpackbits(self._masks[place], count=height * width).reshape(height, width)


class JoinedSplit:
    """Images of several datasets one after the other; satisfies `harness.contracts.Split`.

    Categories carry the name of their dataset, as two datasets may have categories of the same name.
    """

    def __init__(self, parts: Sequence[tuple[str, Split]]) -> None:
        """Args: name of the dataset and its images, all as pixels or all as features."""
        self._parts = [split for _, split in parts]
        self._starts = np.cumsum([0, *(len(split) for split in self._parts)])
        self.samples: tuple[SampleKey, ...] = tuple(
            dataclasses.replace(sample, category=f"{name}/{sample.category}")
            for name, split in parts
            for sample in split.samples
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        for part in self._parts:
            for batch in part:
                samples = self.samples[start : start + len(batch)]
                start += len(batch)
                yield dataclasses.replace(batch, samples=samples)

    def take(self, indices: Sequence[int]) -> Batch:
        """The images at these positions as one batch."""
        owners = (np.searchsorted(self._starts, indices, side="right") - 1).tolist()
        batches, order = [], []
        for owner in dict.fromkeys(owners):
            rows = [row for row, other in enumerate(owners) if other == owner]
            order += rows
            batches.append(self._parts[owner].take([indices[row] - int(self._starts[owner]) for row in rows]))
        back = torch.from_numpy(np.argsort(order))
        images = [batch.images for batch in batches if batch.images is not None]
        levels = [batch.levels for batch in batches if batch.levels is not None]
        return Batch(
            samples=tuple(self.samples[index] for index in indices),
            images=torch.cat(images)[back] if images else None,
            levels=tuple(torch.cat(parts)[back.to(parts[0].device)] for parts in zip(*levels, strict=True))
            if levels
            else None,
        )
