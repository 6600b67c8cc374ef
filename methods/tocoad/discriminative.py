"""Stage I of ToCoAD: a decoder that segments synthetic anomalies from the maps of the frozen backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.contracts import Batch, Context, Share, Split, Trainable
from methods.components.collectives import SharedBatchNorm
from methods.components.losses import focal_loss
from methods.tocoad.anomalies import Painter
from methods.tocoad.settings import GUIDE_FIELDS, Config

FINEST_STRIDE = 4
"""Side in pixels of a place where the decoder ends; backbones with coarser levels are decoded further."""


class DiscriminativeNetwork(nn.Module):
    """The backbone turned round: from its deepest map up to its shallowest, with its widths and grids, to logits."""

    def __init__(self, config: Config, context: Context) -> None:
        """Args: widths and depth of the decoder; the levels of the backbone, shallow to deep, and the image size."""
        super().__init__()
        widths = [max(8, round(config.decoder_width * depth)) for depth, _, _ in context.level_shapes]
        grids = [shape[1:] for shape in context.level_shapes]
        self.image_size, self.skips = context.image_size, config.decoder_skips
        self.enter = _layer(context.level_shapes[-1][0], widths[-1], 1)
        self.blocks = nn.ModuleList([_blocks(widths[-1], config.decoder_blocks)])
        self.rise = nn.ModuleList()
        self.grids: list[tuple[int, int]] = []
        width = widths[-1]
        for level in range(len(widths) - 2, -1, -1):
            seen = context.level_shapes[level][0] if self.skips else 0
            self.rise.append(_layer(width + seen, widths[level], 1))
            self.blocks.append(_blocks(widths[level], config.decoder_blocks))
            self.grids.append(grids[level])
            width = widths[level]
        while min(context.image_size) > FINEST_STRIDE * min(grid := self.grids[-1] if self.grids else grids[-1]):
            narrower = max(8, width // 2)
            self.rise.append(_layer(width, narrower, 1))
            self.blocks.append(_blocks(narrower, 1))
            self.grids.append((2 * grid[0], 2 * grid[1]))
            width = narrower
        self.head = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels (B, D_l, h_l, w_l), shallow to deep, to (B, 2, H, W) float32 logits of normal and anomalous."""
        maps = self.blocks[0](self.enter(levels[-1]))
        above = list(levels[-2::-1])
        for number, (rise, blocks, grid) in enumerate(zip(self.rise, self.blocks[1:], self.grids, strict=True)):
            maps = F.interpolate(maps, grid, mode="bilinear", align_corners=False)
            if self.skips and number < len(above):
                maps = torch.cat([maps, above[number]], dim=1)
            maps = blocks(rise(maps))
        return F.interpolate(self.head(maps).float(), self.image_size, mode="bilinear", align_corners=False)


class Guide:
    """The frozen backbone and the discriminative network, as they judge images once stage I is over."""

    def __init__(self, network: DiscriminativeNetwork, encode: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        """Args: the network; images in [0, 1] to levels."""
        self.network, self._encode = network, encode

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [0, 1] to (B, H, W) probabilities of an anomaly; no gradient flows through."""
        return self.network.eval()(self._encode(images)).softmax(dim=1)[:, 1]


class DiscriminativeStage(Trainable):
    """Trains the decoder on normal images, of which some were made anomalous."""

    name = "discriminative"
    fields = GUIDE_FIELDS
    """Settings that its result depends on."""

    def __init__(self, network: DiscriminativeNetwork, config: Config, context: Context) -> None:
        self.module, self.config, self.context = network, config, context
        self.epochs, self.batch_size = config.guide_epochs, config.guide_batch_size
        self.painter = Painter(config, context)

    def configure_optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Adam."""
        return [torch.optim.Adam(self.module.parameters(), lr=self.config.guide_lr)]

    def lr_factor(self, progress: float) -> float:
        """Half a cosine, from 1 to 0."""
        return 0.5 + 0.5 * math.cos(math.pi * progress / self.epochs)

    def begin_epoch(self, train: Split, epoch: int) -> None:
        """Shows the painter the images that it may take patches from."""
        self.painter.sources = train

    def losses(self, batch: Batch, share: Share) -> Iterator[Tensor]:
        """Yields once: the mean loss of all pixels."""
        assert batch.images is not None, "the method asked for images"
        assert self.context.encode is not None, "the backbone's use is declared"
        device = self.context.device
        with torch.autocast(device.type, enabled=False):
            pairs = zip(batch.images.to(device), batch.samples, strict=True)
            drawn = [self.painter.draw(image, sample, share.epoch) for image, sample in pairs]
        images, masks = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        logits = self.module(self.context.encode(images))
        yield self.loss(logits, masks).sum() / share.num_images

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """(B, 2, H, W) logits and (B, H, W) bool masks to the (B,) mean loss of an image's pixels."""
        if self.config.guide_loss == "cross_entropy":
            return focal_loss(logits, masks, gamma=0.0).mean(dim=(1, 2))
        return focal_loss(logits, masks, self.config.focal_gamma, self.config.focal_alpha).mean(dim=(1, 2))


class _Bottleneck(nn.Module):
    """ResNet's block, with half the width inside, as in the wide ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 2
        last = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), SharedBatchNorm(width))
        self.change = nn.Sequential(_layer(width, inner, 1), _layer(inner, inner, 3), last)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, D, h, w) to the same shape."""
        return F.relu(maps + self.change(maps))


def _blocks(width: int, number: int) -> nn.Sequential:
    return nn.Sequential(*(_Bottleneck(width) for _ in range(number)))


def _layer(before: int, after: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False), SharedBatchNorm(after), nn.ReLU(inplace=True)
    )
