"""The surfaces of the generated dataset: woven fabric, brushed metal, printed tiles, granite.

Every painter draws one normal image from a random generator, with the variation a camera over a production line would
see: another place of the pattern, a slight turn and scale, uneven yarn or grain, other light. Arithmetic is float64
throughout, so that rounding to 8 bits gives the same bytes on processors with different vector units.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

SIZE = 256
"""Height and width of an image in pixels."""

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Surface:
    """One painted surface with what a defect needs to know of it."""

    image: Array
    """(256, 256, 3) linear colour, about [0, 1]."""
    angle: float
    """Main direction (yarn, brushing, tile edge) in radians from the x axis."""
    background: Array | None = None
    """(256, 256, 3) the surface without its printed elements, if it has any."""
    elements: Array | None = None
    """(E, 3) x, y and radius in pixels of the printed elements that lie wholly inside."""


@cache
def pixel_grid() -> tuple[Array, Array]:
    """x and y of every pixel, each (256, 256), from the centre of the image."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64) - (SIZE - 1) / 2
    return x, y


def paint_woven_fabric(rng: Generator) -> Surface:
    """A 2/2 twill of dark blue warp over pale weft, pitch about 9 pixels."""
    angle = rng.uniform(-0.06, 0.06)
    u, v = _turn(angle)
    pitch = 9.0 * rng.uniform(0.96, 1.04)
    u = u / pitch + rng.uniform(0, 64) + 0.35 * smooth_noise(rng, 5)
    v = v / pitch + rng.uniform(0, 64) + 0.35 * smooth_noise(rng, 5)
    warp, weft = np.floor(u).astype(int), np.floor(v).astype(int)
    across_warp, across_weft = u - warp - 0.5, v - weft - 0.5
    warp_on_top = ((warp - weft) & 3) < 2

    # Over a float of two yarns `along_float` runs from -0.5 to 0.5: the yarn rises out of the cloth and dips again.
    across = np.where(warp_on_top, across_warp, across_weft)
    along = np.where(warp_on_top, v, u)
    yarns_since_dip = np.where(warp_on_top, (weft - warp) & 3, (warp - weft - 2) & 3)
    along_float = (yarns_since_dip + np.where(warp_on_top, across_weft, across_warp)) / 2 - 0.25
    profile = np.sqrt(np.clip(1 - (1.8 * across) ** 2, 0, 1))
    height = profile * (0.72 + 0.28 * np.cos(np.pi * np.clip(along_float, -0.5, 0.5)))
    twist = 0.07 * np.sin(2 * np.pi * (3 * across + 1.3 * along)) + 0.05 * rng.standard_normal((SIZE, SIZE))
    yarn = np.where(warp_on_top, _per_index(rng, warp, 0.06), _per_index(rng, weft, 0.06))
    shade = (0.30 + 0.70 * height) * (1 + twist + yarn)
    warp_colour = _vary(rng, (0.20, 0.29, 0.47), 0.02)
    weft_colour = _vary(rng, (0.74, 0.73, 0.68), 0.02)
    colour = np.where(warp_on_top[..., None], warp_colour, weft_colour)
    return Surface(image=colour * shade[..., None] * _light(rng), angle=angle)


def paint_brushed_metal(rng: Generator) -> Surface:
    """Steel brushed in one direction, with the bright band that such a surface throws across its brushing."""
    angle = rng.uniform(-0.05, 0.05)
    u, v = _turn(angle)
    margin = 24
    lines = np.zeros((SIZE + 2 * margin, SIZE + 2 * margin))
    for length, weight in ((60.0, 1.0), (14.0, 0.5), (3.0, 0.22)):
        streaks = ndimage.gaussian_filter1d(rng.standard_normal(lines.shape), length, axis=1, mode="wrap", truncate=3)
        lines += weight * streaks / streaks.std()
    centre = (SIZE - 1) / 2 + margin
    grain = ndimage.map_coordinates(lines, [v + centre, u + centre], order=1, mode="nearest")
    band = np.exp(-(((u - rng.uniform(-70, 70)) / rng.uniform(75, 105)) ** 2))
    waviness = 0.02 * smooth_noise(rng, 4)
    shade = 0.46 + 0.24 * band + waviness + (0.035 + 0.025 * band) * grain
    tint = _vary(rng, (0.97, 1.0, 1.03), 0.01)
    return Surface(image=shade[..., None] * tint * _light(rng), angle=angle)


