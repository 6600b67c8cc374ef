"""Position embeddings of transformers, resampled to the grid of another image size."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def resample_positions(positions: Tensor, grid: tuple[int, int], num_prefix: int, offset: float) -> Tensor:
    """Position embeddings on another grid, as the official DINOv2 code computes them (Oquab et al., arXiv 2304.07193).

    Bicubic without antialiasing. The offset enters the scale that maps the new grid onto the old one, (h + offset) / s
    instead of h / s, so the samples lie a little closer together than an even spread would put them; networks are
    sensitive to it.

    Args:
        positions: (1, num_prefix + s * s, D) for a square grid of side s.
        grid: (h, w) to resample to.
        num_prefix: class and register tokens in front, which have no place in the image.
        offset: `interpolate_offset` of that code.

    Returns:
        (1, num_prefix + h * w, D) of the same type; the argument itself if the grid is the same.
    """
    prefix, patches = positions[:, :num_prefix], positions[:, num_prefix:]
    side = math.isqrt(patches.shape[1])
    if grid == (side, side):
        return positions
    square = patches.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, s, s)
    scale = tuple((length + offset) / side for length in grid)
    resampled = functional.interpolate(square, scale_factor=scale, mode="bicubic")  # (1, D, h, w)
    return torch.cat([prefix, resampled.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)
