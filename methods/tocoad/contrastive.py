"""Stage II of ToCoAD: the backbone learns that views of a normal image agree and that anomalies do not."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.contracts import Batch, Context, Share, Split, Trainable
from methods.components.collectives import SharedBatchNorm, sum_over_workers
from methods.tocoad.anomalies import Painter
from methods.tocoad.discriminative import Guide
from methods.tocoad.settings import CONTRAST_FIELDS, GUIDE_FIELDS, Config
from methods.tocoad.spread import Spread


def agreement_loss(first_p: Tensor, first_z: Tensor, second_p: Tensor, second_z: Tensor) -> Tensor:
    """How little the predictions from two views tell of each other's targets; no gradient reaches the targets.

    -1/2 cos(p1, sg z2) - 1/2 cos(p2, sg z1) at every place (SimSiam, arXiv 2011.10566, equation 4). BYOL's loss (arXiv
    2006.07733, equation 2) is 2 - 2 cos, which has four times its gradient when symmetrised by a sum.

    Args:
        first_p: (B, E, h, w) predictions from the first views.
        first_z: (B, E, h, w) targets of the first views.
        second_p: the same from the second views.
        second_z: the same of the second views.

    Returns:
        (B,) mean over the places of an image, in [-1, 1].
    """
    return -0.5 * (similarity(first_p, second_z) + similarity(second_p, first_z)).mean(dim=(1, 2))


def parting_loss(anomalous_p: Tensor, normal_z: Tensor, weights: Tensor, margin: float) -> Tensor:
    """How alike predictions from anomalous places are to the normal targets there; none of it moves the targets.

    max(0, cos(p_a, sg z) - margin) at every place, times the guide's weight. This form is ours.

    Args:
        anomalous_p: (B, E, h, w) predictions from images with anomalies.
        normal_z: (B, E, h, w) targets of normal views of the same images.
        weights: (B, h, w) in [0, 1], how sure the guide is of an anomaly.
        margin: cosine that is far enough.

    Returns:
        (B,) sum over the places of an image, >= 0.
    """
    return (weights * F.relu(similarity(anomalous_p, normal_z) - margin)).sum(dim=(1, 2))


def similarity(predicted: Tensor, target: Tensor) -> Tensor:
    """(B, E, h, w) predictions and targets to their (B, h, w) float32 cosines; no gradient reaches the targets."""
    return F.cosine_similarity(predicted.float(), target.detach().float(), dim=1)


class ContrastNetwork(nn.Module):
    """The backbone in training, with projectors and predictors for the levels that are compared."""

    def __init__(self, backbone: nn.Module, widths: Sequence[int], levels: Sequence[int], config: Config) -> None:
        """Args: the backbone, taken over; channels and indices of its levels to compare; the rest of the shape."""
        super().__init__()
        self.levels = list(levels)
        self.backbone = backbone
        self.projectors = nn.ModuleList(_projector(width, config) for width in widths)
        self.predictors = nn.ModuleList(
            _predictor(config.projector_width if config.projector_layers else width, config) for width in widths
        )
        self.target: nn.ModuleList | None = None
        """Backbone and projectors as a moving average, for `byol` alone."""
        if config.contrast == "byol":
            self.target = nn.ModuleList(copy.deepcopy(part) for part in self._averaged())
            self.target.requires_grad_(False)

    def project(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(B, 3, H, W) images to (B, D_l, h_l, w_l) maps of the levels compared, and their (B, E, h_l, w_l) z."""
        return _project(images, self.backbone, self.projectors, self.levels)

    @torch.no_grad()
    def project_targets(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) images to the (B, E, h_l, w_l) z of the moving average."""
        assert self.target is not None, "there is a moving average"
        backbone, projectors = self.target
        assert isinstance(projectors, nn.ModuleList)
        return _project(images, backbone, projectors, self.levels)[1]

    def predict(self, projected: Sequence[Tensor]) -> list[Tensor]:
        """Per level (B, E, h_l, w_l) z to p of the same shape."""
        return [predictor(maps) for predictor, maps in zip(self.predictors, projected, strict=True)]

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """Moves the target's parameters towards the network's: momentum of their own value, the rest of the new."""
        if self.target is not None:
            for own, other in zip(self.target, self._averaged(), strict=True):
                for target, source in zip(own.parameters(), other.parameters(), strict=True):
                    target.lerp_(source, 1 - momentum)

    def _averaged(self) -> tuple[nn.Module, nn.Module]:
        return self.backbone, self.projectors


class ContrastiveStage(Trainable):
    """Trains the backbone; the guide says where images with synthetic anomalies are anomalous."""

    name = "contrastive"

    def __init__(self, network: ContrastNetwork, guide: Guide | None, config: Config, context: Context) -> None:
        """Args: what is trained; who weighs the negative term, None for no such term."""
        self.module, self.guide, self.config, self.context = network, guide, config, context
        self.epochs, self.batch_size = config.contrast_epochs, config.contrast_batch_size
        self.painter = Painter(config, context)
        self.fields: tuple[str, ...] = CONTRAST_FIELDS if guide is None else GUIDE_FIELDS + CONTRAST_FIELDS
        """Settings that its result depends on, those of the stage before included."""
        self.watched: dict[str, list[float]] = {}
        """Spread of normalised features in every epoch, 0 (all equal) to 1 (evenly in all directions): of the backbone
        as `feature_std_L` and where views are compared as `projection_std_L`, L counted from 1."""
        self.warnings: list[str] = []
        """What a reader must be told: each spread that fell below the threshold, once."""
        self._spreads: dict[str, Spread] = {}
        self._num_images, self._num_seen = 0, 0

    def configure_optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """AdamW with one rate for the backbone and one for the heads."""
        network, config = self.module, self.config
        heads = [*network.projectors.parameters(), *network.predictors.parameters()]
        groups = [{"params": [p for p in network.backbone.parameters() if p.requires_grad], "lr": config.backbone_lr}]
        if heads:
            groups.append({"params": heads, "lr": config.head_lr})
        return [torch.optim.AdamW(groups, weight_decay=config.weight_decay)]

    def lr_factor(self, progress: float) -> float:
        """Half a cosine, from 1 to 0."""
        return 0.5 + 0.5 * math.cos(math.pi * progress / self.epochs)

    def begin_epoch(self, train: Split, epoch: int) -> None:
        """Shows the painter the images that it may take patches from, and begins to watch anew."""
        self.painter.sources = train
        self._num_images, self._num_seen = len(train), 0
        self._spreads = {}

    def losses(self, batch: Batch, share: Share) -> Iterator[Tensor]:
        """Yields once: agreement of normal views, and with a guide the parting of anomalies, mean over levels."""
        network, config = self.module, self.config
        views = self._draw(batch, share)  # first, second, and with a guide anomalous
        num = len(views[0])
        levels, z = network.project(torch.cat(views))
        p = network.predict(z)
        targets = z if network.target is None else network.project_targets(torch.cat(views[:2]))
        weights = None if self.guide is None else self.guide(views[2])
        loss = z[0].new_zeros((), dtype=torch.float32)
        for own_p, target in zip(p, targets, strict=True):
            first_z, second_z = target[:num], target[num : 2 * num]
            agreement = agreement_loss(own_p[:num], first_z, own_p[num : 2 * num], second_z)
            loss = loss + config.positive_weight * agreement.sum() / share.num_images
            if weights is not None:
                local = F.adaptive_avg_pool2d(weights, (own_p.shape[2], own_p.shape[3]))  # (b, h, w)
                # Of the whole batch; one full place at least, so that batches without anomalies do not count as others.
                total = sum_over_workers(local.sum()).clamp(min=1)
                parting = parting_loss(own_p[2 * num :], first_z, local, config.margin)
                loss = loss + config.negative_weight * parting.sum() / total
        self._observe(levels, z, num)
        yield loss / len(p)
        network.update_target(config.ema_momentum)  # the optimiser has made its step by now
        self._num_seen += share.num_images
        if self._num_seen == self._num_images:
            self._conclude()

    def _draw(self, batch: Batch, share: Share) -> list[Tensor]:
        """Two or three (b, 3, H, W) views of the images, on the context's device."""
        assert batch.images is not None, "the method asked for images"
        device = self.context.device
        anomalous = self.guide is not None
        with torch.autocast(device.type, enabled=False):
            pairs = zip(batch.images.to(device), batch.samples, strict=True)
            drawn = [self.painter.draw_views(image, sample, share.epoch, anomalous) for image, sample in pairs]
        return [torch.stack(part) for part in zip(*drawn, strict=True)]

    def _observe(self, levels: Sequence[Tensor], z: Sequence[Tensor], num: int) -> None:
        """Adds the first views to the spreads of this epoch, without a look at them."""
        for index, level, projected in zip(self.module.levels, levels, z, strict=True):
            for name, maps in (("feature", level), ("projection", projected)):
                self._spreads.setdefault(f"{name}_std_{index + 1}", Spread()).add(maps[:num])

    def _conclude(self) -> None:
        """Reads the spreads at the end of an epoch, over all workers."""
        values = torch.stack([spread.value() for spread in self._spreads.values()])
        for name, value in zip(self._spreads, values.tolist(), strict=True):
            self.watched.setdefault(name, []).append(value)
        self.warnings = [
            f"{name} fell to {min(values):.3g}, below collapse_threshold {self.config.collapse_threshold:g}: "
            f"features grow alike; lower backbone_lr, or raise negative_weight"
            for name, values in self.watched.items()
            if min(values) < self.config.collapse_threshold
        ]


