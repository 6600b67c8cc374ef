"""A memory bank of normal patch features, as PatchCore (arXiv 2106.08265) has it, on levels that are given to it.

Patches of normal images are thinned by greedy k-centre selection; a patch is as anomalous as it is far from its nearest
entry, an image as anomalous as its worst patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.contracts import Context
from methods.components.coreset import CoresetCache, draw_projection
from methods.components.levels import float64_device
from methods.components.neighbours import MemoryIndex
from methods.components.patches import PatchEmbedding, average_and_concatenate, pool_patches

FLOATS_AT_ONCE = 2**23
"""Patch features held at once besides the coreset's, 32 MiB."""

CORESETS = CoresetCache(capacity=32)
"""Shared by the cells of a process: other ratios, neighbours or scores reuse a selection."""


@dataclass(frozen=True, kw_only=True)
class BankSettings:
    """How patches are made, chosen and compared; the defaults are those of PatchCore's official code."""

    coreset_ratio: float = 0.1
    """Fraction of the patch features kept in the memory bank, in (0, 1]; 1 keeps all."""
    projection: int | None = 128
    """Dimensions of the random projection for the coreset's distances; None for the features themselves."""
    num_starting_points: int = 10
    """Random patches whose mean distance stands in for the first centre of the coreset, >= 1."""
    aggregation: Literal["auto", "official", "concat"] = "auto"
    """`official`: patches are pooled to `embed_width`, levels together to `target_width` numbers. `concat`: each level
    is averaged over the patch and the levels are laid end to end. `auto`: official, but concat where some level is so
    narrow that the official pooling would stretch it instead of averaging anything."""
    patch_size: int = 3
    """Side of the neighbourhood, odd, >= 1."""
    embed_width: int = 1024
    """Numbers that a level's patch is pooled to (`pretrain_embed_dimension`), for `aggregation: official`."""
    target_width: int = 1024
    """Numbers that all levels of a patch are pooled to (`target_embed_dimension`), for `aggregation: official`."""
    num_neighbours: int = 1
    """Entries of the memory bank whose mean distance is a patch's score, >= 1."""
    distance: Literal["squared", "euclidean"] = "squared"
    """`squared` is what the official code's index returns. It leaves the order of patches as it is, but not that of
    interpolated and smoothed maps."""
    reweighting: bool = False
    """Weighs the image score by how rare the nearest entry is in the memory bank (equation 7). Maps stay the same."""
    num_reweighting_neighbours: int = 9
    """Entries around the nearest one that make the crowd, itself included, >= 2."""

    def __post_init__(self) -> None:
        if not 0 < self.coreset_ratio <= 1:
            raise ValueError(f"coreset_ratio must be in (0, 1], got {self.coreset_ratio}")
        if self.patch_size < 1 or self.patch_size % 2 == 0:
            raise ValueError(f"patch_size must be odd and positive, got {self.patch_size}")
        if self.aggregation not in ("auto", "official", "concat"):
            raise ValueError(f"aggregation must be 'auto', 'official' or 'concat', got {self.aggregation!r}")
        if self.distance not in ("squared", "euclidean"):
            raise ValueError(f"distance must be 'squared' or 'euclidean', got {self.distance!r}")
        if self.projection is not None and self.projection < 1:
            raise ValueError(f"projection must be positive, or null for none, got {self.projection}")
        for name in ("num_starting_points", "embed_width", "target_width", "num_neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_reweighting_neighbours < 2:
            raise ValueError(f"num_reweighting_neighbours must be at least 2, got {self.num_reweighting_neighbours}")


class MemoryBank:
    """A coreset of normal patch features, and distances to it."""

    def __init__(self, widths: Sequence[int], settings: BankSettings, context: Context) -> None:
        """Args: channels per level; how patches are made, chosen and compared; device and draws."""
        wide_enough = min(widths) * settings.patch_size**2 >= settings.embed_width
        official = settings.aggregation == "official" or (settings.aggregation == "auto" and wide_enough)
        embedding = (
            pool_patches(widths, settings.patch_size, settings.embed_width, settings.target_width)
            if official
            else average_and_concatenate(widths, settings.patch_size)
        )
        self.settings, self.context = settings, context
        self.device = float64_device(context.device)
        self.embedding = embedding.to(self.device)
        self.index: MemoryIndex | None = None
        """The entries (M, E), in the order in which they were chosen, ready to be searched."""

    @torch.no_grad()
    def fit(self, levels: Sequence[Tensor]) -> None:
        """Chooses the entries among all patches of the (N, D_l, h_l, w_l) levels of the normal images.

        The projected patch features are held at once, the patch features themselves are computed in chunks and a
        second time for those that are kept.
        """
        num_patches = len(levels[0]) * levels[0].shape[2] * levels[0].shape[3]
        num_kept = max(1, int(num_patches * self.settings.coreset_ratio))
        chosen: Tensor | None = None
        if num_kept < num_patches:
            features = self._embed(levels, self._coreset_embedding(), None)
            order = torch.randperm(num_patches, generator=self.context.generator("coreset"))
            chosen = CORESETS.select(features, num_kept, order[: self.settings.num_starting_points])
            del features
        self.restore(self._embed(levels, self.embedding, chosen))

    def restore(self, entries: Tensor) -> None:
        """Takes over (M, E) entries."""
        self.index = MemoryIndex(entries.to(self.device), self.settings.num_neighbours)

    @property
    def entries(self) -> Tensor:
        """(M, E) features. Raises RuntimeError before `fit` or `restore`."""
        return self._ready().memory_bank

    @torch.no_grad()
    def score(self, levels: Sequence[Tensor], factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances of every patch to its nearest entries.

        Args:
            levels: (B, D_l, h_l, w_l).
            factor: (B, H, W) >= 0 by which scores are multiplied, averaged over each patch; None for 1.

        Returns:
            (B, h, w) scores on the first level's grid, and (B,) the largest of each image.
        """
        index, settings = self._ready(), self.settings
        patches = self.embedding([level.to(self.device) for level in levels])
        grid, queries = patches.shape[:3], patches.flatten(0, 2)
        distances, entries = index.nearest(queries, min(settings.num_neighbours, index.num_rows))
        scores = (distances.square() if settings.distance == "squared" else distances).mean(dim=1).unflatten(0, grid)
        if factor is not None:
            scores = scores * F.adaptive_avg_pool2d(factor.to(scores), (grid[1], grid[2]))
        image_score, worst = scores.flatten(1).max(dim=1)
        if settings.reweighting:
            worst = worst + torch.arange(grid[0], device=worst.device) * (grid[1] * grid[2])
            image_score = image_score * rarity(
                index, queries[worst], entries[worst, 0], settings.num_reweighting_neighbours
            )
        return scores, image_score

    def _coreset_embedding(self) -> PatchEmbedding:
        """Patch features as the coreset measures them."""
        width, dim = self.embedding.width, self.settings.projection
        if dim is None or dim >= width:
            return self.embedding
        matrix = draw_projection(width, dim, self.context.generator("projection"))
        return self.embedding.project(matrix.to(self.device))

    def _embed(self, levels: Sequence[Tensor], embedding: PatchEmbedding, rows: Tensor | None) -> Tensor:
        """(N * P, F) features of all patches, or the (M, F) given rows of them."""
        per_image = levels[0].shape[2] * levels[0].shape[3]
        step = max(1, FLOATS_AT_ONCE // (per_image * embedding.width))
        total = len(levels[0]) * per_image
        features = torch.empty(total if rows is None else len(rows), embedding.width, device=self.device)
        for begin in range(0, len(levels[0]), step):
            chunk = embedding([level[begin : begin + step].to(self.device) for level in levels]).flatten(0, 2)
            first = begin * per_image
            if rows is None:
                features[first : first + len(chunk)] = chunk
            else:
                here = ((rows >= first) & (rows < first + len(chunk))).nonzero()[:, 0]
                features[here] = chunk[rows[here] - first]
        return features

    def _ready(self) -> MemoryIndex:
        if self.index is None:
            raise RuntimeError("fit the method, or load a fitted state, before predicting")
        return self.index


def bank_bytes(settings: BankSettings, level_shapes: Sequence[tuple[int, int, int]], num_images: int) -> int:
    """Bytes at most held by `MemoryBank.fit` for so many images with (D, h, w) levels: the levels, and beside them the
    projected patches of which the coreset is chosen, or the memory bank that is made of it, twice while it is indexed.
    """
    patches = num_images * level_shapes[0][1] * level_shapes[0][2]
    levels = num_images * sum(depth * height * width for depth, height, width in level_shapes)
    official = settings.aggregation == "official"
    width = settings.target_width if official else sum(depth for depth, _, _ in level_shapes)
    projected = 0 if settings.coreset_ratio == 1 else patches * min(width, settings.projection or width)
    bank = 2 * max(1, int(patches * settings.coreset_ratio)) * width
    return 4 * (levels + max(projected, bank) + 4 * FLOATS_AT_ONCE)


def rarity(index: MemoryIndex, worst: Tensor, entry: Tensor, num_crowd: int) -> Tensor:
    """(B,) weights of PatchCore's equation 7: one minus the softmax, at the nearest entry, of the worst patch's
    distances to that entry and its neighbours in the memory bank, `num_crowd` together."""
    _, crowd = index.nearest(index.memory_bank[entry], min(num_crowd, index.num_rows))
    crowd = torch.where(crowd == entry[:, None], crowd[:, :1], crowd)  # the entry comes first, but for an equal one
    crowd[:, 0] = entry
    distances = torch.linalg.vector_norm(worst[:, None] - index.memory_bank[crowd], dim=2)
    return 1 - distances.softmax(dim=1)[:, 0]
