"""Synthetic anomalies on normal images: Perlin textures (DRAEM), CutPaste, seamless patches (NSA).

Every function draws from the generator it is given, on the CPU, and computes where its image is: a draw is the same on
every device, and no draw depends on other images. Images are (3, H, W) float32 in [0, 1]; masks are (H, W) bool, true
where the image was changed. `docs/synthesis.webp` shows them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from methods.components.augment import augment_texture, draw_uniform, jitter_colour
from methods.components.levels import float64_device
from methods.components.perlin import perlin_mask, perlin_noise
from methods.components.textures import TextureSource, open_textures
from methods.components.warp import resize_image, rotate_image

__all__ = [
    "TextureSource",
    "augment_texture",
    "blend_texture",
    "cut_paste",
    "open_textures",
    "perlin_mask",
    "perlin_noise",
    "seamless_patch",
]

VISIBLE_CHANGE = 1 / 255
"""A pixel counts as changed when one of its colours changed by more than this, a step of 8 bits."""


def blend_texture(image: Tensor, texture: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Lays a texture over part of an image: I (1 - M) + (1 - beta) A M + beta I M (DRAEM, arXiv 2108.07610).

    Args:
        image: (3, H, W) the normal image I.
        texture: (3, H, W) the texture A.
        mask: (H, W) bool, the region M.
        beta: share of the image that shows through, in [0, 1].

    Returns:
        (3, H, W); outside the mask the very numbers of the image.
    """
    return torch.where(mask, torch.lerp(texture, image, beta), image)


