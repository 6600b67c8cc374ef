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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from harness.contracts import Batch, Context, Inputs, LevelChoice, Prediction, Split
from methods.components.levels import collect_levels
from methods.components.memory_bank import BankSettings, MemoryBank, bank_bytes

METHOD_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config(BankSettings):
    """Settings of PatchCore; the defaults are those of the official code for the paper's main table."""


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

    @classmethod
    def fit_bytes(cls, config: _Config, level_shapes: Sequence[tuple[int, int, int]], num_images: int) -> int:
        """Bytes at most held by a fit of so many images with (D, h, w) levels."""
        return bank_bytes(config, level_shapes, num_images)

    def __init__(self, config: _Config, context: Context) -> None:
        self.bank = MemoryBank([width for width, _, _ in context.level_shapes], config, context)

    def fit(self, train: Split) -> None:
        """Selects the memory bank from all patches of the normal images, whose levels are held at once."""
        self.bank.fit(collect_levels(train))

    def predict(self, batch: Batch) -> Prediction:
        """Distances of every patch to the memory bank; the image score is that of the worst patch."""
        assert batch.levels is not None, "the method asked for features"
        anomaly_map, image_score = self.bank.score(batch.levels)
        return Prediction(anomaly_map=anomaly_map, image_score=image_score)

    def state_dict(self) -> dict[str, Tensor]:
        """The memory bank."""
        return {"memory_bank": self.bank.entries}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the memory bank of a method with the same configuration and level shapes."""
        self.bank.restore(state["memory_bank"])


METHOD = PatchCore
