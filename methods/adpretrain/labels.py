"""From masks in pixels to labels of patches, in the two ways of ADPretrain (arXiv 2511.05245, official code)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_PIXELS = 32
"""A patch is anomalous to the angle loss if it holds more pixels of a defect than this."""
SMALL_PATCH = 6
"""Patches of less than 6 * 32 pixels, which the paper's backbones do not have: more than a sixth of the pixels."""


def label_by_count(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels for the angle loss (m1): patches with more than 32 defective pixels, or a sixth of all in small patches.

    Args:
        masks: (B, H, W), non-zero = defect.
        grid: (h, w) patches; a pixel belongs to one patch, whether or not they divide the image evenly.

    Returns:
        (B, h, w) bool.
    """
    (height, width), (rows, columns) = masks.shape[1:], grid
    pixels = (masks != 0).float()
    counts = _membership(height, rows, pixels) @ pixels @ _membership(width, columns, pixels).T
    return counts > min(LEAST_PIXELS, height * width / (rows * columns) / SMALL_PATCH)


def label_by_nearest(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels for the norm loss (m2): the masks, non-zero = defect, resized with nearest neighbour to (B, h, w) bool."""
    return F.interpolate((masks != 0).float()[:, None], size=grid, mode="nearest")[:, 0] != 0


def _membership(length: int, number: int, like: Tensor) -> Tensor:
    """(number, length) float: 1 where a pixel lies in a patch of one axis."""
    patch = torch.arange(length, device=like.device) * number // length
    return (patch == torch.arange(number, device=like.device)[:, None]).to(like.dtype)