def cut_paste(
    image: Tensor,
    generator: torch.Generator,
    *,
    variant: Literal["normal", "scar"] = "normal",
    jitter: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """Cuts a patch out of an image, jitters its colours and pastes it elsewhere (CutPaste, arXiv 2104.04015).

    `normal` is a rectangle of 2 to 15 % of the image's area and an aspect ratio in (0.3, 1) or (1, 3.3), both equally
    likely. `scar` is a thin strip, 2 to 16 wide and 10 to 25 long on an image of 256 pixels and in proportion on
    others, turned by up to 45 degrees.

    Args:
        image: (3, H, W) in [0, 1].
        generator: draws size, places, colours and angle.
        variant: shape of the patch.
        jitter: largest change of brightness, contrast, saturation and hue.

    Returns:
        The changed image, and the (H, W) bool mask of the pixels that changed visibly; all others are untouched.
    """
    size = image.shape[1], image.shape[2]
    patch_size = _draw_rectangle(size, generator) if variant == "normal" else _draw_strip(size, generator)
    patch = _crop(image, patch_size, generator)
    patch = jitter_colour(patch, generator, jitter)
    shape = torch.ones(patch_size, dtype=torch.bool, device=image.device)
    if variant == "scar":
        patch, shape = _turn_strip(patch, draw_uniform(generator, -45, 45), size)
    top, left = _draw_place(size, patch.shape[1:], generator)
    pasted = image.clone()
    window = pasted[:, top : top + patch.shape[1], left : left + patch.shape[2]]
    window.copy_(torch.where(shape, patch, window))
    return _keep_visible(image, pasted, VISIBLE_CHANGE)


def seamless_patch(
    image: Tensor,
    source: Tensor,
    generator: torch.Generator,
    *,
    side: tuple[float, float] = (0.06, 0.4),
    zoom: tuple[float, float] = (0.7, 1.3),
    gradients: Literal["source", "mixed"] = "source",
    tolerance: float = VISIBLE_CHANGE,
) -> tuple[Tensor, Tensor]:
    """Moves a patch of another normal image into this one without a visible seam (after NSA, arXiv 2109.15222).

    A rectangle of the source is zoomed and set into the image by Poisson blending (Perez et al., SIGGRAPH 2003): it
    keeps the Laplacian of the patch and takes on the image's values at its border, so that no seam tells of it. The
    equation is solved exactly, by sine transforms.

    Args:
        image: (3, H, W) in [0, 1], at least 4 pixels high and wide.
        source: (3, H', W') another normal image, or the same.
        generator: draws sizes, places and zoom.
        side: least and largest side of the rectangle as shares of the source's sides; in between they are drawn as the
            least plus a gamma variable of shape 2 and scale 0.1, so that small ones are common.
        zoom: smallest and largest factor on the rectangle.
        gradients: whether the guiding gradients are the patch's, or wherever the image's are larger, the image's.
        tolerance: changes up to this are taken back and not part of the mask, >= 0.

    Returns:
        The changed image in [0, 1], and the (H, W) bool mask of the pixels that changed; all others are untouched.
    """
    height, width = image.shape[1], image.shape[2]
    cut = (_draw_side(source.shape[1], side, generator), _draw_side(source.shape[2], side, generator))
    factor = draw_uniform(generator, *zoom)
    # One pixel of the image must remain around the rectangle, and one of the patch lies under it.
    target = (_between(round(cut[0] * factor), 3, height), _between(round(cut[1] * factor), 3, width))
    patch = resize_image(_crop(source, cut, generator), target)
    top, left = _draw_place((height, width), target, generator)
    blended = image.clone()
    window = blended[:, top : top + target[0], left : left + target[1]]
    window[:, 1:-1, 1:-1] = _solve_poisson(window, patch, gradients).clamp(0, 1).to(image)
    return _keep_visible(image, blended, tolerance)


def _solve_poisson(border: Tensor, patch: Tensor, gradients: Literal["source", "mixed"]) -> Tensor:
    """(3, h - 2, w - 2) float64 inside of a window (3, h, w): Laplacian of the guide, values of `border` around it.

    The five-point Laplacian with fixed borders is diagonal in the discrete sine basis, one per axis.
    """
    device = float64_device(border.device)
    border, patch = (pixels.to(device, torch.float64) for pixels in (border, patch))
    down, right = patch.diff(dim=1), patch.diff(dim=2)
    if gradients == "mixed":
        own_down, own_right = border.diff(dim=1), border.diff(dim=2)
        down = torch.where(own_down.abs() > down.abs(), own_down, down)
        right = torch.where(own_right.abs() > right.abs(), own_right, right)
    divergence = down.diff(dim=1)[:, :, 1:-1] + right.diff(dim=2)[:, 1:-1]  # (3, h - 2, w - 2)
    edge = border.clone()
    edge[:, 1:-1, 1:-1] = 0
    known = edge[:, :-2, 1:-1] + edge[:, 2:, 1:-1] + edge[:, 1:-1, :-2] + edge[:, 1:-1, 2:]
    rows, row_values = _sine_basis(divergence.shape[1], device)
    columns, column_values = _sine_basis(divergence.shape[2], device)
    spectrum = rows @ (divergence - known) @ columns / (row_values[:, None] + column_values)
    return rows @ spectrum @ columns


def _sine_basis(num: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, n) orthogonal, symmetric sine transform (DST-I) and the (n,) eigenvalues, < 0, of the second difference."""
    index = torch.arange(1, num + 1, dtype=torch.float64, device=device)
    basis = math.sqrt(2 / (num + 1)) * torch.sin(math.pi / (num + 1) * index[:, None] * index)
    return basis, 2 * torch.cos(math.pi / (num + 1) * index) - 2


def _keep_visible(before: Tensor, after: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The image where it changed by more than the tolerance and the one before elsewhere, and where that is."""
    mask = ((after - before).abs() > tolerance).any(dim=0)
    return torch.where(mask, after, before), mask


def _draw_rectangle(size: tuple[int, int], generator: torch.Generator) -> tuple[int, int]:
    """(h, w) of CutPaste's patch."""
    area = draw_uniform(generator, 0.02, 0.15) * size[0] * size[1]
    wide = draw_uniform(generator, 0, 1) < 0.5
    aspect = draw_uniform(generator, 1, 3.3) if wide else draw_uniform(generator, 0.3, 1)
    height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    return _between(height, 1, size[0]), _between(width, 1, size[1])


def _draw_strip(size: tuple[int, int], generator: torch.Generator) -> tuple[int, int]:
    """(h, w) of CutPaste's scar before it is turned: `w` across, `h` along."""
    unit = min(size) / 256
    across, along = draw_uniform(generator, 2, 16) * unit, draw_uniform(generator, 10, 25) * unit
    return _between(round(along), 1, size[0]), _between(round(across), 1, size[1])


def _turn_strip(patch: Tensor, degrees: float, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A patch turned within a frame that holds it, at most as large as the image, and the (h, w) bool of its pixels."""
    diagonal = math.ceil(math.hypot(*patch.shape[1:]))
    frame = torch.zeros(4, diagonal, diagonal, device=patch.device)
    top, left = (diagonal - patch.shape[1]) // 2, (diagonal - patch.shape[2]) // 2
    frame[:3, top : top + patch.shape[1], left : left + patch.shape[2]] = patch
    frame[3, top : top + patch.shape[1], left : left + patch.shape[2]] = 1
    turned = rotate_image(frame, degrees)[:, : size[0], : size[1]]
    # Half-covered pixels carry colour times cover.
    return turned[:3] / turned[3:].clamp(min=0.5), turned[3] >= 0.5


def _draw_side(length: int, side: tuple[float, float], generator: torch.Generator) -> int:
    # A gamma variable of shape 2 is the sum of two exponential ones.
    gamma = -0.1 * sum(math.log(1 - draw_uniform(generator, 0, 1)) for _ in range(2))
    return _between(round(min(side[0] + gamma, side[1]) * length), 3, length)


def _crop(image: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    top, left = _draw_place((image.shape[1], image.shape[2]), size, generator)
    return image[:, top : top + size[0], left : left + size[1]]


def _draw_place(size: tuple[int, int], inner: tuple[int, ...], generator: torch.Generator) -> tuple[int, int]:
    """Row and column at which something of size `inner` lies within `size`."""
    top, left = (
        int(torch.randint(outer - part + 1, (), generator=generator)) for outer, part in zip(size, inner, strict=True)
    )
    return top, left


def _between(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
