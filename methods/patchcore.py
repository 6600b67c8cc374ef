"""PatchCore: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, arXiv 2106.08265.

Patch features of normal images are thinned to a memory bank by greedy k-centre selection. A patch is as anomalous as it
is far from its nearest entry, an image as anomalous as its worst patch.

`Config()` is what the official code (amazon-science/patchcore-inspection) ran for the paper's main table: 3 x 3 patches
pooled to 1024 and 1024 numbers, 10 % coreset with distances in 128 random dimensions, one neighbour, squared distances.
The paper's other forms are options: `reweighting` (its equation 7, which the official code leaves out) and
`distance="euclidean"`; `aggregation="concat"` and `projection=None` are the choices of anomalib.

Differences from the paper and its code:

- The selection is exact where theirs is in float32; given the same start it makes the same choices but for ties.
- Patch features come out in fewer numbers where pooling would only repeat them (`methods.components.patches`), with
  the same distances; a projection to as many or more dimensions than the features have is left out.
- Distances are exact differences, free of the cancellation that an index by inner products suffers for near matches.
- Backbones with levels narrower than the paper's, such as EfficientNet-Lite0, average patches as anomalib does
  (`aggregation: auto`): the official pooling would only repeat their numbers, nine positions side by side.
- Starting points and projection are drawn per dataset, category, shots and seed, so that ratios of one seed are nested.

To reach: image AUROC 99.2, pixel AUROC 98.1, AUPRO 94.4 (%) on MVTec AD with WideResNet50, layers 2 and 3, resize 256,
crop 224: `search_spaces/patchcore_mvtec.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness.contracts import Batch, Context, Inputs, LevelChoice, Prediction, Split
from methods.components.coreset import CoresetCache, draw_projection
from methods.components.levels import collect_levels, float64_device
from methods.components.neighbours import MemoryIndex
from methods.components.patches import PatchEmbedding, average_and_concatenate, pool_patches

METHOD_VERSION = 1

FLOATS_AT_ONCE = 2**23
"""Patch features held at once besides the coreset's, 32 MiB."""

CORESETS = CoresetCache(capacity=32)
"""Shared by the cells of a process: other ratios, neighbours or scores reuse a selection."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of PatchCore; the defaults are those of the official code for the paper's main table."""

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


_Config = Config  # inside the class below, `Config` is its attribute


class PatchCore:
    """A memory bank of normal patches; scores are distances to it."""

    summary = "nearest patch of a coreset memory bank (PatchCore, arXiv 2106.08265)"
    scope = "category"
    backbone_use = "frozen"
    levels = LevelChoice(strides=(8, 16), taps=(1, 2, 3))
    smoothing = 4.0
    score_reduction = "max"
    Config = Config
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"adpretrain": {"aggregation": "official"}}
    """What ADPretrain's code (arXiv 2511.05245) has: the official settings, for levels of any width."""

    @classmethod
    def inputs(cls, config: _Config) -> Inputs:
        """Features of the frozen backbone."""
        return "features"

    def __init__(self, config: _Config, context: Context) -> None:
        self.config, self.context = config, context
        widths = [width for width, _, _ in context.level_shapes]
        official = config.aggregation == "official" or (
            config.aggregation == "auto" and min(widths) * config.patch_size**2 >= config.embed_width
        )
        embedding = (
            pool_patches(widths, config.patch_size, config.embed_width, config.target_width)
            if official
            else average_and_concatenate(widths, config.patch_size)
        )
        self.device = float64_device(context.device)
        self.embedding = embedding.to(self.device)
        self.index: MemoryIndex | None = None
        """The memory bank (M, E), in the order in which its patches were chosen, ready to be searched."""

    @torch.no_grad()
    def fit(self, train: Split) -> None:
        """Selects the memory bank from all patches of the normal images.

        The levels of all images and the projected patch features are held at once, the patch features themselves are
        computed in chunks and a second time for those that are kept.
        """
        levels = collect_levels(train)
        num_patches = len(levels[0]) * levels[0].shape[2] * levels[0].shape[3]
        num_kept = max(1, int(num_patches * self.config.coreset_ratio))
        if num_kept == num_patches:
            self.index = MemoryIndex(self._embed_all(levels, self.embedding, None), self.config.num_neighbours)
            return
        coreset_features = self._embed_all(levels, self._coreset_embedding(), None)
        num_starts = min(num_patches, self.config.num_starting_points)
        starts = torch.randperm(num_patches, generator=self.context.generator("coreset"))[:num_starts]
        chosen = CORESETS.select(coreset_features, num_kept, starts)
        del coreset_features
        self.index = MemoryIndex(self._embed_all(levels, self.embedding, chosen), self.config.num_neighbours)

    def _coreset_embedding(self) -> PatchEmbedding:
        """Patch features as the coreset measures them."""
        width, dim = self.embedding.width, self.config.projection
        if dim is None or dim >= width:
            return self.embedding
        matrix = draw_projection(width, dim, self.context.generator("projection"))
        return self.embedding.project(matrix.to(self.device))

    def _embed_all(self, levels: list[Tensor], embedding: PatchEmbedding, rows: Tensor | None) -> Tensor:
        """(N * P, F) features of all patches of all images, or the (M, F) given rows of them."""
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

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """Distances of every patch to the memory bank; the image score is that of the worst patch."""
        assert batch.levels is not None, "the method asked for features"
        index = self._fitted_index()
        patches = self.embedding([level.to(self.device) for level in batch.levels])
        grid, queries = patches.shape[:3], patches.flatten(0, 2)
        distances, entries = index.nearest(queries, min(self.config.num_neighbours, index.num_rows))
        scores = (distances.square() if self.config.distance == "squared" else distances).mean(dim=1)
        anomaly_map = scores.unflatten(0, grid)
        image_score, worst = anomaly_map.flatten(1).max(dim=1)
        if self.config.reweighting:
            worst = worst + torch.arange(grid[0], device=worst.device) * (grid[1] * grid[2])
            image_score = image_score * self._rarity(index, queries[worst], entries[worst, 0])
        return Prediction(anomaly_map=anomaly_map, image_score=image_score)

    def _rarity(self, index: MemoryIndex, worst: Tensor, entry: Tensor) -> Tensor:
        """(B,) weights of equation 7: one minus the softmax, at the nearest entry, of the worst patch's distances
        to that entry and its neighbours in the memory bank."""
        _, crowd = index.nearest(index.memory_bank[entry], min(self.config.num_reweighting_neighbours, index.num_rows))
        # The entry comes first, but for an equal one with a lower index.
        crowd = torch.where(crowd == entry[:, None], crowd[:, :1], crowd)
        crowd[:, 0] = entry
        distances = torch.linalg.vector_norm(worst[:, None] - index.memory_bank[crowd], dim=2)
        return 1 - distances.softmax(dim=1)[:, 0]

    def _fitted_index(self) -> MemoryIndex:
        if self.index is None:
            raise RuntimeError("fit the method, or load a fitted state, before predicting")
        return self.index

    def state_dict(self) -> dict[str, Tensor]:
        """The memory bank."""
        return {"memory_bank": self._fitted_index().memory_bank}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the memory bank of a method with the same configuration and level shapes."""
        self.index = MemoryIndex(state["memory_bank"].to(self.device), self.config.num_neighbours)


METHOD = PatchCore
