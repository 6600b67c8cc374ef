"""Perlin noise one pixel at a time, as it is told in words."""

import math


def slow_perlin(size, scales, angles, degrees=0.0):
    """Noise (H rows of W) on a lattice of `scales` cells with unit gradients at these angles, turned about the centre.

    `angles[i][j]` belongs to the corner in row i and column j of the lattice; its cosine points down, its sine right.
    """
    height, width = size
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    rows = []
    for row in range(height):
        rows.append([])
        for column in range(width):
            down, right = row - (height - 1) / 2, column - (width - 1) / 2
            y = cos * down - sin * right + (height - 1) / 2
            x = sin * down + cos * right + (width - 1) / 2
            if not (-1e-9 <= y <= height - 1 + 1e-9 and -1e-9 <= x <= width - 1 + 1e-9):
                rows[-1].append(0.0)
                continue
            rows[-1].append(noise_at(y * scales[0] / height, x * scales[1] / width, scales, angles))
    return rows


def noise_at(y, x, scales, angles):
    top, left = min(int(y), scales[0] - 1), min(int(x), scales[1] - 1)
    total = 0.0
    for i in (top, top + 1):
        for j in (left, left + 1):
            slope = math.cos(angles[i][j]) * (y - i) + math.sin(angles[i][j]) * (x - j)
            total += weight(abs(y - i)) * weight(abs(x - j)) * slope
    return math.sqrt(2) * total


def weight(distance):
    """Falls from 1 at a corner to 0 one cell away, flat at both ends."""
    t = 1 - distance
    return 6 * t**5 - 15 * t**4 + 10 * t**3
