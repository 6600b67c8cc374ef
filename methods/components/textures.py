"""Where the textures of synthetic anomalies come from: a folder of images such as DTD, or generated ones.

DTD is the Describable Textures Dataset (Cimpoi et al., CVPR 2014), which DRAEM and GLASS paint their anomalies with.
Generated textures need no data: random spectra, grains, stripes, weaves and cells in random colours.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from harness.contracts import AdgridError
from methods.components.augment import draw_uniform
from methods.components.warp import turned_positions

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


class TextureSource(Protocol):
    """Gives textures at random."""

    name: str
    """What a result made with it should be told by."""

    def texture(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """A (3, H, W) float32 texture in [0, 1], on the CPU; `size` is (H, W)."""


def open_textures(folder: str | None) -> TextureSource:
    """The images of a folder as textures, or generated ones.

    Args:
        folder: searched with all its subfolders; None for generated textures.

    Raises:
        AdgridError: the folder is missing or holds no image.
    """
    return GeneratedTextures() if folder is None else FolderTextures(folder)


class FolderTextures:
    """Images of a folder, each squeezed to the size asked for, as DRAEM does."""

    def __init__(self, folder: str) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise AdgridError(f"textures: no folder {folder}; name a folder of images such as DTD's, or null")
        found = (path for path in root.rglob("*") if path.suffix.lower() in ENDINGS and not path.name.startswith("."))
        self.paths = sorted(found, key=lambda path: path.relative_to(root).as_posix())
        """In an order that does not depend on the file system."""
        if not self.paths:
            raise AdgridError(
                f"textures: no image under {folder} (looked for {', '.join(sorted(ENDINGS))}); "
                f"name a folder of images such as DTD's, or null for generated textures"
            )
        self.name = f"{root.resolve().name}, {len(self.paths)} images"

    def texture(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """One of the images. Raises AdgridError if it cannot be read."""
        path = self.paths[int(torch.randint(len(self.paths), (), generator=generator))]
        try:
            with Image.open(path) as image:
                small = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
            raise AdgridError(f"textures: {path} cannot be read ({problem}); remove or replace it") from problem
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255


class GeneratedTextures:
    """A scalar pattern of a random kind and scale, seen through a random palette."""

    name = "generated"

    def texture(self, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """A new texture for every state of the generator."""
        kind = int(torch.randint(len(PATTERNS), (), generator=generator))
        return _colour(PATTERNS[kind](size, generator), generator)


def clouds(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(H, W) in [0, 1]: noise whose amplitude falls with frequency, drawn out along a random direction."""
    exponent, stretch = draw_uniform(generator, 1, 2), draw_uniform(generator, 1, 6)
    frequency = _frequencies(size, stretch, draw_uniform(generator, 0, 180))
    return _filtered_noise(size, frequency.clamp(min=1) ** -exponent, generator)


def grains(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(H, W) in [0, 1]: noise of one size, 4 to 64 grains along the image."""
    centre, stretch = 2 ** draw_uniform(generator, 2, 6), draw_uniform(generator, 1, 3)
    frequency = _frequencies(size, stretch, draw_uniform(generator, 0, 180))
    octaves = (frequency.clamp(min=0.1) / centre).log2()
    return _filtered_noise(size, torch.exp(-8 * octaves**2), generator)


def stripes(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(H, W) in [0, 1]: 3 to 48 parallel stripes, bent by clouds."""
    number, degrees = 3 * 2 ** draw_uniform(generator, 0, 4), draw_uniform(generator, 0, 180)
    bend = draw_uniform(generator, 0, 1.5) * clouds(size, generator)
    _, x, _ = turned_positions(size, degrees, None)
    return 0.5 + 0.5 * torch.sin(2 * math.pi * (x * (number / max(size)) + bend))


def weave(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(H, W) in [0, 1]: two sets of stripes, either multiplied or the larger one on top."""
    first, second = stripes(size, generator), stripes(size, generator)
    return first * second if draw_uniform(generator, 0, 1) < 0.5 else torch.maximum(first, second)


def cells(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(H, W) in [0, 1]: the cells around 9 to 900 scattered points, flat or darker towards their points."""
    number = round(3 * 10 ** draw_uniform(generator, 0, 1))
    # One point in each square of a grid that reaches one square beyond the image on all sides (Worley noise).
    points = torch.rand(2, number + 2, number + 2, generator=generator)
    values = torch.rand(number + 2, number + 2, generator=generator)
    y = (torch.arange(size[0]) + 0.5)[:, None] * (number / size[0]) + 1
    x = (torch.arange(size[1]) + 0.5)[None, :] * (number / size[1]) + 1
    row, column = y.long(), x.long()
    nearest = torch.full(size, math.inf)
    value = torch.zeros(size)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            i, j = row + down, column + right
            distance = (i + points[0, i, j] - y) ** 2 + (j + points[1, i, j] - x) ** 2
            value = torch.where(distance < nearest, values[i, j], value)
            nearest = torch.minimum(distance, nearest)
    return value if draw_uniform(generator, 0, 1) < 0.5 else nearest.sqrt().clamp(max=1)


PATTERNS = (clouds, grains, stripes, weave, cells)


def _frequencies(size: tuple[int, int], stretch: float, degrees: float) -> Tensor:
    """(H, W // 2 + 1) cycles along the image of each component of a real Fourier transform, counted more across a
    direction than along it."""
    rows = torch.fft.fftfreq(size[0], 1 / max(size))[:, None]
    columns = torch.fft.rfftfreq(size[1], 1 / max(size))[None, :]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.hypot(stretch * (cos * rows + sin * columns), cos * columns - sin * rows)


def _filtered_noise(size: tuple[int, int], gain: Tensor, generator: torch.Generator) -> Tensor:
    """(H, W) in [0, 1]: white noise with its spectrum multiplied by `gain`; three deviations span the range."""
    field = torch.fft.irfft2(torch.fft.rfft2(torch.randn(size, generator=generator)) * gain, s=size)
    field = (field - field.mean()) / field.std().clamp(min=1e-12)
    return (field / 6 + 0.5).clamp(0, 1)


def _colour(pattern: Tensor, generator: torch.Generator) -> Tensor:
    """(3, H, W) in [0, 1]: a pattern in 2 to 5 random colours, blended softly or in steps, with some noise."""
    num_colours = int(torch.randint(2, 6, (), generator=generator))
    palette = torch.rand(num_colours, 3, generator=generator)
    place = pattern * (num_colours - 1)
    lower = place.floor().long().clamp(max=num_colours - 2)
    steepness = 2 ** draw_uniform(generator, 0, 4)
    blend = ((place - lower - 0.5) * steepness + 0.5).clamp(0, 1)[..., None]
    colours = torch.lerp(palette[lower], palette[lower + 1], blend).permute(2, 0, 1)
    noise = draw_uniform(generator, 0, 0.08) * torch.randn(colours.shape, generator=generator)
    return (colours + noise).clamp(0, 1)
