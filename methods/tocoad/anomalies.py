"""What ToCoAD makes of normal images: synthetic anomalies and pairs of views."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.contracts import Context, SampleKey, Split
from methods.components.augment import augment_texture, draw_uniform, jitter_colour
from methods.components.draws import image_generator
from methods.components.synthesis import blend_texture, cut_paste, open_textures, perlin_mask, seamless_patch
from methods.tocoad.settings import Config


class Painter:
    """Makes images anomalous; what it draws depends on image and epoch alone."""

    def __init__(self, config: Config, context: Context) -> None:
        """Raises AdgridError if the folder of textures is missing or empty."""
        self.config, self.context = config, context
        self.textures = open_textures(config.textures if config.generator == "perlin" else None)
        self.sources: Split | None = None
        """Normal images from which `seamless` takes its patches; set before an epoch begins."""

    def draw(self, image: Tensor, sample: SampleKey, epoch: int) -> tuple[Tensor, Tensor]:
        """A training example of stage I: an image that is anomalous or, with some probability, as it was.

        Args:
            image: (3, H, W) normal image in [0, 1].
            sample: whose image it is.
            epoch: counted from 0.

        Returns:
            (3, H, W) image and (H, W) bool mask of its anomaly, on the device of `image`.
        """
        generator = image_generator(self.context, "synthetic anomaly", sample, epoch)
        if draw_uniform(generator, 0, 1) >= self.config.anomaly_probability:
            return image, torch.zeros(image.shape[1:], dtype=torch.bool, device=image.device)
        return self.paint(image, generator, is_grey(image))

    def draw_views(self, image: Tensor, sample: SampleKey, epoch: int, anomalous: bool) -> tuple[Tensor, ...]:
        """A training example of stage II: two views of a normal image, and if wanted the second with an anomaly.

        The anomaly is compared with the first view: what tells them apart beyond the two views is the anomaly alone.

        Args:
            image: (3, H, W) normal image in [0, 1].
            sample: whose image it is.
            epoch: counted from 0.
            anomalous: whether the third is wanted.

        Returns:
            Two or three (3, H, W) images in [0, 1], on the device of `image`.
        """
        generator = image_generator(self.context, "views", sample, epoch)
        first, second = self._view(image, generator), self._view(image, generator)
        return (first, second, self.paint(second, generator, is_grey(image))[0]) if anomalous else (first, second)

    def paint(self, image: Tensor, generator: torch.Generator, grey: bool = False) -> tuple[Tensor, Tensor]:
        """(3, H, W) image with an anomaly of the configured kind, and its (H, W) bool mask, which may be empty.

        Args: the image; its draws; whether it is of a camera without colour.
        """
        size = image.shape[1], image.shape[2]
        if self.config.generator == "cutpaste":
            rectangle = draw_uniform(generator, 0, 1) < 0.5
            return cut_paste(image, generator, variant="normal" if rectangle else "scar")
        if self.config.generator == "seamless":
            assert self.sources is not None, "an epoch has begun"
            row = int(torch.randint(len(self.sources), (), generator=generator))
            source = self.sources.take([row]).images
            assert source is not None, "the method asked for images"
            return seamless_patch(image, source[0].to(image.device), generator)
        mask = perlin_mask(size, generator, device=image.device)
        texture = augment_texture(self.textures.texture(size, generator).to(image.device), generator)
        if grey and self.config.match_colour:
            texture = texture.mean(dim=0, keepdim=True).expand_as(texture)
        return blend_texture(image, texture, mask, draw_uniform(generator, 0, self.config.largest_beta)), mask

    def _view(self, image: Tensor, generator: torch.Generator) -> Tensor:
        jittered = jitter_colour(image, generator, self.config.view_jitter)
        noise = torch.randn(image.shape, generator=generator).to(image.device)
        return (jittered + self.config.view_noise * noise).clamp(0, 1)


def is_grey(image: Tensor) -> bool:
    """Whether no pixel of a (3, H, W) image in [0, 1] has a colour."""
    return bool((image.amax(dim=0) - image.amin(dim=0)).max() <= 1 / 255)
