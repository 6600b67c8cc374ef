"""AUPRO as the official script defines it (Bergmann et al., arXiv 2112.09045), slow and plain, with every threshold."""

import numpy as np
from scipy.ndimage import label

EIGHT_NEIGHBOURS = np.ones((3, 3))


def aupro_by_counting(maps, masks, limit):
    """Counts the pixels above every normal score, region by region. For small cases.

    Args:
        maps: (N, H, W) scores.
        masks: (N, H, W), non-zero is defect.
        limit: false-positive rate at which the curve is cut.
    """
    normal, regions = [], []
    for scores, mask in zip(maps, masks, strict=True):
        labels, count = label(mask, EIGHT_NEIGHBOURS)
        normal.extend(scores[labels == 0].tolist())
        regions.extend(scores[labels == number].tolist() for number in range(1, count + 1))
    points = []
    for threshold in sorted(set(normal), reverse=True):
        overlaps = [sum(score > threshold for score in region) / len(region) for region in regions]
        points.append((sum(score > threshold for score in normal) / len(normal), sum(overlaps) / len(overlaps)))
    return area_below(np.array([*points, (1.0, 1.0)]), limit) / limit


def official_aupro(maps, masks, limit):
    """The same for large maps: the share of every region above a threshold is the sum of 1 / area of its pixels."""
    scores, weights, num_regions = [], [], 0
    for image, mask in zip(maps, masks, strict=True):
        labels, count = label(mask, EIGHT_NEIGHBOURS)
        for number in range(1, count + 1):
            inside = image[labels == number]
            scores.append(inside)
            weights.append(np.full(len(inside), 1 / len(inside)))
        num_regions += count
    scores, weights = np.concatenate(scores), np.concatenate(weights)
    order = np.argsort(scores)
    below = np.concatenate([[0], np.cumsum(weights[order])])
    thresholds, counts = np.unique(maps[np.asarray(masks) == 0], return_counts=True)
    false = 1 - np.cumsum(counts) / counts.sum()
    overlap = 1 - below[np.searchsorted(scores[order], thresholds, side="right")] / num_regions
    points = np.stack([false, overlap], axis=1)[::-1]
    return area_below(np.concatenate([points, [(1.0, 1.0)]]), limit) / limit


def area_below(points, limit):
    """Trapezoidal area below (K, 2) points up to x = limit, with a straight line to the point that is cut off."""
    inside = points[points[:, 0] <= limit]
    if len(inside) < len(points):
        (x0, y0), (x1, y1) = points[len(inside) - 1], points[len(inside)]
        inside = np.concatenate([inside, [(limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0))]])
    return float(np.trapezoid(inside[:, 1], inside[:, 0]))
