"""Turning and resizing images about their centre."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def turned_positions(
    size: tuple[int, int], degrees: float, device: torch.device | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the pixels of an image that is turned about its centre come from.

    Args:
        size: (H, W) pixels.
        degrees: angle; 0 gives the pixels' own positions exactly.
        device: of the result; None for the CPU.

    Returns:
        (H, W) float32 row and (H, W) column that each pixel reads, in pixels from the first one's centre, and (H, W)
        bool: whether they lie in the image.
    """
    middle = (size[0] - 1) / 2, (size[1] - 1) / 2
    rows = torch.arange(size[0], device=device)[:, None] - middle[0]
    columns = torch.arange(size[1], device=device)[None, :] - middle[1]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = cos * rows - sin * columns + middle[0], sin * rows + cos * columns + middle[1]
    inside = (y >= 0) & (y <= size[0] - 1) & (x >= 0) & (x <= size[1] - 1)
    return y, x, inside


def rotate_image(image: Tensor, degrees: float) -> Tensor:
    """Turns a (C, H, W) image about its centre, bilinearly; what comes from outside is 0."""
    height, width = image.shape[1:]
    y, x, _ = turned_positions((height, width), degrees, image.device)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=2)
    return F.grid_sample(image[None], grid[None].to(image.dtype), padding_mode="zeros", align_corners=False)[0]


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A (C, h, w) image as (C, *size), bilinear, averaged where it shrinks."""
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]