def paint_printed_tile(rng: Generator) -> Surface:
    """Glazed tiles of about 42 pixels with grout between them, printed with discs and rings by turns."""
    angle = rng.uniform(-0.025, 0.025)
    u, v = _turn(angle)
    pitch = 42.0 * rng.uniform(0.985, 1.015)
    u, v = u + rng.uniform(0, 2 * pitch), v + rng.uniform(0, 2 * pitch)
    column, row = np.floor(u / pitch).astype(int), np.floor(v / pitch).astype(int)
    from_edge = np.minimum(_to_edge(u, pitch), _to_edge(v, pitch))
    grout = _soft_step(2.0 - from_edge)
    bevel = np.exp(-np.clip(from_edge - 2, 0, None) / 1.8)
    tile_tone = _per_index(rng, column * 64 + row, 0.012)
    glaze = 0.80 + 0.015 * smooth_noise(rng, 12) + tile_tone + 0.06 * bevel
    grout_tone = 0.46 + 0.04 * smooth_noise(rng, 40)
    tile_colour = ((1 - grout) * glaze)[..., None] * _vary(rng, (1.0, 0.985, 0.95), 0.006)
    background = tile_colour + (grout * grout_tone)[..., None] * np.array((1.0, 0.97, 0.93))

    shaky = 0.4 * smooth_noise(rng, 16)  # the print's edge is not perfectly sharp
    distance = np.hypot(u - (column + 0.5) * pitch, v - (row + 0.5) * pitch) + shaky
    radius = 0.27 * pitch
    disc = _soft_step(radius - distance)
    ring = disc * _soft_step(distance - 0.58 * radius)
    ink = np.where((column + row) % 2 == 0, disc, ring) * (0.93 + 0.05 * smooth_noise(rng, 24))
    print_colour = _vary(rng, (0.10, 0.36, 0.42), 0.012)
    image = background * (1 - ink[..., None]) + print_colour * ink[..., None]

    columns, rows = np.meshgrid(np.unique(column), np.unique(row))
    centres = np.stack([(columns.ravel() + 0.5) * pitch, (rows.ravel() + 0.5) * pitch], axis=1)
    return _expose_print(rng, image, background, angle, u, v, centres, 1.25 * radius)


def paint_granite(rng: Generator) -> Surface:
    """Polished granite: crystals of pale and pink feldspar, grey quartz and black mica."""
    x, y = pixel_grid()
    grain, first, second = _grow_crystals(rng, x + 2.5 * smooth_noise(rng, 48), y + 2.5 * smooth_noise(rng, 48))
    kinds = rng.choice(4, int(grain.max()) + 1, p=(0.38, 0.26, 0.26, 0.10))
    tones = 0.045 * rng.standard_normal(len(kinds))
    boundary = np.exp((first - second) / 0.8)
    palette = np.array([(0.80, 0.76, 0.72), (0.71, 0.57, 0.52), (0.56, 0.55, 0.55), (0.25, 0.24, 0.25)])
    palette = palette * (1 + 0.015 * rng.standard_normal(3))
    texture = 0.03 * smooth_noise(rng, 90) + 0.02 * rng.standard_normal((SIZE, SIZE))
    shade = 1 + tones[grain] + texture - 0.10 * boundary
    image = ndimage.gaussian_filter(palette[kinds[grain]] * shade[..., None], (0.6, 0.6, 0))
    return Surface(image=image * _light(rng), angle=rng.uniform(0, np.pi))


SURFACES = {
    "brushed_metal": paint_brushed_metal,
    "granite": paint_granite,
    "printed_tile": paint_printed_tile,
    "woven_fabric": paint_woven_fabric,
}


def smooth_noise(rng: Generator, cells: int) -> Array:
    """(256, 256) smooth random field of mean about 0 and standard deviation 1; `cells` bumps fit along a side."""
    weights = _spline_weights(cells)
    field = weights @ rng.standard_normal((cells + 3, cells + 3)) @ weights.T
    return field / 0.48  # standard deviation of a cubic B-spline of unit normal numbers in two dimensions


