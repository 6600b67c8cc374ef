"""Structural similarity one window at a time."""

import numpy as np


def slow_ssim(first, second, window=11, sigma=1.5):
    """SSIM at every pixel of two (H, W) arrays with values of range 1; zeros lie beyond the border."""
    first, second = np.asarray(first, float), np.asarray(second, float)
    half = window // 2
    offsets = np.arange(-half, half + 1)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    padded = [np.pad(image, half) for image in (first, second)]
    result = np.empty(first.shape)
    for row in range(first.shape[0]):
        for column in range(first.shape[1]):
            x, y = (image[row : row + window, column : column + window] for image in padded)
            mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
            variance_x = (weights * (x - mean_x) ** 2).sum()
            variance_y = (weights * (y - mean_y) ** 2).sum()
            covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
            luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
            structure = (2 * covariance + 9e-4) / (variance_x + variance_y + 9e-4)
            result[row, column] = luminance * structure
    return result
