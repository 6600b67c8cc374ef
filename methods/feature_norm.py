"""FeatureNorm: the training-free detector of ADPretrain (Yao et al., arXiv 2511.05245).

A patch is as anomalous as its feature is large. With plain features that is about chance; with projected residuals, for
which normal patches were trained to be small, it is a detector by itself.

Sizes are those of the official code, A = sqrt(|e| + 1) - 1; the paper writes the pseudo-Huber size
sqrt(|e|^2 + 1) - 1 (`form`). The code gives each test image ten references of its own when features are projected;
which references are used here is up to the representation.

To reach: image AUROC 94.2, AUPRO 89.0 (%) on VisA with projected residuals of ImageBind, 49.2 and 44.5 with plain
features (paper, second-hand).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.contracts import Batch, Context, Inputs, LevelChoice, Prediction, Split

METHOD_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of FeatureNorm; the default is the official code's."""

    form: Literal["root", "pseudo_huber"] = "root"
    """Size of a feature e: `root` is sqrt(|e| + 1) - 1, `pseudo_huber` is sqrt(|e|^2 + 1) - 1."""

    def __post_init__(self) -> None:
        if self.form not in ("root", "pseudo_huber"):
            raise ValueError(f"form must be 'root' or 'pseudo_huber', got {self.form!r}")


_Config = Config  # inside the class below, `Config` is its attribute


class FeatureNorm:
    """Scores are sizes of features, averaged over levels; nothing is fitted."""

    summary = "size of the features, training-free (FeatureNorm of ADPretrain, arXiv 2511.05245)"
    scope = "category"
    backbone_use = "frozen"
    levels = LevelChoice(strides=(4, 8, 16, 32), taps=(0, 1, 2, 3))
    smoothing = 4.0
    score_reduction = "max"
    Config = Config

    @classmethod
    def inputs(cls, config: _Config) -> Inputs:
        """Features of the frozen backbone."""
        return "features"

    def __init__(self, config: _Config, context: Context) -> None:
        self.config, self.context = config, context

    def fit(self, train: Split) -> None:
        """Nothing is fitted."""

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """Mean over levels of the sizes at image size; the image score is left to the harness."""
        assert batch.levels is not None, "the method asked for features"
        maps = []
        for level in batch.levels:
            norm = torch.linalg.vector_norm(level.float(), dim=1, keepdim=True)  # (B, 1, h, w)
            size = (norm if self.config.form == "root" else norm.square()).add(1).sqrt() - 1
            maps.append(F.interpolate(size, size=self.context.image_size, mode="bilinear", align_corners=True)[:, 0])
        return Prediction(anomaly_map=torch.stack(maps).mean(dim=0))

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: nothing is fitted."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes nothing."""


METHOD = FeatureNorm
