"""PaDiM: Defard et al., "a Patch Distribution Modeling Framework for Anomaly Detection and Localization", ICPR 2020
workshops, arXiv 2011.08785.

Each position of the feature maps gets a Gaussian, fitted to the features of all levels at that position in the normal
images. A patch is as anomalous as its Mahalanobis distance to the Gaussian of its position.

Differences from the paper:

- The random channels are drawn per dataset, category, shots and seed; the common implementation
  (xiahaifeng1995/PaDiM-Anomaly-Detection-Localization-master) uses one draw for all categories.
- The paper names the number of channels for two backbones only; `Config.num_channels` says what holds for others.
- Gaussians are exact in float64 and no covariance is inverted (`methods.components.gaussian`).

`combine="per_level"` with `num_channels="all"` is the form of ADPretrain (arXiv 2511.05245): a Gaussian per level and
position on all its channels, the levels' maps averaged at image size.

To reach: pixel AUROC 97.5, AUPRO 92.1, image AUROC 95.3 (%) on MVTec AD with WideResNet50, layers 1 to 3, 550 channels,
and pixel AUROC 96.7, AUPRO 90.1 with ResNet18, 100 channels; resize 256, crop 224:
`search_spaces/padim_mvtec.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.contracts import Batch, Context, Inputs, LevelChoice, Prediction, Split
from methods.components.gaussian import CholeskyGaussians, SampleGaussians, fit_gaussians, load_gaussians
from methods.components.levels import collect_levels, float64_device

METHOD_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of PaDiM; the defaults are the paper's."""

    num_channels: int | Literal["all"] | None = None
    """Channels drawn at random from those of all levels together; a number above theirs is an error. None: the
    paper's 100 of 448 (ResNet18) and 550 of 1792 (WideResNet50), on a straight line in between, 100 (or all, if
    there are fewer) below and 550 above, since the paper finds few channels enough and the cost grows with their
    square."""
    epsilon: float = 0.01
    """Added to the diagonal of every covariance, > 0."""
    combine: Literal["concat", "per_level"] = "concat"
    """`concat`: one Gaussian over the channels of all levels, on the grid of the first. `per_level`: one for each
    level on its own grid, distances resized bilinearly (corners aligned) to the image and averaged."""

    def __post_init__(self) -> None:
        if isinstance(self.num_channels, str) and self.num_channels != "all":
            raise ValueError(f"num_channels must be a number, 'all' or null, got {self.num_channels!r}")
        if isinstance(self.num_channels, int) and self.num_channels < 1:
            raise ValueError(f"num_channels must be at least 1, got {self.num_channels}")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {self.epsilon}")
        if self.combine not in ("concat", "per_level"):
            raise ValueError(f"combine must be 'concat' or 'per_level', got {self.combine!r}")


def count_channels(config: Config, available: int) -> int:
    """How many of the available channels are used; see `Config.num_channels`."""
    if config.num_channels == "all":
        return available
    if config.num_channels is None:
        between = 100 + (available - 448) * (550 - 100) / (1792 - 448)
        return min(available, round(min(max(between, 100), 550)))
    if config.num_channels > available:
        raise ValueError(f"num_channels is {config.num_channels}, but the levels have {available} channels together")
    return config.num_channels


_Config = Config  # inside the class below, `Config` is its attribute


