"""Which hypothesis GLASS takes for a category where nobody says: a look at the spectrum of its mean image."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Distribution = Literal["manifold", "hypersphere"]


def judge_distribution(mean_image: Tensor) -> Distribution:
    """Whether normal features are taken to lie on a manifold or in a hypersphere, by the mean training image.

    The grey image is blurred strongly. Textures and objects in changing places average to a spectrum with few large
    frequencies; an object in the same place in every image leaves many of them, densely filling the square or the disc
    around the origin that they reach. Sizes and thresholds are those of the official code (`distribution_judge`), where
    a disc counts as far as it lies within an array that begins at the origin's low side.

    Args:
        mean_image: (3, H, W) in [0, 1].
    """
    side, blur = 289, 39
    pixels = (mean_image.double().cpu() * 255).floor()
    pixels = F.interpolate(pixels[None], size=(side, side), mode="bilinear", align_corners=False).round()
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]).sum(dim=1).round()
    grey = F.avg_pool2d(F.pad(grey[None], [blur // 2] * 4, mode="reflect"), blur, stride=1)[0, 0].round()
    magnitude = torch.fft.fftshift(torch.fft.fft2(grey)).abs()
    rows, columns = (magnitude > math.exp(170 / 20)).nonzero(as_tuple=True)
    if len(rows) <= 60:
        return "manifold"
    rows, columns = (rows - side // 2).abs(), (columns - side // 2).abs()
    radius = float(torch.hypot(rows.double(), columns.double()).max())
    square = 4 * max(int(rows.max()), 1) * max(int(columns.max()), 1)
    axis = torch.arange(2 * side, dtype=torch.float64) - side // 2
    disc = int((torch.hypot(axis[:, None], axis) <= radius).sum())
    dense = len(rows) / square > 0.21 or len(rows) / disc > 0.21
    return "hypersphere" if dense and radius > 12 else "manifold"
