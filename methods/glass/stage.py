"""The training of GLASS: normal features against global anomalies, and local anomalies against what surrounds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.contracts import Batch, Context, SampleKey, Share, Split, Trainable
from methods.components.collectives import gather_images
from methods.components.draws import image_generator
from methods.components.losses import focal_loss
from methods.glass.encoder import PatchEncoder
from methods.glass.local_anomalies import Painter
from methods.glass.network import Network
from methods.glass.settings import Config
from methods.glass.spectrum import Distribution, judge_distribution

KEPT_BYTES = 2**31
"""Room for the feature maps of normal images; a category that needs more is encoded anew in every epoch."""


class GlassStage(Trainable):
    """Trains the network, one step for a batch of normal images."""

    name = "glass"

    def __init__(self, network: Network, encoder: PatchEncoder, config: Config, context: Context) -> None:
        self.module: Network = network
        self.encoder, self.config, self.context = encoder, config, context
        self.epochs, self.batch_size = config.epochs, config.batch_size
        self.max_images_per_epoch = config.max_images_per_epoch
        self.painter = Painter(config, context, encoder.grid)
        self.distribution: Distribution | None = None
        """The hypothesis in use, known once an epoch has begun."""
        self.centre = torch.empty(0)
        """(P, E) mean adapted feature of the normal images at every position, from the beginning of an epoch on."""
        self._mean: Tensor | None = None  # the same before the adaptor
        self._rows: dict[SampleKey, int] = {}
        self._levels: list[Tensor] = []  # of all normal images, in the order of `_rows`; empty if they need too much

    def configure_optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """AdamW for the discriminator, Adam for the adaptor."""
        network, config = self.module, self.config
        judging = [*network.first.parameters(), *network.rest.parameters()]
        optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(judging, lr=config.discriminator_lr)]
        if config.adaptor:
            adapting, decay = network.adaptor.parameters(), config.adaptor_weight_decay
            optimizers.append(torch.optim.Adam(adapting, lr=config.adaptor_lr, weight_decay=decay))
        return optimizers

    @torch.no_grad()
    def begin_epoch(self, train: Split, epoch: int) -> None:
        """Adapts the class centre; before the first epoch also studies the normal images."""
        if self._mean is None:
            self.painter.check(train.samples)
            self._mean = self._study(train)
        self.centre = self.module.adapt(self._mean)

    def _study(self, train: Split) -> Tensor:
        """Encodes all normal images once: returns their (P, E) mean, keeps their levels, settles the distribution."""
        shapes = self.context.level_shapes
        keep = len(train) * sum(4 * d * h * w for d, h, w in shapes) <= KEPT_BYTES
        sums = [torch.zeros(shape, device=self.context.device) for shape in shapes]
        pixels = torch.zeros(3, *self.context.image_size)
        kept: list[Tensor] = []
        begin = 0
        for batch in train:
            assert batch.images is not None, "the method asked for images"
            pixels += batch.images.sum(dim=0).to(pixels)
            levels = self.encoder.levels(batch.images)
            if keep and not kept:
                kept = [level.new_empty(len(train), *level.shape[1:]) for level in levels]
            for rows, level in zip(kept, levels, strict=False):
                rows[begin : begin + len(batch)] = level
            sums = [total + level.sum(dim=0) for total, level in zip(sums, levels, strict=True)]
            begin += len(batch)
        self._levels, self._rows = kept, {sample: row for row, sample in enumerate(train.samples)}
        wanted = self.config.distribution
        self.distribution = judge_distribution(pixels / len(train)) if wanted == "auto" else wanted
        return self.encoder.patches([total[None] / len(train) for total in sums])[0]

    def _normal_levels(self, batch: Batch) -> list[Tensor]:
        if not self._levels:
            assert batch.images is not None, "the method asked for images"
            return self.encoder.levels(batch.images)
        rows = torch.tensor([self._rows[sample] for sample in batch.samples])
        rows = rows.to(self.context.device, non_blocking=True)
        return [level[rows] for level in self._levels]

    def losses(self, batch: Batch, share: Share) -> Iterator[Tensor]:
        """Yields once: the loss of normal and global anomalous features plus that of painted images."""
        network, config = self.module, self.config
        painted, defects = self.painter.paint(batch, share.epoch)
        defects = defects.to(self.context.device, non_blocking=True)  # (b, P)
        normal = network.adapt(self.encoder.patches(self._normal_levels(batch)))  # (b, P, E)
        local = network.adapt(self.encoder.patches(self.encoder.levels(painted)))
        radius = self.radius(normal, local, defects, share.num_images)
        if self.distribution == "hypersphere":
            local = torch.where(defects[..., None], truncate(local, self.centre, 2 * radius, 4 * radius), local)
            origin = self.centre
        else:
            origin = normal
        known = network.first(normal)
        noise = config.noise * self._draw_noise(batch, share.epoch, normal.shape[1:])
        scale = share.num_images * normal.shape[1]  # patches of the whole batch
        anomalous = self.ascend(known.detach(), normal + noise, origin, radius, scale)
        normal_logits, global_logits = self._judge_both(known, anomalous)
        told_apart = binary_cross_entropy(normal_logits, 0) + binary_cross_entropy(global_logits, 1)
        local_logits = network.judge(network.first(local))
        yield told_apart.sum() / scale + self.local_loss(local_logits, defects, share.num_images)

    @torch.no_grad()
    def radius(self, normal: Tensor, local: Tensor, defects: Tensor, num_images: int) -> Tensor:
        """r, the least distance of global anomalies to their origin, as a () tensor.

        For the hypersphere it is a quantile of distances to the class centre, over all patches of the whole batch
        without a defect: those of normal images and the untouched ones of painted images.

        Args:
            normal: (b, P, E) features of normal images.
            local: (b, P, E) features of the same images, painted.
            defects: (b, P) bool, true where they were painted.
            num_images: images of the whole batch.
        """
        if self.distribution == "manifold":
            return normal.new_full((), self.config.manifold_radius)
        distances = [torch.linalg.vector_norm(features - self.centre, dim=2) for features in (normal, local)]
        distances[1] = distances[1].masked_fill(defects, torch.nan)
        everywhere = gather_images(torch.cat(distances, dim=1), num_images)
        return everywhere.nanquantile(self.config.radius_quantile)

    def ascend(self, known: Tensor, start: Tensor, origin: Tensor, radius: Tensor, scale: int) -> Tensor:
        """Global anomalies: features moved up the gradient of the loss of being found out, and kept at their distance.

        Leaves no gradient with the parameters. The moves are constants to the gradient of the result; start, origin
        and truncation are not.

        Args:
            known: (b, P, F) first layer's outputs for normal features, which share their batch statistics.
            start: (b, P, E) where to start.
            origin: (b, P, E) or (P, E), from which the distance is measured.
            radius: () the distance is brought into [radius, 2 radius].
            scale: patches of the whole batch, by which the sum of losses is divided.

        Returns:
            (b, P, E).
        """
        config, features = self.config, start
        for step in range(1, config.ascent_steps + 1):
            here = features.detach().requires_grad_()
            _, logits = self._judge_both(known, here)
            (gradient,) = torch.autograd.grad(binary_cross_entropy(logits, 1).sum() / scale, here)
            length = torch.linalg.vector_norm(gradient, dim=2, keepdim=True)
            features = features + config.ascent_rate * gradient / (length + 1e-10)
            if step % config.project_every == 0:
                features = truncate(features, origin, radius, 2 * radius)
        return features

    def _judge_both(self, known: Tensor, anomalous: Tensor) -> tuple[Tensor, Tensor]:
        """(b, P) logits of normal features, given the first layer's outputs, and of anomalous ones, in one batch."""
        hidden = torch.cat([known, self.module.first(anomalous)])
        normal, other = self.module.judge(hidden).chunk(2)
        return normal, other

    def local_loss(self, logits: Tensor, defects: Tensor, num_images: int) -> Tensor:
        """This worker's share of the mean focal loss of painted images over the hardest of all patches.

        Args:
            logits: (b, P) of the painted images.
            defects: (b, P) bool, true where they were painted.
            num_images: images of the whole batch.
        """
        with torch.no_grad():
            errors = (logits.sigmoid() - defects.float()).square()
            of_all = gather_images(errors, num_images)
            threshold = of_all.nanquantile(self.config.easy_quantile)
            num_hard = (of_all >= threshold).sum()
        both_logits = torch.stack([torch.zeros_like(logits), logits], dim=1)  # normal, anomalous
        losses = focal_loss(both_logits, defects, self.config.focal_gamma)
        return torch.where(errors >= threshold, losses, 0.0).sum() / num_hard

    def _draw_noise(self, batch: Batch, epoch: int, shape: torch.Size) -> Tensor:
        """(b, P, E) standard normal numbers, drawn on the device for each image by itself."""
        device = self.context.device
        rows = []
        for sample in batch.samples:
            seed = image_generator(self.context, "feature noise", sample, epoch).initial_seed()
            generator = torch.Generator(device).manual_seed(seed)
            rows.append(torch.randn(shape, generator=generator, device=device))
        return torch.stack(rows)


def truncate(features: Tensor, origin: Tensor, shortest: Tensor, longest: Tensor) -> Tensor:
    """Features with their distance to an origin brought into a range; those within it stay (truncated projection).

    Args:
        features: (..., E).
        origin: (..., E), broadcast.
        shortest: () least distance.
        longest: () largest distance.

    Returns:
        (..., E). A feature at its origin has no direction to go and stays, too.
    """
    displacement = features - origin
    length = torch.linalg.vector_norm(displacement, dim=-1, keepdim=True)
    return origin + displacement * (length.clamp(shortest, longest) / (length + 1e-10))


def binary_cross_entropy(logits: Tensor, label: int) -> Tensor:
    """Minus the log of the probability of a label (0 normal, 1 anomalous), per logit of being anomalous."""
    return -F.logsigmoid(logits if label else -logits)
