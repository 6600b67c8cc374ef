"""Where the normal reference images of the pretraining come from, as tokens of a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from harness.contracts import AdgridError, Context, SampleKey, Split

IMAGES_AT_ONCE = 32
"""Images per forward pass of the backbone."""


class References(Protocol):
    """Normal images by category and view, each with a number, and their clean features."""

    def places(self, category: str, view: str) -> Sequence[int]:
        """Numbers of the references of one category and view, at least one, the same on every worker.

        Raises:
            AdgridError: if there is none.
        """

    def levels(self, places: Sequence[int]) -> list[Tensor]:
        """Features (n, C, h, w) of these images per level, on the training's device, without augmentation."""


class SplitReferences:
    """The images of a split: features as stored, or encoded anew each time they are asked for."""

    def __init__(self, split: Split, context: Context) -> None:
        """Takes normal images, none of which is read yet.

        Args:
            split: the references, all of them normal; as features, or as images to be encoded.
            context: its `encode` is used where the split gives images.
        """
        self._split, self._context = split, context
        self._places: dict[tuple[str, str], list[int]] = {}
        for place, sample in enumerate(split.samples):
            self._places.setdefault((sample.category, sample.view), []).append(place)

    def places(self, category: str, view: str) -> Sequence[int]:
        """See `References.places`."""
        found = self._places.get((category, view))
        if found is None:
            of_view = f", view {view!r}" if view else ""
            raise AdgridError(
                f"pretraining needs normal reference images of every category and view; category {category!r}{of_view} "
                "has none; add normal images or leave it out"
            )
        return found

    @torch.no_grad()
    def levels(self, places: Sequence[int]) -> list[Tensor]:
        """See `References.levels`."""
        device, batches = self._context.device, []
        for begin in range(0, len(places), IMAGES_AT_ONCE):
            batch = self._split.take(places[begin : begin + IMAGES_AT_ONCE])
            if batch.levels is None:
                assert batch.images is not None
                assert self._context.encode is not None, "images must be encoded, and the context cannot"
                batches.append(self._context.encode(batch.images.to(device, non_blocking=True)))
            else:
                batches.append(batch.levels)
        return [torch.cat(level).to(device, non_blocking=True) for level in zip(*batches, strict=True)]


class ReferencePool:
    """A few references of every category and view, kept in memory after their first use. Differs from the paper."""

    def __init__(self, references: References, num: int, context: Context) -> None:
        """Takes what the pool is drawn from.

        Args:
            references: all of them.
            num: how many of each category and view are drawn, >= 1; all where there are fewer.
            context: for the draw, which depends on category and view.
        """
        if num < 1:
            raise ValueError(f"a pool needs at least 1 reference of each category and view, got {num}")
        self._references, self._num, self._context = references, num, context
        self._drawn: dict[tuple[str, str], list[int]] = {}
        self._kept: dict[int, list[Tensor]] = {}  # (C, h, w) per level

    def places(self, category: str, view: str) -> Sequence[int]:
        """See `References.places`."""
        if (category, view) not in self._drawn:
            everything = self._references.places(category, view)
            generator = self._context.generator("\x1f".join(("adpretrain pool", category, view)))
            chosen = torch.randperm(len(everything), generator=generator)[: self._num]
            self._drawn[category, view] = [everything[i] for i in sorted(chosen.tolist())]
        return self._drawn[category, view]

    def levels(self, places: Sequence[int]) -> list[Tensor]:
        """See `References.levels`."""
        new = [place for place in places if place not in self._kept]
        if new:
            for place, *maps in zip(new, *self._references.levels(new), strict=True):
                self._kept[place] = [level.clone() for level in maps]
        return [torch.stack(level) for level in zip(*(self._kept[place] for place in places), strict=True)]


def pool_of(references: References, num: int | None, context: Context) -> References:
    """A pool of so many references of each category and view, or all of them where no number is given."""
    return references if num is None else ReferencePool(references, num, context)


def draw_places(
    references: References, samples: Sequence[SampleKey], num: int, generator_of: Callable[[SampleKey], torch.Generator]
) -> list[list[int]]:
    """References of each image: drawn with replacement from its category and view, the image itself not excluded.

    Args:
        references: all of them.
        samples: the images.
        num: draws per image.
        generator_of: gives a generator for an image.

    Returns:
        For each image the numbers drawn, each once, ascending: a repetition would not change what is nearest.
    """
    drawn = []
    for sample in samples:
        known = references.places(sample.category, sample.view)
        picks = torch.randint(len(known), (num,), generator=generator_of(sample)).tolist()
        drawn.append(sorted({known[pick] for pick in picks}))
    return drawn
