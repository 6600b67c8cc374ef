"""The defects of the generated dataset: painters that change a surface and say which pixels they changed.

Every painter takes a surface, a random generator and a strength in [0, 1], from barely visible to plain, and gives the
changed image (256, 256, 3) and its mask (256, 256), true where the surface differs visibly from a normal one.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from harness.datasets.surfaces import SIZE, Array, Surface, pixel_grid, smooth_noise

Painted = tuple[Array, NDArray[np.bool_]]


def paint_scratch(surface: Surface, rng: Generator, strength: float) -> Painted:
    """A thin, slightly bent line, bright or dark, that crosses the main direction of the surface."""
    start = _place(rng, 50)
    direction = surface.angle + rng.choice((-1, 1)) * rng.uniform(0.5, 1.4)
    bend = rng.uniform(-0.012, 0.012)
    num_steps = int(rng.uniform(40, 110) / 4)
    headings = direction + bend * 4 * np.arange(num_steps)
    steps = 4 * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    points = start + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)]) - steps.sum(axis=0) / 2
    width = rng.uniform(0.7, 1.3)
    alpha = np.clip(width + 0.5 - _distance_to(points), 0, 1)
    change = (0.06 + 0.44 * strength) * rng.choice((-1.0, 1.0), p=(0.4, 0.6))
    return surface.image + change * alpha[..., None], alpha > 0.3


def paint_crack(surface: Surface, rng: Generator, strength: float) -> Painted:
    """A jagged dark line that thins out, with one or two branches."""
    start, heading = _place(rng, 60), rng.uniform(0, 2 * np.pi)
    alpha = np.zeros((SIZE, SIZE))
    trunk = _walk(rng, start, heading, length=rng.uniform(50, 110))
    branches = [trunk]
    for _ in range(rng.integers(1, 3)):
        fork = trunk[rng.integers(len(trunk) // 4, 3 * len(trunk) // 4)]
        branches.append(_walk(rng, fork, heading + rng.choice((-1, 1)) * rng.uniform(0.5, 1.1), rng.uniform(20, 45)))
    for number, points in enumerate(branches):
        width = (0.9 + 1.0 * strength) * (0.7 if number else 1.0)
        alpha = np.maximum(alpha, np.clip(width + 0.3 - _distance_to(points), 0, 1))
    dark = surface.image * (1 - (0.30 + 0.50 * strength) * alpha[..., None])
    return dark, alpha > 0.3


def paint_stain(surface: Surface, rng: Generator, strength: float) -> Painted:
    """A brownish spot with a soft edge, a little darker at the rim, through which the surface shows."""
    depth = _blob(rng, rng.uniform(16, 38))
    alpha = np.clip(depth / 5, 0, 1)
    rim = np.exp(-((depth - 3) ** 2) / 8) * (depth > 0)
    tint = np.array((0.55, 0.80, 1.0)) if rng.random() < 0.7 else np.array((0.9, 0.9, 0.9))
    loss = (0.05 + 0.30 * strength) * (alpha + 0.5 * rim)
    return surface.image * (1 - loss[..., None] * tint), alpha > 0.3


def paint_colour_shift(surface: Surface, rng: Generator, strength: float) -> Painted:
    """A region in another hue of about the same brightness, as from a wrong dye or ink."""
    alpha = np.clip(_blob(rng, rng.uniform(18, 36)) / 3, 0, 1)[..., None]
    red, green, blue = (0.299, 0.587, 0.114)  # shares of luma, ITU-R BT.601
    gain = rng.standard_normal(3)
    gain -= gain @ np.array((red, green, blue))
    gain /= np.abs(gain).max()
    return surface.image * (1 + (0.05 + 0.25 * strength) * alpha * gain), alpha[..., 0] > 0.3


def paint_blur(surface: Surface, rng: Generator, strength: float) -> Painted:
    """A region where the fine structure is worn or smeared away."""
    alpha = np.clip(_blob(rng, rng.uniform(16, 34)) / 3, 0, 1)[..., None]
    sigma = 0.8 + 3.2 * strength
    worn = ndimage.gaussian_filter(surface.image, (sigma, sigma, 0))
    return surface.image * (1 - alpha) + worn * alpha, alpha[..., 0] > 0.3


def paint_dent(surface: Surface, rng: Generator, strength: float) -> Painted:
    """A shallow hollow: bright on one flank and dark on the other, as lit from the side."""
    x, y = pixel_grid()
    centre_x, centre_y = _place(rng, 50)
    radius, light = rng.uniform(5, 14), rng.uniform(0, 2 * np.pi)
    dx, dy = (x - centre_x) / radius, (y - centre_y) / radius
    slope = (np.cos(light) * dx + np.sin(light) * dy) * np.exp(-(dx**2 + dy**2) / 2)
    shade = (0.05 + 0.35 * strength) * slope / np.exp(-0.5)
    return surface.image * (1 + shade[..., None]), np.hypot(dx, dy) < 1.8


def paint_displaced(surface: Surface, rng: Generator, strength: float) -> Painted:
    """An element of the print out of its place; on a surface without print, a patch that is shifted and turned."""
    if surface.elements is not None and surface.background is not None:
        x, y, radius = surface.elements[rng.integers(len(surface.elements))]
        heading, distance = rng.uniform(0, 2 * np.pi), 4.0 + 8.0 * strength
        shift = np.array((np.sin(heading), np.cos(heading))) * distance
        inside = _disc(x, y, radius)[..., None]
        ink = ndimage.shift((surface.image - surface.background) * inside, (*shift, 0), order=1)
        image = surface.background * inside + surface.image * (1 - inside) + ink
        return image, np.abs(image - surface.image).max(axis=2) > 0.08
    alpha = np.clip(_patch(rng, surface.angle, rng.uniform(14, 30)) + 0.5, 0, 1)[..., None]
    turned = ndimage.rotate(surface.image, 4 + 14 * strength, reshape=False, order=1, mode="reflect")
    moved = np.roll(turned, rng.integers(3, 7, 2), axis=(0, 1))
    return surface.image * (1 - alpha) + moved * alpha, alpha[..., 0] > 0.5


def paint_missing(surface: Surface, rng: Generator, strength: float) -> Painted:
    """An element of the print that is absent, or only pale where the strength is small."""
    if surface.elements is None or surface.background is None:
        raise ValueError("this surface has no elements that could be missing")
    x, y, radius = surface.elements[rng.integers(len(surface.elements))]
    gone = (0.4 + 0.6 * strength) * _disc(x, y, radius)[..., None]
    image = surface.image * (1 - gone) + surface.background * gone
    return image, np.abs(surface.image - surface.background).max(axis=2) * _disc(x, y, radius) > 0.08


DEFECTS = {
    "blur": paint_blur,
    "colour_shift": paint_colour_shift,
    "crack": paint_crack,
    "dent": paint_dent,
    "displaced": paint_displaced,
    "missing": paint_missing,
    "scratch": paint_scratch,
    "stain": paint_stain,
}


def _place(rng: Generator, margin: float) -> Array:
    """(2,) x and y from the centre, at least `margin` pixels inside the image."""
    return rng.uniform(-SIZE / 2 + margin, SIZE / 2 - margin, 2)


def _disc(x: float, y: float, radius: float) -> Array:
    grid_x, grid_y = pixel_grid()
    return np.clip(radius + 0.5 - np.hypot(grid_x - x, grid_y - y), 0, 1)


def _blob(rng: Generator, radius: float) -> Array:
    """(256, 256) depth in pixels inside an irregular round region, negative outside."""
    x, y = pixel_grid()
    centre_x, centre_y = _place(rng, 48)
    stretch, turn = rng.uniform(0.7, 1.0), rng.uniform(0, np.pi)
    along = np.cos(turn) * (x - centre_x) + np.sin(turn) * (y - centre_y)
    across = -np.sin(turn) * (x - centre_x) + np.cos(turn) * (y - centre_y)
    return radius - np.hypot(along, across / stretch) + 0.14 * radius * smooth_noise(rng, 14)


def _patch(rng: Generator, angle: float, half_side: float) -> Array:
    """(256, 256) depth in pixels inside a rectangle along the surface's direction, negative outside."""
    x, y = pixel_grid()
    centre_x, centre_y = _place(rng, 48)
    along = np.cos(angle) * (x - centre_x) + np.sin(angle) * (y - centre_y)
    across = -np.sin(angle) * (x - centre_x) + np.cos(angle) * (y - centre_y)
    return np.minimum(half_side - np.abs(along), half_side * rng.uniform(0.5, 1.0) - np.abs(across))


def _walk(rng: Generator, start: Array, heading: float, length: float) -> Array:
    """(K, 2) points of a jagged path in steps of 5 pixels."""
    headings = heading + np.cumsum(rng.normal(0, 0.22, int(length / 5))) + rng.normal(0, 0.45, int(length / 5))
    steps = 5 * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    return start + np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])


def _distance_to(points: Array) -> Array:
    """(256, 256) distance of every pixel to a path of straight pieces through the points (K, 2)."""
    x, y = pixel_grid()
    nearest = np.full((SIZE, SIZE), np.inf)
    for (x0, y0), (x1, y1) in pairwise(points):
        dx, dy = x1 - x0, y1 - y0
        t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx**2 + dy**2), 0, 1)
        nearest = np.minimum(nearest, (x - x0 - t * dx) ** 2 + (y - y0 - t * dy) ** 2)
    return np.sqrt(nearest)