@cache
def _spline_weights(cells: int) -> Array:
    """(256, cells + 3) uniform cubic B-spline basis at the pixels of one side."""
    position = (np.arange(SIZE) + 0.5) / SIZE * cells
    cell = np.minimum(position.astype(int), cells - 1)
    t = position - cell
    basis = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], axis=1) / 6
    weights = np.zeros((SIZE, cells + 3))
    for offset in range(4):
        weights[np.arange(SIZE), cell + offset] = basis[:, offset]
    return weights


def _grow_crystals(rng: Generator, x: Array, y: Array) -> tuple[NDArray[np.int_], Array, Array]:
    """Voronoi cells about one random seed per square of 6.6 pixels.

    Only the seeds of the 3 x 3 squares around a pixel are compared, which is nearly always exact and much faster than
    a search among all.

    Returns:
        Number of the nearest seed, and the distances to the nearest and the second, each (256, 256).
    """
    pitch, squares = 6.6, 44
    square_x, square_y = (np.floor(place / pitch).astype(int) + squares // 2 for place in (x, y))
    jitter = rng.uniform(0, 1, (2, squares, squares))
    seeds_x, seeds_y = (np.arange(squares) - squares // 2 + jitter[0]) * pitch, jitter[1] * pitch
    seeds_y = seeds_y + (np.arange(squares) - squares // 2)[:, None] * pitch
    nearest = np.zeros(x.shape, dtype=int)
    first, second = np.full(x.shape, np.inf), np.full(x.shape, np.inf)
    for step_y in (-1, 0, 1):
        for step_x in (-1, 0, 1):
            column, row = np.clip(square_x + step_x, 0, squares - 1), np.clip(square_y + step_y, 0, squares - 1)
            number = row * squares + column
            distance = (x - seeds_x.ravel()[number]) ** 2 + (y - seeds_y.ravel()[number]) ** 2
            closer = distance < first
            second = np.where(closer, first, np.minimum(second, distance))
            first = np.where(closer, distance, first)
            nearest = np.where(closer, number, nearest)
    return nearest, np.sqrt(first), np.sqrt(second)


def _turn(angle: float) -> tuple[Array, Array]:
    """Pixel coordinates along and across a direction."""
    x, y = pixel_grid()
    return np.cos(angle) * x + np.sin(angle) * y, -np.sin(angle) * x + np.cos(angle) * y


def _per_index(rng: Generator, index: NDArray[np.int_], deviation: float) -> Array:
    """One normal random number per distinct index, spread to where the index is."""
    first = int(index.min())
    return (deviation * rng.standard_normal(int(index.max()) - first + 1))[index - first]


def _vary(rng: Generator, colour: tuple[float, float, float], deviation: float) -> Array:
    return np.array(colour) + deviation * rng.standard_normal(3)


def _to_edge(position: Array, pitch: float) -> Array:
    """Distance to the nearest multiple of the pitch."""
    return pitch / 2 - np.abs(position % pitch - pitch / 2)


def _soft_step(distance: Array) -> Array:
    """0 outside, 1 inside, with an edge of one pixel."""
    return np.clip(distance + 0.5, 0.0, 1.0)


def _light(rng: Generator) -> Array:
    """(256, 256, 1) uneven light: a slope in any direction, a vignette, and the lamp's brightness."""
    x, y = pixel_grid()
    direction, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.08)
    light = 1 + slope * (np.cos(direction) * x + np.sin(direction) * y) / (SIZE / 2)
    light = light - 0.05 * (x**2 + y**2) / (SIZE / 2) ** 2 + 0.03 * rng.standard_normal()
    return np.asarray(light[..., None])


def _expose_print(
    rng: Generator, image: Array, background: Array, angle: float, u: Array, v: Array, centres: Array, radius: float
) -> Surface:
    """Lights print and background alike and finds the elements, given in tile coordinates, that lie wholly inside."""
    light = _light(rng)
    x, y = pixel_grid()
    # Tile coordinates are a turn and a shift of pixel coordinates, so the inverse follows from one pixel.
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    shift = np.array([u[0, 0], v[0, 0]]) - back @ np.array([x[0, 0], y[0, 0]])
    pixels = (centres - shift) @ back
    inside = np.abs(pixels).max(axis=1) < SIZE / 2 - radius - 4
    elements = np.column_stack([pixels[inside], np.full(int(inside.sum()), radius)])
    return Surface(image=image * light, angle=angle, background=background * light, elements=elements)
