"""Losses that several trained detectors share: focal loss and structural similarity."""

from __future__ import annotations

import torch
from torch import Tensor


def focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float | None = None) -> Tensor:
    """Cross-entropy that counts well classified places less (Lin et al., arXiv 1708.02002, equation 5).

    -alpha_t (1 - p_t)^gamma log p_t, where p_t is the softmax probability of the true class.

    Args:
        logits: (B, 2, ...) scores of normal and anomalous.
        target: (B, ...) bool or integer, 1 = anomalous.
        gamma: how much less, >= 0; 0 is the cross-entropy.
        alpha: weight in [0, 1] of anomalous places, 1 - alpha of normal ones; None weighs both with 1.

    Returns:
        (B, ...) float32 loss per place, >= 0.
    """
    target = target.long()
    log_p = logits.float().log_softmax(dim=1).gather(1, target.unsqueeze(1)).squeeze(1)
    loss = -log_p * (-log_p.expm1()).pow(gamma)
    return loss if alpha is None else loss * torch.where(target == 1, alpha, 1 - alpha)


def structural_similarity(first: Tensor, second: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """SSIM of two batches of images at every pixel and channel (Wang et al., IEEE TIP 2004, equation 13).

    Means, variances and covariance are weighted by a Gaussian window; what lies beyond the border counts as 0 in both
    images. C1 = 0.01^2 and C2 = 0.03^2, for values of range 1. Always computed in float32.

    Args:
        first: (B, C, H, W).
        second: (B, C, H, W).
        window: side of the window, odd.
        sigma: standard deviation of the window's Gaussian in pixels.

    Returns:
        (B, C, H, W) float32 in [-1, 1]; 1 where the windows are equal.
    """
    with torch.autocast(first.device.type, enabled=False):  # variances are small differences of large numbers
        x, y = first.float(), second.float()
        mean_x, mean_y, squares, xy = _gaussian_mean(torch.stack([x, y, x * x + y * y, x * y]), window, sigma)
        variances = squares - mean_x * mean_x - mean_y * mean_y  # of both images together
        covariance = xy - mean_x * mean_y
        c1, c2 = 0.01**2, 0.03**2
        likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        return likeness / ((mean_x * mean_x + mean_y * mean_y + c1) * (variances + c2))


def _gaussian_mean(maps: Tensor, window: int, sigma: float) -> Tensor:
    """Weighted means of (..., H, W) maps over windows centred on every pixel, with zeros beyond the border.

    As products with banded matrices, which on a CPU are several times as fast as convolutions of single channels.
    """
    return _band(maps.shape[-2], window, sigma, maps) @ maps @ _band(maps.shape[-1], window, sigma, maps)


def _band(length: int, window: int, sigma: float, like: Tensor) -> Tensor:
    """(length, length) symmetric matrix of the windows' weights at every position of one axis."""
    offsets = torch.arange(-(window // 2), window // 2 + 1, dtype=like.dtype, device=like.device)
    total = torch.exp(-offsets.square() / (2 * sigma**2)).sum()
    positions = torch.arange(length, dtype=like.dtype, device=like.device)
    distances = (positions[:, None] - positions).abs()
    return torch.where(distances <= window // 2, torch.exp(-distances.square() / (2 * sigma**2)) / total, 0)
