"""DRAEM: Zavrtanik et al., "DRAEM - A discriminatively trained reconstruction embedding for surface anomaly detection",
ICCV 2021, arXiv 2108.07610.

Textures painted onto normal images within Perlin masks stand in for defects. One network learns to take them away, a
second one to segment them from the painted image beside its reconstruction. On real defects, the second network's
probability is the anomaly map; the image score is its largest mean over 21 x 21 pixels.

`Config()` is the paper with its official code (VitjanZ/DRAEM), but for the textures: generated ones, unless a folder of
images is named (`textures`; the paper's are those of DTD). Differences from them:

- Every image is seen once per epoch; the official code draws as many with replacement.
- Perlin masks are turned without resampling, and the ten augmentations of textures are our own with the same ranges.
- The focal loss is that of its formula, without the official code's smoothing of labels by 1e-5, and SSIM takes images
  to range over [0, 1] even where a reconstruction leaves that range.
- Convolutions before a batch norm have no bias, which the norm would take away.
- All draws are made per image and epoch, and batch norms see the whole batch, so that it does not matter how many
  workers share a training.

The image size is the protocol's; the paper's is 256 x 256 without a crop. To reach, with DTD: image AUROC 98.0, pixel
AUROC 97.3 (%) on MVTec AD.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.contracts import (
    AdgridError,
    Batch,
    Context,
    Inputs,
    LevelChoice,
    Prediction,
    SampleKey,
    Share,
    Split,
    Trainable,
)
from methods.components.augment import augment_texture, draw_uniform
from methods.components.collectives import SharedBatchNorm
from methods.components.draws import image_generator
from methods.components.losses import focal_loss, structural_similarity
from methods.components.synthesis import TextureSource, blend_texture, open_textures, perlin_mask
from methods.components.warp import rotate_image

METHOD_VERSION = 1

SMALLEST_SIDE = 32
"""The segmenting network halves images five times."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of DRAEM; the defaults are the paper's."""

    reconstruction_width: int = 128
    """Channels of the reconstructing network at full resolution."""
    discriminative_width: int = 64
    """Channels of the segmenting network at full resolution."""
    epochs: int = 700
    """Passes over the training images."""
    batch_size: int = 8
    """Images per step."""
    learning_rate: float = 1e-4
    """Of Adam; a fifth of it from 80 %, and a twenty-fifth from 90 % of the epochs."""
    rotation_probability: float = 0.3
    """Share of training images that are turned by up to 90 degrees, with black corners, in [0, 1]."""
    anomaly_probability: float = 0.5
    """Share of training images that get an anomaly, in [0, 1]; Perlin masks that come out empty take some of it."""
    largest_beta: float = 0.8
    """The image shows through a texture with a share drawn from [0, largest_beta), in [0, 1]."""
    gamma: float = 2.0
    """Exponent of the focal loss, >= 0."""
    textures: str | None = None
    """Folder of texture images, such as DTD's; None for generated textures. Part of what is recorded with a result."""

    def __post_init__(self) -> None:
        for name in ("reconstruction_width", "discriminative_width", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name in ("rotation_probability", "anomaly_probability", "largest_beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.gamma < 0:
            raise ValueError(f"gamma must be at least 0, got {self.gamma}")


_Config = Config  # inside the class below, `Config` is its attribute


class Draem:
    """A network that removes anomalies and one that segments them, trained together on painted ones."""

    summary = "reconstructs and segments synthetic anomalies (DRAEM, arXiv 2108.07610)"
    scope = "category"
    backbone_use = "none"
    levels = LevelChoice()
    smoothing = 0.0
    score_reduction = "mean_pool_21"
    folders = ("textures",)
    Config = Config

    @classmethod
    def inputs(cls, config: _Config) -> Inputs:
        """Pixels."""
        return "images"

    def __init__(self, config: _Config, context: Context) -> None:
        if min(context.image_size) < SMALLEST_SIDE:
            raise AdgridError(f"draem needs an image_size of at least {SMALLEST_SIDE}, got {context.image_size}")
        self.config, self.context = config, context
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed_of("draem weights"))
            networks = _Networks(config.reconstruction_width, config.discriminative_width)
        networks = networks.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.networks = networks.to(context.device).eval()

    def stages(self) -> list[Trainable]:
        """Both networks, trained together. Raises AdgridError if the folder of textures is missing or empty."""
        return [_Training(self.networks, self.config, self.context, open_textures(self.config.textures))]

    def fit(self, train: Split) -> None:
        """Nothing remains to be done after the training."""

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """Probability of an anomaly at every pixel, in [0, 1]."""
        assert batch.images is not None, "the method asked for images"
        _, logits = self.networks.eval()(batch.images.to(self.context.device))
        return Prediction(anomaly_map=logits.softmax(dim=1)[:, 1])

    def state_dict(self) -> dict[str, Tensor]:
        """Both networks, with the running statistics of their batch norms."""
        return self.networks.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the networks of a method with the same widths."""
        self.networks.load_state_dict(state)


class _Training(Trainable):
    """The sum of squared error, SSIM and focal loss on painted images."""

    name = "draem"

    def __init__(self, networks: _Networks, config: Config, context: Context, textures: TextureSource) -> None:
        self.module, self.config, self.context, self.textures = networks, config, context, textures
        self.epochs, self.batch_size = config.epochs, config.batch_size

    def configure_optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.module.parameters(), lr=self.config.learning_rate)]

    def lr_factor(self, progress: float) -> float:
        """A fifth after 80 % and again after 90 % of the epochs."""
        return 0.2 ** ((progress >= 0.8 * self.epochs) + (progress >= 0.9 * self.epochs))

    def losses(self, batch: Batch, share: Share) -> Iterator[Tensor]:
        assert batch.images is not None, "the method asked for images"
        images = batch.images.to(self.context.device)
        drawn = [self.paint(*one, share.epoch) for one in zip(images, batch.samples, strict=True)]
        targets, painted, masks = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        rebuilt, logits = self.module(painted)
        error = (rebuilt.float() - targets).square().mean(dim=(1, 2, 3))
        dissimilarity = 1 - structural_similarity(rebuilt, targets).mean(dim=(1, 2, 3))
        focal = focal_loss(logits, masks, self.config.gamma).mean(dim=(1, 2))
        yield (error + dissimilarity + focal).sum() / share.num_images

    def paint(self, image: Tensor, sample: SampleKey, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The (3, H, W) image to rebuild, the same with an anomaly or without, and the (H, W) bool mask of it."""
        config, size = self.config, (image.shape[1], image.shape[2])
        generator = image_generator(self.context, "draem anomaly", sample, epoch)
        if draw_uniform(generator, 0, 1) < config.rotation_probability:
            image = rotate_image(image, draw_uniform(generator, -90, 90))
        if draw_uniform(generator, 0, 1) >= config.anomaly_probability:
            return image, image, torch.zeros(size, dtype=torch.bool, device=image.device)
        mask = perlin_mask(size, generator, device=image.device)
        texture = augment_texture(self.textures.texture(size, generator).to(image.device), generator)
        beta = draw_uniform(generator, 0, config.largest_beta)
        return image, blend_texture(image, texture, mask, beta), mask


class _Networks(nn.Module):
    """Both networks: images to reconstructions, and these beside the images to logits."""

    def __init__(self, reconstruction_width: int, discriminative_width: int) -> None:
        super().__init__()
        self.reconstruction = _Reconstruction(reconstruction_width)
        self.segmentation = _Segmentation(discriminative_width)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) images to (B, 3, H, W) reconstructions and (B, 2, H, W) logits of normal and anomalous."""
        images = images.contiguous(memory_format=torch.channels_last)
        rebuilt = self.reconstruction(images)
        return rebuilt, self.segmentation(torch.cat([rebuilt, images], dim=1))


class _Reconstruction(nn.Module):
    """An autoencoder that halves the image four times; nothing passes beside its bottleneck."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        self.down = nn.ModuleList(_block(before, own, own) for before, own in pairwise([3, *widths]))
        narrowing = [8 * width, 4 * width, 2 * width, width, width]
        self.widen = nn.ModuleList(_layer(own, own) for own in narrowing[:-1])
        self.up = nn.ModuleList(_block(own, own, after) for own, after in pairwise(narrowing))
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to the same shape."""
        skips = _encode(self.down, images)
        maps = skips.pop()
        for widen, up in zip(self.widen, self.up, strict=True):
            maps = up(widen(_enlarge(maps, skips.pop())))
        return self.head(maps)


class _Segmentation(nn.Module):
    """A U-Net that halves its input five times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width, 8 * width]
        self.down = nn.ModuleList(_block(before, own, own) for before, own in pairwise([6, *widths]))
        narrowing = [8 * width, 8 * width, 4 * width, 2 * width, width, width]
        self.widen = nn.ModuleList(_layer(before, own) for before, own in pairwise(narrowing))
        self.up = nn.ModuleList(
            _block(own + skip, own, own) for own, skip in zip(narrowing[1:], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, pairs: Tensor) -> Tensor:
        """(B, 6, H, W) to (B, 2, H, W)."""
        skips = _encode(self.down, pairs)
        maps = skips.pop()
        for widen, up in zip(self.widen, self.up, strict=True):
            skip = skips.pop()
            maps = up(torch.cat([widen(_enlarge(maps, skip)), skip], dim=1))
        return self.head(maps)


def _encode(blocks: nn.ModuleList, maps: Tensor) -> list[Tensor]:
    """What each block makes of the half-sized output of the one before."""
    outputs: list[Tensor] = []
    for block in blocks:
        outputs.append(block(F.max_pool2d(outputs[-1], 2) if outputs else maps))
    return outputs


def _enlarge(maps: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(maps, like.shape[2:], mode="bilinear", align_corners=True)


def _block(before: int, middle: int, after: int) -> nn.Sequential:
    return nn.Sequential(*_layer(before, middle), *_layer(middle, after))


def _layer(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False), SharedBatchNorm(after), nn.ReLU(inplace=True)
    )


METHOD = Draem