def _project(
    images: Tensor, backbone: nn.Module, projectors: nn.ModuleList, indices: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    levels = backbone(images.contiguous(memory_format=torch.channels_last))
    chosen = [levels[index] for index in indices]
    return chosen, [projector(level) for projector, level in zip(projectors, chosen, strict=True)]


def _projector(width: int, config: Config) -> nn.Sequential:
    """Layers with batch norms, the last without ReLU, as SimSiam's; places take the part of its images."""
    parts: list[nn.Module] = []
    for number in range(config.projector_layers):
        before = config.projector_width if number else width
        parts += [nn.Conv2d(before, config.projector_width, 1, bias=False), SharedBatchNorm(config.projector_width)]
        if number < config.projector_layers - 1:
            parts.append(nn.ReLU(inplace=True))
    return nn.Sequential(*parts)


def _predictor(width: int, config: Config) -> nn.Module:
    """Two layers with a batch norm between them, as SimSiam's; nothing for plain cosines."""
    if config.contrast == "cosine":
        return nn.Identity()
    hidden = config.predictor_width
    return nn.Sequential(
        nn.Conv2d(width, hidden, 1, bias=False),
        SharedBatchNorm(hidden),
        nn.ReLU(inplace=True),
        nn.Conv2d(hidden, width, 1),
    )
