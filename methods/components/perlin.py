"""Perlin noise (Perlin, "Improving noise", SIGGRAPH 2002) and the masks that DRAEM (arXiv 2108.07610) cuts from it.

The noise is a function of the plane, so a turned mask is the noise read at turned positions: nothing is resampled, and
any image size goes with any number of lattice cells.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from methods.components.warp import turned_positions


def perlin_noise(
    size: tuple[int, int],
    scales: tuple[int, int],
    generator: torch.Generator,
    *,
    degrees: float = 0.0,
    device: torch.device | None = None,
) -> Tensor:
    """Gradient noise on a lattice, turned about the image's centre.

    Args:
        size: (H, W) pixels.
        scales: lattice cells along height and width, >= 1; more cells give finer noise.
        generator: draws the lattice, on the CPU whatever the device.
        degrees: by how much the noise is turned; corners that the turned lattice does not cover are 0.
        device: where the noise is computed; None for the CPU.

    Returns:
        (H, W) float32 with mean about 0, in [-1, 1].
    """
    angles = 2 * math.pi * torch.rand(scales[0] + 1, scales[1] + 1, generator=generator)
    gradients = torch.stack([angles.cos(), angles.sin()]).to(device)  # (2, scales[0] + 1, scales[1] + 1)
    rows, columns, inside = turned_positions(size, degrees, device)
    y, x = rows * (scales[0] / size[0]), columns * (scales[1] / size[1])
    top, left = (p.floor().long().clamp(0, scale - 1) for p, scale in zip((y, x), scales, strict=True))
    y, x = y - top, x - left  # position within the cell, in [0, 1)

    def ramp(down: int, right: int) -> Tensor:
        along_y, along_x = gradients[:, top + down, left + right]
        return along_y * (y - down) + along_x * (x - right)

    upper = torch.lerp(ramp(0, 0), ramp(0, 1), _fade(x))
    lower = torch.lerp(ramp(1, 0), ramp(1, 1), _fade(x))
    return torch.lerp(upper, lower, _fade(y)) * inside * math.sqrt(2)


def perlin_mask(
    size: tuple[int, int],
    generator: torch.Generator,
    *,
    exponents: tuple[int, int] = (0, 6),
    threshold: float = 0.5,
    rotate: bool = True,
    device: torch.device | None = None,
) -> Tensor:
    """Regions where Perlin noise of a random scale per axis exceeds a threshold, as in DRAEM; they may be empty.

    Args:
        size: (H, W) pixels.
        generator: draws scales, lattice and angle, on the CPU whatever the device.
        exponents: 2**k cells per axis, k drawn evenly from [exponents[0], exponents[1]).
        threshold: of the noise, which lies in [-1, 1].
        rotate: turns the noise by an angle drawn evenly from [-90, 90) degrees.
        device: where the mask is computed; None for the CPU.

    Returns:
        (H, W) bool, true where the anomaly is.
    """
    across, along = torch.randint(*exponents, (2,), generator=generator).tolist()
    degrees = 180 * float(torch.rand((), generator=generator)) - 90 if rotate else 0.0
    return perlin_noise(size, (2**across, 2**along), generator, degrees=degrees, device=device) > threshold


def _fade(t: Tensor) -> Tensor:
    """6 t^5 - 15 t^4 + 10 t^3, flat at 0 and 1."""
    return t * t * t * (t * (6 * t - 15) + 10)
