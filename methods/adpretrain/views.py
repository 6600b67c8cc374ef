"""Two photometric views of an image that share its geometry, as ADPretrain's official code makes them.

Colour jitter, grey and blur are those of torchvision and Pillow by definition, but in floating point: the code rounds
to 8 bits after every step, and Pillow's blur is three box blurs close to the Gaussian used here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from methods.components.augment import LUMA, draw_uniform, hsv_to_rgb, rgb_to_hsv

JITTER_PROBABILITY = 0.8
JITTER = 0.4
"""Brightness, contrast and saturation change by factors in [1 - JITTER, 1 + JITTER)."""
HUE_JITTER = 0.1
"""In turns of the colour circle, to both sides."""
GREY_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.5
BLUR_SIGMA = (0.1, 2.0)
"""In pixels."""


def make_view(image: Tensor, generator: torch.Generator) -> Tensor:
    """One view: perhaps colours changed, perhaps grey, perhaps blurred.

    Args:
        image: (3, H, W) float32 RGB in [0, 1], on any device.
        generator: of the CPU; draws what is done.

    Returns:
        (3, H, W) in [0, 1].
    """
    if draw_uniform(generator, 0, 1) < JITTER_PROBABILITY:
        for index in torch.randperm(len(CHANGES), generator=generator).tolist():
            change, low, high = CHANGES[index]
            image = change(image, draw_uniform(generator, low, high))
    if draw_uniform(generator, 0, 1) < GREY_PROBABILITY:
        image = grey(image).expand_as(image)
    if draw_uniform(generator, 0, 1) < BLUR_PROBABILITY:
        image = blur(image, draw_uniform(generator, *BLUR_SIGMA))
    return image


def change_brightness(image: Tensor, factor: float) -> Tensor:
    """Between black (0) and the image (1), or beyond."""
    return (image * factor).clamp(0, 1)


def change_contrast(image: Tensor, factor: float) -> Tensor:
    """Between the mean brightness of the image everywhere (0) and the image (1), or beyond."""
    return torch.lerp(grey(image).mean().expand_as(image), image, factor).clamp(0, 1)


def change_saturation(image: Tensor, factor: float) -> Tensor:
    """Between the image in grey (0) and the image (1), or beyond."""
    return torch.lerp(grey(image).expand_as(image), image, factor).clamp(0, 1)


def turn_hue(image: Tensor, turns: float) -> Tensor:
    """Moves all hues along the colour circle, by a turn for 1."""
    hue, saturation, value = rgb_to_hsv(image)
    return hsv_to_rgb(hue + turns, saturation, value)


CHANGES: tuple[tuple[Callable[[Tensor, float], Tensor], float, float], ...] = (
    (change_brightness, 1 - JITTER, 1 + JITTER),
    (change_contrast, 1 - JITTER, 1 + JITTER),
    (change_saturation, 1 - JITTER, 1 + JITTER),
    (turn_hue, -HUE_JITTER, HUE_JITTER),
)
"""The changes of colour with the range of their strength, done in a drawn order."""


def grey(image: Tensor) -> Tensor:
    """(1, H, W) brightness of a (3, H, W) image."""
    red, green, blue = LUMA
    return red * image[:1] + green * image[1:2] + blue * image[2:]


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of a (..., H, W) image; its edges go on beyond the border.

    As products with banded matrices, which on a CPU are several times as fast as convolutions of single channels.
    """
    return _blur_matrix(image.shape[-2], sigma, image) @ image @ _blur_matrix(image.shape[-1], sigma, image).T


def _blur_matrix(length: int, sigma: float, like: Tensor) -> Tensor:
    """(length, length) weights that each place of one axis gives all places."""
    reach = math.ceil(4 * sigma)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    weights /= weights.sum()
    places = (torch.arange(length)[:, None] + offsets).clamp(0, length - 1)
    matrix = torch.zeros(length, length).scatter_add_(1, places, weights.expand(length, -1))
    return matrix.to(like, non_blocking=True)