class Padim:
    """A Gaussian per position; scores are Mahalanobis distances."""

    summary = "Mahalanobis distance to a Gaussian per position (PaDiM, arXiv 2011.08785)"
    scope = "category"
    backbone_use = "frozen"
    levels = LevelChoice(strides=(4, 8, 16), taps=(0, 1, 2, 3))
    smoothing = 4.0
    score_reduction = "max"
    Config = Config
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "adpretrain": {"num_channels": "all", "combine": "per_level"},
    }
    """What ADPretrain's code (arXiv 2511.05245) has: a Gaussian per level over all its channels."""

    @classmethod
    def inputs(cls, config: _Config) -> Inputs:
        """Features of the frozen backbone."""
        return "features"

    @classmethod
    def fit_bytes(cls, config: _Config, level_shapes: Sequence[tuple[int, int, int]], num_images: int) -> int:
        """Bytes at most held by a fit of so many images with (D, h, w) levels: the chosen channels of all levels, and
        the Gaussians in float64."""
        available = sum(depth for depth, _, _ in level_shapes)
        share = count_channels(config, available) / available
        sizes = [(depth * share, height * width) for depth, height, width in level_shapes]
        levels = num_images * sum(depth * positions for depth, positions in sizes)
        gaussians = 0.0
        for number, (depth, positions) in enumerate(sizes):
            coarser = sum(other for other, _ in sizes[number:]) if config.combine == "concat" else depth
            gaussians += positions * depth * min(coarser, 2.0 * num_images)
        return int(4 * levels + 8 * gaussians)

    def __init__(self, config: _Config, context: Context) -> None:
        self.config, self.context = config, context
        self.channels = self._draw_channels()
        """Per level, the channels that are used, ascending."""
        self.gaussians: list[CholeskyGaussians | SampleGaussians] = []
        """One over all levels, or one per level."""
        self.device = float64_device(context.device)

    def _draw_channels(self) -> list[Tensor]:
        widths = [width for width, _, _ in self.context.level_shapes]
        permutation = torch.randperm(sum(widths), generator=self.context.generator("channels"))
        chosen = permutation[: count_channels(self.config, sum(widths))].sort().values
        ends = torch.tensor(widths).cumsum(0)
        return [
            chosen[(chosen >= end - width) & (chosen < end)] - (end - width)
            for width, end in zip(widths, ends, strict=True)
        ]

    def _groups(self, levels: list[Tensor]) -> list[list[Tensor]]:
        """The levels that share Gaussians: all of them, or each by itself if it has any channel."""
        if self.config.combine == "concat":
            return [levels]
        return [[level] for level in levels if level.shape[1]]

    @torch.no_grad()
    def fit(self, train: Split) -> None:
        """Fits the Gaussians to all normal images."""
        levels = [level.to(self.device) for level in collect_levels(train, self.channels)]
        self.gaussians = [fit_gaussians(group, self.config.epsilon) for group in self._groups(levels)]

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """Mahalanobis distances at every position; the image score is left to the harness."""
        assert batch.levels is not None, "the method asked for features"
        levels = [level[:, some].to(self.device) for level, some in zip(batch.levels, self.channels, strict=True)]
        maps = [
            gaussians.distances(group).float()
            for gaussians, group in zip(self.gaussians, self._groups(levels), strict=True)
        ]
        if self.config.combine == "per_level":
            size = self.context.image_size
            maps = [F.interpolate(m[:, None], size=size, mode="bilinear", align_corners=True)[:, 0] for m in maps]
        return Prediction(anomaly_map=torch.stack(maps).mean(dim=0))

    def state_dict(self) -> dict[str, Tensor]:
        """Channels, and the tensors of every Gaussian under its number."""
        state = {f"channels.{level}": channels for level, channels in enumerate(self.channels)}
        for group, gaussians in enumerate(self.gaussians):
            state |= {f"gaussians.{group}.{name}": tensor for name, tensor in gaussians.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a method fitted with the same configuration and level shapes."""
        self.channels = [state[f"channels.{level}"].cpu() for level in range(len(self.context.level_shapes))]
        grids = [(height, width) for _, height, width in self.context.level_shapes]
        used = [level for level, channels in enumerate(self.channels) if len(channels)]
        groups = [grids] if self.config.combine == "concat" else [[grids[level]] for level in used]
        self.gaussians = []
        for group, group_grids in enumerate(groups):
            prefix = f"gaussians.{group}."
            part = {key[len(prefix) :]: value.to(self.device) for key, value in state.items() if key.startswith(prefix)}
            self.gaussians.append(load_gaussians(part, group_grids, self.config.epsilon))


METHOD = Padim
