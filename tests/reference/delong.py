"""DeLong's variance and the bootstrap as their papers define them, slow and plain."""

import numpy as np


def psi(positive, negative):
    """1 where the anomalous image has the higher score, 1/2 for a tie."""
    return 1.0 if positive > negative else 0.5 if positive == negative else 0.0


def delong_by_pairs(scores, label, weights):
    """DeLong, DeLong and Clarke-Pearson (1988), eq. 4 to 8, pair by pair.

    Args:
        scores: (K, N).
        label: (N,).
        weights: (K,).

    Returns:
        The weighted sum of the AUROCs and its variance.
    """
    beats, beaten = [], []
    for row in scores:
        positive, negative = row[label == 1], row[label == 0]
        beats.append([np.mean([psi(x, y) for y in negative]) for x in positive])
        beaten.append([np.mean([psi(x, y) for x in positive]) for y in negative])
    areas = np.mean(beats, axis=1)
    covariance = np.cov(beats) / len(beats[0]) + np.cov(beaten) / len(beaten[0])
    return float(weights @ areas), float(weights @ np.atleast_2d(covariance) @ weights)
