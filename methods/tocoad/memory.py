"""The memory bank of ToCoAD: PatchCore's (arXiv 2106.08265), on levels that are given to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.contracts import Context
from methods.components.coreset import CoresetCache, draw_projection
from methods.components.levels import float64_device
from methods.components.neighbours import MemoryIndex
from methods.components.patches import PatchEmbedding, average_and_concatenate, pool_patches
from methods.tocoad.settings import Config

FLOATS_AT_ONCE = 2**23
"""Patch features held at once besides the coreset's, 32 MiB."""
NUM_STARTING_POINTS = 10
"""Random patches whose mean distance stands in for the first centre of the coreset, as in PatchCore's code."""
NUM_CROWD = 9
"""Entries around the nearest one that tell how rare it is, itself included; PatchCore's."""

CORESETS = CoresetCache(capacity=32)
"""Shared by the cells of a process: other ratios, neighbours or scores reuse a selection."""


class MemoryBank:
    """A coreset of normal patch features, and distances to it."""

    def __init__(self, widths: Sequence[int], config: Config, context: Context) -> None:
        """Args: channels per level; how patches are made, chosen and compared; device and draws."""
        wide_enough = min(widths) * config.patch_size**2 >= config.embed_width
        embedding = (
            pool_patches(widths, config.patch_size, config.embed_width, config.target_width)
            if wide_enough
            else average_and_concatenate(widths, config.patch_size)
        )
        self.config, self.context = config, context
        self.device = float64_device(context.device)
        self.embedding = embedding.to(self.device)
        self.index: MemoryIndex | None = None
        """The entries (M, E), in the order in which they were chosen, ready to be searched."""

    @torch.no_grad()
    def fit(self, levels: Sequence[Tensor]) -> None:
        """Chooses the entries among all patches of the (N, D_l, h_l, w_l) levels of the normal images."""
        num_patches = len(levels[0]) * levels[0].shape[2] * levels[0].shape[3]
        num_kept = max(1, int(num_patches * self.config.coreset_ratio))
        chosen: Tensor | None = None
        if num_kept < num_patches:
            features = self._embed(levels, self._coreset_embedding(), None)
            order = torch.randperm(num_patches, generator=self.context.generator("coreset"))
            chosen = CORESETS.select(features, num_kept, order[:NUM_STARTING_POINTS])
            del features
        self.restore(self._embed(levels, self.embedding, chosen))

    def restore(self, entries: Tensor) -> None:
        """Takes over (M, E) entries."""
        self.index = MemoryIndex(entries.to(self.device), self.config.num_neighbours)

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
        index, config = self._ready(), self.config
        patches = self.embedding([level.to(self.device) for level in levels])
        grid, queries = patches.shape[:3], patches.flatten(0, 2)
        distances, entries = index.nearest(queries, min(config.num_neighbours, index.num_rows))
        scores = (distances.square() if config.distance == "squared" else distances).mean(dim=1).unflatten(0, grid)
        if factor is not None:
            scores = scores * F.adaptive_avg_pool2d(factor.to(scores), (grid[1], grid[2]))
        image_score, worst = scores.flatten(1).max(dim=1)
        if config.reweighting:
            worst = worst + torch.arange(grid[0], device=worst.device) * (grid[1] * grid[2])
            image_score = image_score * _rarity(index, queries[worst], entries[worst, 0])
        return scores, image_score

    def _coreset_embedding(self) -> PatchEmbedding:
        """Patch features as the coreset measures them."""
        width, dim = self.embedding.width, self.config.projection
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


def _rarity(index: MemoryIndex, worst: Tensor, entry: Tensor) -> Tensor:
    """(B,) weights of PatchCore's equation 7: one minus the softmax, at the nearest entry, of the worst patch's
    distances to that entry and its neighbours in the memory bank."""
    _, crowd = index.nearest(index.memory_bank[entry], min(NUM_CROWD, index.num_rows))
    crowd = torch.where(crowd == entry[:, None], crowd[:, :1], crowd)  # the entry comes first, but for an equal one
    crowd[:, 0] = entry
    distances = torch.linalg.vector_norm(worst[:, None] - index.memory_bank[crowd], dim=2)
    return 1 - distances.softmax(dim=1)[:, 0]
