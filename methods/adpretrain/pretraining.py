"""The training of ADPretrain's projector on labelled auxiliary images, with a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from harness.contracts import AdgridError, Batch, Context, InputScale, LabelledBatch, SampleKey, Share, Split, Trainable
from methods.adpretrain.labels import label_by_count, label_by_nearest
from methods.adpretrain.losses import angle_loss, norm_loss
from methods.adpretrain.projector import Projector
from methods.adpretrain.references import References, draw_places
from methods.adpretrain.residuals import residual
from methods.adpretrain.settings import Config
from methods.adpretrain.sharing import worker_rank
from methods.adpretrain.views import make_view
from methods.components.collectives import num_workers, sum_over_workers
from methods.components.draws import image_generator, step_generator
from methods.components.levels import float64_device

CLIP_STATISTICS: InputScale = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CENTRE_BATCH = 16
"""Images encoded at once for the centre."""


class Pretraining(Trainable):
    """Trains a projector: one step for a batch of labelled images, each in two views."""

    name = "adpretrain"

    def __init__(
        self,
        projector: Projector,
        config: Config,
        context: Context,
        references: References,
        backbone_statistics: InputScale = CLIP_STATISTICS,
    ) -> None:
        """Takes over a projector.

        Args:
            projector: trained in place, on the context's device.
            config: the settings.
            context: its `encode` is the plain frozen backbone.
            references: normal images of every category and view that is trained on.
            backbone_statistics: the input scale that `encode` applies to images in [0, 1].
        """
        assert context.encode is not None, "pretraining encodes images, and the context cannot"
        self.module: Projector = projector
        self.epochs, self.batch_size = config.epochs, config.batch_size
        self.centre: list[Tensor] = []
        """(C,) float32 per level: the mean residual of normal images; empty before the first epoch."""
        self._config, self._context, self._references = config, context, references
        self._scale = _rescaling(CLIP_STATISTICS, backbone_statistics, context.device)
        self._encode = context.encode

    def configure_optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Adam over the projector."""
        config = self._config
        return [torch.optim.Adam(self.module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)]

    def lr_factor(self, progress: float) -> float:
        """A tenth of the rate after every milestone."""
        return self._config.decay ** sum(progress >= milestone for milestone in self._config.milestones)

    def begin_epoch(self, train: Split, epoch: int) -> None:
        """Computes the centre before the first epoch."""
        if not self.centre:
            self.centre = estimate_centre(train, self._references, self._config, self._context)

    def losses(self, batch: Batch, share: Share) -> Iterator[Tensor]:
        """Yields once, the sum over levels of the angle loss and of the norm losses of both views."""
        assert isinstance(batch, LabelledBatch), "pretraining needs labels and masks"
        config, device = self._config, self._context.device
        gathered = config.negatives == "gathered"
        anomalous_images = sum_over_workers(batch.labels.to(device).sum().float())
        if not bool(anomalous_images):
            if config.normal_batches == "zero":
                yield 0 * torch.stack([parameter.sum() for parameter in self.module.parameters()]).sum()
            return
        masks = batch.masks.to(device, non_blocking=True)
        total = torch.zeros((), device=device)
        for level, centre in zip(self.module(self.residuals(batch, share)), self.centre, strict=True):
            first, second = (_to_tokens(view) for view in level.float().split(len(batch)))
            grid = (level.shape[2], level.shape[3])
            by_count, by_nearest = label_by_count(masks, grid).flatten(), label_by_nearest(masks, grid).flatten()
            if config.angle_weight:
                angle = angle_loss(first, second, by_count, centre, config.temperature, gathered=gathered)
                total = total + config.angle_weight * angle
            for view in (first, second) if config.norm_weight else ():
                norm = norm_loss(view, by_nearest, form=config.norm_form, gathered=gathered)
                total = total + config.norm_weight * norm
        yield total

    @torch.no_grad()
    def residuals(self, batch: Batch, share: Share) -> list[Tensor]:
        """Residuals of both views of this worker's images, (2 b, C, h, w) per level: all first views, then all second.

        Both views of an image have the same references. Each reference is read or encoded once for all its images.
        """
        assert batch.images is not None, "the two views are made from images"
        counts = self._config.reference_counts
        pick = torch.randint(len(counts), (), generator=step_generator(self._context, "adpretrain shots", share))
        drawn = draw_places(
            self._references, batch.samples, counts[int(pick)], self._draw("adpretrain references", share.epoch)
        )
        images = self._two_views(batch.images, batch.samples, share.epoch)
        levels = self._encode(images)
        if self._config.features == "plain":
            return list(levels)
        return subtract_references(
            [level.unflatten(0, (2, -1)).transpose(0, 1) for level in levels], drawn, self._references
        )

    def _two_views(self, images: Tensor, samples: Sequence[SampleKey], epoch: int) -> Tensor:
        """(b, 3, H, W) in [0, 1] to (2 b, 3, H, W) for `encode`."""
        generators = [self._draw("adpretrain views", epoch)(sample) for sample in samples]
        pixels = images.to(self._context.device, non_blocking=True)
        views = [
            torch.stack([make_view(image, generator) for image, generator in zip(pixels, generators, strict=True)])
            for _ in range(2)
        ]
        factor, offset = self._scale
        both = torch.cat(views)
        return both * factor + offset if self._config.view_statistics == "clip" else both

    def _draw(self, name: str, epoch: int) -> Callable[[SampleKey], torch.Generator]:
        return lambda sample: image_generator(self._context, name, sample, epoch)

    def state_dict(self) -> dict[str, Tensor]:
        """The projector, and the centre as `centre.1`, `centre.2` and so on, once it is known."""
        return self.module.state_dict() | {f"centre.{number}": centre for number, centre in enumerate(self.centre, 1)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict()`."""
        centres = [key for key in state if key.startswith("centre.")]
        self.module.load_state_dict({key: value for key, value in state.items() if key not in centres})
        numbers = range(1, len(centres) + 1)
        self.centre = [state[f"centre.{number}"].to(self._context.device) for number in numbers]


@torch.no_grad()
def estimate_centre(train: Split, references: References, config: Config, context: Context) -> list[Tensor]:
    """Mean residual of all tokens of all normal images, without augmentation; each worker encodes its part of them.

    Sums are float64, so that the result does not depend on the number of workers beyond rounding.

    Args:
        train: labelled images, or features with labels.
        references: normal images of every category and view.
        config: how many references each image gets; drawn for the image alone.
        context: encodes where the split gives images.

    Returns:
        (C,) float32 per level.

    Raises:
        AdgridError: if no image is normal.
    """
    device = float64_device(context.device)
    sums = [torch.zeros(width + 1, dtype=torch.float64, device=device) for width, _, _ in context.level_shapes]
    own = range(worker_rank(), len(train), num_workers())
    for begin in range(0, len(own), CENTRE_BATCH):
        batch = train.take(own[begin : begin + CENTRE_BATCH])
        assert isinstance(batch, LabelledBatch), "pretraining needs labels and masks"
        normal = [row for row, label in enumerate(batch.labels.tolist()) if label == 0]
        if not normal:
            continue
        drawn = draw_places(
            references,
            [batch.samples[row] for row in normal],
            config.centre_references,
            lambda sample: image_generator(context, "adpretrain centre", sample, 0),
        )
        if batch.levels is None:
            assert batch.images is not None
            assert context.encode is not None, "images must be encoded, and the context cannot"
            levels = context.encode(batch.images[normal].to(context.device, non_blocking=True))
        else:
            levels = tuple(level[normal].to(context.device) for level in batch.levels)
        rests = list(levels)
        if config.features == "residual":
            rests = subtract_references([level[:, None] for level in levels], drawn, references)
        for total, rest in zip(sums, rests, strict=True):
            total[:-1] += rest.to(device).double().sum(dim=(0, 2, 3))
            total[-1] += rest.numel() // rest.shape[1]
    sums = [sum_over_workers(total) for total in sums]
    if not bool(sums[0][-1]):
        raise AdgridError("pretraining needs normal images to learn from, and all images of the split are anomalous")
    return [(total[:-1] / total[-1]).float().to(context.device) for total in sums]


@torch.no_grad()
def subtract_references(
    levels: Sequence[Tensor], drawn: Sequence[Sequence[int]], references: References
) -> list[Tensor]:
    """Residuals of images to references of their own; a reference of several images is read once.

    Args:
        levels: (b, V, C, h, w) features per level of V views of each image.
        drawn: for each image the numbers of its references.
        references: gives them.

    Returns:
        (V * b, C, h, w) float32 per level: all first views, then all second.
    """
    wanted = sorted({place for places in drawn for place in places})
    row_of = {place: row for row, place in enumerate(wanted)}
    result = []
    for level, maps in zip(levels, references.levels(wanted), strict=True):
        tokens = maps.float().flatten(2).transpose(1, 2).contiguous()  # (n, P, C)
        rest = torch.empty(level.shape[1], *level.shape[:1], *level.shape[2:], device=level.device)
        for image, places in enumerate(drawn):
            own = tokens[[row_of[place] for place in places]].flatten(0, 1)
            rest[:, image] = residual(level[image].float(), own)
        result.append(rest.flatten(0, 1))
    return result


def _to_tokens(maps: Tensor) -> Tensor:
    """(b, C, h, w) to (b * h * w, C)."""
    return maps.flatten(2).transpose(1, 2).flatten(0, 1)


def _rescaling(wanted: InputScale, applied: InputScale, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and offset (3, 1, 1) for images, after which normalising by `applied` gives what `wanted` would have."""
    (mean, std), (applied_mean, applied_std) = (
        [torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1) for numbers in pair] for pair in (wanted, applied)
    )
    factor = applied_std / std
    offset = applied_mean - mean * factor
    return factor.float().to(device), offset.float().to(device)
