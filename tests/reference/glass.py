"""GLASS written out plainly: the training step in one process with nothing reused, and the look at a spectrum."""

import math

import numpy as np
import torch
from scipy import ndimage


def clamp_distance(point, origin, low, high):
    """One (E,) feature at a distance in [low, high] from its origin."""
    difference = point - origin
    distance = difference.norm()
    return origin + difference * (distance.clamp(low, high) / (distance + 1e-10))


def plain_loss(network, normal, painted, noise, defects, centre, config, hypersphere):
    """Loss of one step.

    Args:
        network: adaptor and discriminator, in training mode.
        normal, painted: (B, P, E) patch features of normal images and of the same with painted anomalies.
        noise: (B, P, E) added to the adapted normal features.
        defects: (B, P) bool, painted patches.
        centre: (P, E) mean adapted feature per position.
        config: the method's.
        hypersphere: which hypothesis.
    """
    rows = normal.shape[0] * normal.shape[1]

    def score(features):
        return network.rest(network.first(features))[:, 0].sigmoid()

    normal = network.adaptor(normal).reshape(rows, -1)
    painted = network.adaptor(painted).reshape(rows, -1)
    defects = defects.reshape(rows)
    centres = centre.repeat(rows // len(centre), 1)
    radius = config.manifold_radius
    if hypersphere:
        near = [(f - c).norm().item() for f, c in zip(normal, centres, strict=True)]
        near += [(f - c).norm().item() for f, c, d in zip(painted, centres, defects, strict=True) if not d]
        radius = float(np.quantile(np.array(near), config.radius_quantile))
        painted = torch.stack(
            [
                clamp_distance(f, c, 2 * radius, 4 * radius) if d else f
                for f, c, d in zip(painted, centres, defects, strict=True)
            ]
        )
    anomalous = normal + noise.reshape(rows, -1)
    for step in range(config.ascent_steps):
        scores = score(torch.cat([normal, anomalous]))[rows:]
        (gradient,) = torch.autograd.grad(-scores.log().mean(), anomalous, retain_graph=True)
        anomalous = anomalous + config.ascent_rate * gradient / (gradient.norm(dim=1, keepdim=True) + 1e-10)
        if (step + 1) % config.project_every == 0:
            origins = centres if hypersphere else normal
            anomalous = torch.stack(
                [clamp_distance(f, o, radius, 2 * radius) for f, o in zip(anomalous, origins, strict=True)]
            )
    scores = score(torch.cat([normal, anomalous]))
    told_apart = -(1 - scores[:rows]).log().mean() - scores[rows:].log().mean()
    scores = score(painted)
    errors = [abs(s.item() - float(d)) for s, d in zip(scores, defects, strict=True)]
    threshold = np.quantile(np.square(errors), config.easy_quantile)
    hard = [i for i in range(rows) if errors[i] ** 2 >= threshold - 1e-9]
    focal = 0.0
    for i in hard:
        true = scores[i] if defects[i] else 1 - scores[i]
        focal = focal - (1 - true) ** config.focal_gamma * true.log()
    assert math.isfinite(radius)
    return told_apart + focal / len(hard)


def plain_judgement(mean_image):
    """The hypothesis for a (3, H, W) mean image in [0, 1]: bilinear resize, blur, Fourier transform, counts."""
    side = 289
    pixels = np.floor(mean_image.astype(np.float64) * 255)
    places = [(np.arange(side) + 0.5) * n / side - 0.5 for n in pixels.shape[1:]]
    grid = np.meshgrid(*places, indexing="ij")
    red, green, blue = (np.rint(ndimage.map_coordinates(p, grid, order=1, mode="nearest")) for p in pixels)
    grey = np.rint(0.299 * red + 0.587 * green + 0.114 * blue)
    blurred = np.rint(ndimage.uniform_filter(grey, 39, mode="mirror"))
    decibels = 20 * np.log(np.abs(np.fft.fftshift(np.fft.fft2(blurred))) + 1e-300)
    points = [(r - 144, c - 144) for r in range(side) for c in range(side) if decibels[r, c] > 170]
    radius = max(math.hypot(*point) for point in points)
    in_disc = sum(math.hypot(r, c) <= radius for r in range(-144, 2 * side - 144) for c in range(-144, 2 * side - 144))
    tall, broad = (max(1, max(abs(point[axis]) for point in points)) for axis in (0, 1))
    dense = len(points) / (4 * tall * broad) > 0.21 or len(points) / in_disc > 0.21
    return "hypersphere" if dense and radius > 12 and len(points) > 60 else "manifold"
