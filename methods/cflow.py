"""CFLOW-AD: Gudovskiy, Ishizaka, Kozuka, "Real-Time Unsupervised Anomaly Detection with Localization via Conditional
Normalizing Flows", WACV 2022, arXiv 2107.12571.

Each level of a frozen backbone gets a normalising flow that learns the density of its normal features, given where in
the image they lie. A patch is as anomalous as its features are unlikely, all levels together.

Differences from the paper and its code (gudovskiy/cflow-ad):

- At test time a level's likelihoods are divided by the largest one of the training images, which is kept in the state;
  the official code takes the largest one of all test images, a test statistic. This weighs the levels otherwise.
  `normalise: test_max` does as the official code does, and every row then says so.
- The map is minus the sum over levels, where the official code subtracts the sum from its maximum over the test images:
  the same order of pixels and images, and near zero float32 still tells apart what is very unlikely.
- The official code reports the best epoch on the test images for each metric; here the protocol's `selection` decides.
- A sub-epoch visits every image once, in batches that differ by one image at most; the official code drops the rest of
  the last batch. A batch with fewer fibres than a step wants makes one step of all of them instead of an error.
- A step moves the parameters of its own level's flow alone. With the torch of its time the official optimiser also
  moved the others, by the momentum of their past gradients.
- The image is rotated after the crop, so corners are black also where the official code still had picture to show.
- The official input size differs from category to category (128 to 512); here it is the protocol's.

The fibres of a step are drawn for the whole batch, so the result does not depend on the number of workers.

Preset `adpretrain` is the form of ADPretrain (arXiv 2511.05245): 4096 fibres per step and no rotation.

To reach: image AUROC 98.26, pixel AUROC 98.62, AUPRO 94.60 (%) on MVTec AD with WideResNet50, layers 2 to 4, the best
epoch on the test images and the input sizes above (derived from the gains in the paper's abstract).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.contracts import Batch, Context, Inputs, LevelChoice, Prediction, Share, Split, Trainable
from methods.components.draws import image_generator, step_generator
from methods.components.flows import ConditionalFlow

METHOD_VERSION = 1

ROWS_AT_ONCE = 8192
"""Feature vectors that pass through a flow together outside training."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of CFLOW-AD; the defaults are the paper's."""

    meta_epochs: int = 25
    """The learning rate falls from one to the next, >= 1."""
    sub_epochs: int = 8
    """Passes over the training images in a meta epoch, >= 1."""
    batch_size: int = 32
    """Images whose fibres are mixed, >= 1."""
    fibres: int = 256
    """Feature vectors in an optimiser step, >= 1."""
    learning_rate: float = 2e-4
    """Of Adam, at the top of the cosine, > 0."""
    warm_up_meta_epochs: int = 2
    """Meta epochs in which the rate rises to the cosine, >= 0."""
    coupling_blocks: int = 8
    """In the flow of each level, >= 1."""
    condition_width: int = 128
    """Numbers that say where a feature lies, a multiple of 4."""
    clamp: float = 1.9
    """Bound of the logarithm of a coupling's scale, > 0."""
    rotation_degrees: float = 5.0
    """Training images are rotated by an angle drawn from plus or minus this, in [0, 180]. The backbone must then encode
    every image anew in every epoch; with 0 it never does, as features come from the store."""
    normalise: Literal["train_max", "test_max"] = "train_max"
    """Images whose largest likelihood a level's are divided by: those of training, or, as in the official code, those
    that are scored."""

    def __post_init__(self) -> None:
        for name in ("meta_epochs", "sub_epochs", "batch_size", "fibres", "coupling_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clamp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.warm_up_meta_epochs < 0:
            raise ValueError(f"warm_up_meta_epochs must not be negative, got {self.warm_up_meta_epochs}")
        if self.condition_width < 4 or self.condition_width % 4:
            raise ValueError(f"condition_width must be a positive multiple of 4, got {self.condition_width}")
        if not 0 <= self.rotation_degrees <= 180:
            raise ValueError(f"rotation_degrees must be in [0, 180], got {self.rotation_degrees}")
        if self.normalise not in ("train_max", "test_max"):
            raise ValueError(f"normalise must be 'train_max' or 'test_max', got {self.normalise!r}")


_Config = Config  # inside the class below, `Config` is its attribute


class Cflow:
    """A conditional flow per level; scores are the unlikelihoods of all levels together."""

    summary = "conditional normalising flows on frozen features (CFLOW-AD, arXiv 2107.12571)"
    scope = "category"
    backbone_use = "frozen"
    levels = LevelChoice(strides=(8, 16, 32), taps=(1, 2, 3))
    smoothing = 0.0
    score_reduction = "max"
    Config = Config
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"adpretrain": {"fibres": 4096, "rotation_degrees": 0.0}}
    """Parameters of published variants."""

    @classmethod
    def inputs(cls, config: _Config) -> Inputs:
        """Images if they are to be rotated, otherwise features of the frozen backbone."""
        return "images" if config.rotation_degrees > 0 else "features"

    def __init__(self, config: _Config, context: Context) -> None:
        self.config, self.context = config, context
        shapes = context.level_shapes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed_of("weights"))
            generator = context.generator("rotations")
            self.flows = [
                ConditionalFlow(width, config.condition_width, config.coupling_blocks, config.clamp, generator)
                for width, _, _ in shapes
            ]
            """One per level."""
        self.module = nn.ModuleList(self.flows).to(context.device).eval()
        """The flows as what is trained and saved."""
        self.conditions = [
            encode_positions(config.condition_width, height, width).flatten(1).T.contiguous().to(context.device)
            for _, height, width in shapes
        ]
        """Per level (P, condition width)."""
        self.max_log_likelihood = torch.zeros(len(shapes), device=context.device)
        """Per level the largest log-likelihood of a patch of the images to normalise by, divided by its width."""

    def stages(self) -> list[Trainable]:
        """The training of all flows."""
        return [_FlowTraining(self)]

    def encode(self, batch: Batch, epoch: int | None = None) -> list[Tensor]:
        """(B, D_l, h_l, w_l) features per level; of images rotated as in a training epoch, if one is named."""
        levels: Sequence[Tensor]
        if batch.levels is not None:
            levels = batch.levels
        else:
            assert batch.images is not None, "a batch holds features or images"
            assert self.context.encode is not None, "a frozen backbone encodes"
            images = batch.images.to(self.context.device)
            if epoch is not None:
                images = rotate(images, self._draw_angles(batch, epoch).to(images.device, non_blocking=True))
            with torch.autocast(images.device.type, enabled=False):  # the features of the store are float32, too
                levels = self.context.encode(images)
        return [level.to(self.context.device, non_blocking=True) for level in levels]

    def _draw_angles(self, batch: Batch, epoch: int) -> Tensor:
        """(B,) degrees."""
        draws = [
            torch.rand((), generator=image_generator(self.context, "rotation", sample, epoch))
            for sample in batch.samples
        ]
        return (2 * torch.stack(draws) - 1) * self.config.rotation_degrees

    def _log_likelihoods(self, batch: Batch) -> Iterator[Tensor]:
        """Per level the (B, h, w) log-likelihoods of the patches, divided by the level's width."""
        for flow, level, condition in zip(self.flows, self.encode(batch), self.conditions, strict=True):
            rows = as_rows(level).split(ROWS_AT_ONCE)
            conditions = condition.repeat(len(level), 1).split(ROWS_AT_ONCE)
            values = [flow.log_likelihood(*some) for some in zip(rows, conditions, strict=True)]
            yield torch.cat(values).view(len(level), *level.shape[2:]) / level.shape[1]

    def fit(self, train: Split) -> None:
        """Finds the largest likelihood of each level."""
        self.max_log_likelihood = self._find_largest(train)

    def observes_test(self) -> bool:
        """Whether likelihoods are divided by the largest of the test images."""
        return self.config.normalise == "test_max"

    def observe_test(self, test: Split) -> None:
        """Takes the largest likelihoods of these images instead."""
        self.max_log_likelihood = self._find_largest(test)

    @torch.no_grad()
    def _find_largest(self, images: Split) -> Tensor:
        best = torch.full_like(self.max_log_likelihood, -math.inf)
        for batch in images:
            largest = [values.amax() for values in self._log_likelihoods(batch)]
            best = torch.maximum(best, torch.stack(largest))
        return best

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """Minus the sum over levels of likelihoods, each relative to the level's largest, at image size (corners
        aligned); the image score is left to the harness."""
        total = torch.zeros(len(batch), *self.context.image_size, device=self.context.device)
        for values, largest in zip(self._log_likelihoods(batch), self.max_log_likelihood, strict=True):
            likelihood = (values - largest).exp()[:, None]
            total += F.interpolate(likelihood, self.context.image_size, mode="bilinear", align_corners=True)[:, 0]
        return Prediction(anomaly_map=-total)

    def state_dict(self) -> dict[str, Tensor]:
        """The flows and the largest log-likelihoods."""
        flows = {f"flows.{name}": tensor for name, tensor in self.module.state_dict().items()}
        return flows | {"max_log_likelihood": self.max_log_likelihood}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a method with the same configuration and level shapes."""
        prefix = "flows."
        self.module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        self.max_log_likelihood = state["max_log_likelihood"].to(self.context.device)


class _FlowTraining(Trainable):
    """Many optimiser steps per batch: the fibres of each level in random order, so many at a time."""

    name = "flows"

    def __init__(self, method: Cflow) -> None:
        self.method, self.config, self.module = method, method.config, method.module
        self.epochs = self.config.meta_epochs * self.config.sub_epochs
        self.batch_size = self.config.batch_size
        self.fields = tuple(field.name for field in fields(Config) if field.name != "normalise")

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam over all flows."""
        return [torch.optim.Adam(self.module.parameters(), lr=self.config.learning_rate)]

    def lr_factor(self, progress: float) -> float:
        """A cosine that falls to a thousandth in steps of a meta epoch; before it a line that rises from a tenth to
        where the cosine then is."""
        meta, warm_up = progress / self.config.sub_epochs, self.config.warm_up_meta_epochs
        if meta < warm_up:
            return 0.1 + meta / warm_up * (self._cosine(warm_up) - 0.1)
        return self._cosine(math.floor(meta))

    def _cosine(self, meta_epoch: int) -> float:
        return 0.001 + 0.999 * (1 + math.cos(math.pi * meta_epoch / self.config.meta_epochs)) / 2

    def losses(self, batch: Batch, share: Share) -> Iterator[Tensor]:
        """For each level and each set of fibres the mean of -log sigmoid(log p / D)."""
        levels = self.method.encode(batch, share.epoch)
        for number, (flow, level, conditions) in enumerate(
            zip(self.method.flows, levels, self.method.conditions, strict=True)
        ):
            rows, num_patches = as_rows(level), len(conditions)
            generator = step_generator(self.method.context, f"fibres {number}", share)
            sets = draw_fibres(share, num_patches, self.config.fibres, generator)
            num_fibres = min(self.config.fibres, share.num_images * num_patches)
            # One transfer for all sets.
            for mine in torch.cat(sets).to(rows.device, non_blocking=True).split([len(some) for some in sets]):
                log_likelihood = flow.log_likelihood(rows[mine], conditions[mine % num_patches])
                yield -F.logsigmoid(log_likelihood / rows.shape[1]).sum() / num_fibres


