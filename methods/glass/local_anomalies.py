"""The local anomalies of GLASS: textures painted into images of normal objects."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from harness.contracts import AdgridError, Batch, Context, SampleKey
from methods.components.augment import augment_texture
from methods.components.draws import image_generator
from methods.components.synthesis import TextureSource, blend_texture, open_textures, perlin_mask
from methods.glass.settings import Config

MAX_DRAWS = 100
"""Perlin masks drawn for an image until one is not empty."""


def draw_region(
    size: tuple[int, int], grid: tuple[int, int], generator: torch.Generator, foreground: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where a local anomaly is painted: a Perlin mask, or the union or intersection of two, all equally likely.

    Args:
        size: (H, W) pixels.
        grid: (h, w) patches.
        generator: CPU generator of the draw.
        foreground: (H, W) bool, where it may be; None for anywhere.

    Returns:
        (H, W) bool of the pixels, and (h, w) bool of the patches that hold one of them. Both are empty if `MAX_DRAWS`
        masks were.
    """
    for _ in range(MAX_DRAWS):
        region = perlin_mask(size, generator)
        kind = int(torch.randint(3, (), generator=generator))
        if kind > 0:
            other = perlin_mask(size, generator)
            region = region | other if kind == 1 else region & other
        if foreground is not None:
            region = region & foreground
        if region.any():
            break
    return region, F.adaptive_max_pool2d(region[None].float(), grid)[0] > 0


class Painter:
    """Paints an anomaly into every image of a batch; what it draws depends on image and epoch alone.

    It works on the CPU, and in float32 whatever the precision of the training around it.
    """

    def __init__(self, config: Config, context: Context, grid: tuple[int, int]) -> None:
        self.config, self.context, self.grid = config, context, grid
        self._foregrounds: dict[SampleKey, Tensor] = {}

    @cached_property
    def _textures(self) -> TextureSource:
        return open_textures(self.config.textures)

    def check(self, samples: Sequence[SampleKey]) -> None:
        """Raises AdgridError if the textures or the foreground mask of an image are missing."""
        _ = self._textures
        if self.config.foreground_masks is not None:
            for sample in samples:
                self._mask_path(sample, self.config.foreground_masks)

    @torch.autocast("cpu", enabled=False)
    def paint(self, batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        """Images with anomalies.

        Args:
            batch: normal images.
            epoch: counted from 0.

        Returns:
            (B, 3, H, W) the images, painted, and (B, P) bool: true for patches that hold a painted pixel.
        """
        assert batch.images is not None, "the method asked for images"
        painted, defects = [], []
        for image, sample in zip(batch.images, batch.samples, strict=True):
            generator = image_generator(self.context, "local anomaly", sample, epoch)
            size = image.shape[1], image.shape[2]
            region, patches = draw_region(size, self.grid, generator, self._foreground(sample, size))
            texture = augment_texture(self._textures.texture(size, generator), generator)
            beta = self.config.beta_mean + self.config.beta_std * float(torch.randn((), generator=generator))
            painted.append(blend_texture(image.cpu(), texture, region, min(max(beta, 0.2), 0.8)))
            defects.append(patches.flatten())
        return torch.stack(painted), torch.stack(defects)

    def _foreground(self, sample: SampleKey, size: tuple[int, int]) -> Tensor | None:
        """(H, W) bool mask of the object, read once; None where none is wanted."""
        folder = self.config.foreground_masks
        if folder is None:
            return None
        if sample not in self._foregrounds:
            path = self._mask_path(sample, folder)
            try:
                with Image.open(path) as image:
                    mask = _fit(image.convert("L"), size, self.context.resize)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
                raise AdgridError(f"foreground_masks: {path} cannot be read ({problem}); replace it") from problem
            self._foregrounds[sample] = torch.from_numpy(np.array(mask)) > 0
        return self._foregrounds[sample]

    @staticmethod
    def _mask_path(sample: SampleKey, folder: str) -> Path:
        name = Path(sample.path)
        places = [Path(folder, sample.category, file) for file in (name.name, f"{name.stem}.png")]
        for place in places:
            if place.is_file():
                return place
        raise AdgridError(
            f"foreground_masks: no mask {places[0]} for {sample.path}; a folder of masks needs one for every training "
            f"image, or give null to paint anywhere"
        )


def _fit(mask: Image.Image, size: tuple[int, int], resize: int | None) -> Image.Image:
    """A mask brought to (H, W) as its image was: straight, or by its shorter side and a crop of the centre."""
    if resize is None:
        return mask.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    factor = min(mask.size)
    width, height = (int(resize * side / factor) for side in mask.size)
    left, top = round((width - size[1]) / 2), round((height - size[0]) / 2)
    return mask.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size[1], top + size[0]))
