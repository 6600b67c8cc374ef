"""From raw anomaly maps to maps at full resolution and image scores.

Bilinear upsampling and Gaussian smoothing are linear and separable, so both together are one matrix for the rows and
one for the columns, made once per shape: `out = rows @ anomaly_map @ columns.T`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from torch.nn import functional

from harness.contracts import ScoreReduction

_POOL_SIZES = {"mean_pool_16": 16, "mean_pool_21": 21}


def full_resolution(anomaly_map: Tensor, image_size: tuple[int, int], sigma: float) -> Tensor:
    """Upsamples maps bilinearly (pixel centres aligned, not corners) and smooths them with a Gaussian.

    Args:
        anomaly_map: (B, h, w) raw maps, higher = more anomalous.
        image_size: (H, W) of the result.
        sigma: standard deviation in pixels of the result; 0 for none. The kernel ends at 4 sigma and borders are
            reflected, as `scipy.ndimage.gaussian_filter` does by default.

    Returns:
        (B, H, W) float32. The map of an image does not depend on the others.
    """
    rows = _interpolation(anomaly_map.shape[1], image_size[0], sigma).to(anomaly_map.device)
    columns = _interpolation(anomaly_map.shape[2], image_size[1], sigma).to(anomaly_map.device)
    maps = anomaly_map.float()
    return torch.stack([rows @ single @ columns.T for single in maps]) if len(maps) else maps.new_zeros(0, *image_size)


@lru_cache(maxsize=32)
def _interpolation(length: int, target: int, sigma: float) -> Tensor:
    """(target, length) matrix that interpolates and then smooths along one axis."""
    identity = torch.eye(length, dtype=torch.float64)
    matrix = functional.interpolate(identity[None], size=target, mode="linear", align_corners=False)[0].T.numpy()
    if sigma > 0:
        matrix = gaussian_filter1d(matrix, sigma, axis=0, mode="reflect", truncate=4.0)
    return torch.from_numpy(np.ascontiguousarray(matrix)).float()


def reduce_maps(maps: Tensor, reduction: ScoreReduction) -> Tensor:
    """One score per image from its map at full resolution.

    Args:
        maps: (B, H, W).
        reduction: `max`; `mean_pool_16`, the largest mean over 16 x 16 windows (UniAD, arXiv 2206.03687, official
            code); `mean_pool_21`, the same with 21 x 21 (DRAEM, arXiv 2108.07610). Windows lie inside the map, at every
            position; a map smaller than the window is averaged whole.

    Returns:
        (B,) float32, higher = more anomalous.
    """
    if reduction == "max":
        return maps.flatten(1).amax(dim=1)
    size = _POOL_SIZES[reduction]
    window = (min(size, maps.shape[1]), min(size, maps.shape[2]))
    return functional.avg_pool2d(maps[:, None], window, stride=1).flatten(1).amax(dim=1)