def draw_fibres(share: Share, num_patches: int, num_fibres: int, generator: torch.Generator) -> list[Tensor]:
    """Cuts the patches of the whole batch, in random order, into sets, and picks out this worker's.

    Args:
        share: which images are this worker's.
        num_patches: of an image.
        num_fibres: patches of a set, over all workers; what does not fill a set is left out, unless there is none.
        generator: seeded alike on every worker.

    Returns:
        For each set the int64 rows of its patches among this worker's (images x patches); some may be empty.
    """
    order = torch.randperm(share.num_images * num_patches, generator=generator)
    place = torch.full((share.num_images,), -1)  # of an image among this worker's; -1 for the others'
    place[list(share.positions)] = torch.arange(len(share.positions))
    rows = place[order // num_patches] * num_patches + order % num_patches
    num_sets = max(1, len(rows) // num_fibres)
    return [some[some >= 0] for some in rows[: num_sets * num_fibres].split(num_fibres)]


def as_rows(level: Tensor) -> Tensor:
    """(B, D, h, w) features as (B * h * w, D)."""
    return level.permute(0, 2, 3, 1).flatten(0, 2)


def encode_positions(width: int, num_rows: int, num_columns: int) -> Tensor:
    """Sines and cosines of rows and columns at many wavelengths, the condition of the flows.

    Args:
        width: numbers per position, a multiple of 4: the first half tells the column, the second the row.
        num_rows: of the grid.
        num_columns: of the grid.

    Returns:
        (width, num_rows, num_columns) float32 in [-1, 1].
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(0, half, 2) * (-math.log(1e4) / half))

    def waves(count: int) -> Tensor:
        angles = torch.arange(count)[:, None] * frequencies
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).T  # (half, count)

    columns = waves(num_columns)[:, None, :].expand(-1, num_rows, -1)
    rows = waves(num_rows)[:, :, None].expand(-1, -1, num_columns)
    return torch.cat([columns, rows])


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Rotates each image about its centre, counter-clockwise, nearest pixel, black where there is no picture.

    Args:
        images: (B, C, H, W).
        degrees: (B,) on the same device.

    Returns:
        (B, C, H, W).
    """
    height, width = images.shape[2:]
    cosine, sine = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    zero = torch.zeros_like(cosine)
    # The grid's coordinates go from -1 to 1 on both axes, hence the ratios of the sides.
    theta = torch.stack(
        [
            torch.stack([cosine, -sine * (height / width), zero], dim=1),
            torch.stack([sine * (width / height), cosine, zero], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


METHOD = Cflow
