"""From a method's raw anomaly map to the map that is evaluated, and on to an image score."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

if TYPE_CHECKING:
    from harness.contracts import ScoreReduction


def full_resolution(anomaly_map: Tensor | np.ndarray, image_size: tuple[int, int], sigma: float) -> Tensor:
    """Upsamples maps bilinearly (align_corners=False), then smooths them with a Gaussian.

    Both steps are linear and act on rows and columns alone, so together they are one product `rows @ map @ columns.T`
    with two small matrices, which are cached. The Gaussian is that of `scipy.ndimage.gaussian_filter` as PatchCore uses
    it: cut at four sigma, mirrored at the border (mode "reflect"). A map may also be larger than the image; it is
    then sampled down without anti-aliasing, as `torch.nn.functional.interpolate` does.

    Args:
        anomaly_map: (B, h, w), higher = more anomalous.
        image_size: (H, W) of the result.
        sigma: standard deviation in pixels of `image_size`, >= 0; 0 for no smoothing.

    Returns:
        (B, H, W) float32 on the device of the maps. An image's result does not depend on the others of the batch.

    Raises:
        ValueError: not three dimensions, or a negative or infinite sigma.
    """
    maps = torch.as_tensor(anomaly_map)
    if maps.ndim != 3:
        raise ValueError(f"anomaly_map must be (B, h, w), got {tuple(maps.shape)}")
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma must be a number >= 0, got {sigma}")
    if tuple(maps.shape[1:]) == tuple(image_size) and sigma == 0:
        return maps.to(torch.float32)
    # float64, so that neither the machine's float32 matrix-product mode nor its thread count shows in the metrics;
    # image by image, because a batched product may round differently with the batch size.
    rows, columns = (
        torch.from_numpy(_resize_matrix(old, new, float(sigma))).to(maps.device)
        for old, new in zip(maps.shape[1:], image_size, strict=True)
    )
    result = maps.new_empty((len(maps), *image_size), dtype=torch.float32)
    for image, small in enumerate(maps):
        result[image] = rows @ small.to(torch.float64) @ columns.T
    return result


@lru_cache(maxsize=32)
def _resize_matrix(old: int, new: int, sigma: float) -> np.ndarray:
    """(new, old) float64: the bilinear upsampling and Gaussian smoothing of one axis."""
    centre = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    left = np.floor(centre).astype(int)
    matrix = np.zeros((new, old))
    matrix[np.arange(new), left] = 1 - (centre - left)
    matrix[np.arange(new), np.minimum(left + 1, old - 1)] += centre - left
    return gaussian_filter1d(matrix, sigma, axis=0, mode="reflect", truncate=4.0) if sigma else matrix


def reduce_maps(maps: Tensor | np.ndarray, reduction: ScoreReduction) -> Tensor:
    """Image scores from full-resolution maps.

    Args:
        maps: (B, H, W), higher = more anomalous.
        reduction: `max`, the largest pixel. `mean_pool_16`, the largest mean over windows of 16 x 16 at every position
            inside the map (UniAD, arXiv 2206.03687, official code); a smaller map is averaged whole. `mean_pool_21`,
            the same with 21 x 21 centred on every pixel, where what lies beyond the border counts as 0 (DRAEM,
            arXiv 2108.07610, official code; meant for maps >= 0).

    Returns:
        (B,) float32. An image's score does not depend on the others of the batch.

    Raises:
        ValueError: not three dimensions, or an unknown reduction.
    """
    maps = torch.as_tensor(maps)
    if maps.ndim != 3:
        raise ValueError(f"maps must be (B, H, W), got {tuple(maps.shape)}")
    if reduction == "max":
        return maps.amax(dim=(1, 2)).to(torch.float32)
    if reduction == "mean_pool_16":
        return _pooled_max(maps, window=16, padding=0)
    if reduction == "mean_pool_21":
        return _pooled_max(maps, window=21, padding=10)
    raise ValueError(f"unknown score_reduction {reduction!r}; known: max, mean_pool_16, mean_pool_21")


def _pooled_max(maps: Tensor, window: int, padding: int) -> Tensor:
    """(B,) largest mean over square windows, from sums over rectangles that begin at the corner, in float64."""
    height, width = (min(window, size + 2 * padding) for size in maps.shape[1:])
    padded = F.pad(maps.to(torch.float64), (padding + 1, padding, padding + 1, padding))
    sums = padded.cumsum(dim=1).cumsum(dim=2)
    sums = sums[:, height:] - sums[:, :-height]
    sums = sums[:, :, width:] - sums[:, :, :-width]
    return (sums.amax(dim=(1, 2)) / (height * width)).to(torch.float32)
