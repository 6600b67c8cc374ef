"""How sure a difference is: intervals over test images and over seeds, and p-values for many comparisons at once.

What is estimated is always a weighted sum of metrics, such as one AUROC minus another or a mean of such differences.

- **Over images**, for AUROC: DeLong, DeLong and Clarke-Pearson (Biometrics 1988), computed from sorted scores in
  the spirit of Sun and Xu (IEEE Signal Processing Letters 2014), with the degrees of freedom that Brunner and Munzel
  (Biometrical Journal 2000) give the same variance. Any weights, so the scores of many seeds and detectors on the same
  images count jointly.
- **Over images**, for any metric of image scores: a paired bootstrap, normal and anomalous images resampled apart.
- **Over seeds**: Student's t of the differences per seed, or Welch's where the two sides have different seeds.

Both together are the random-effects model that radiology uses for several readers of the same cases (Obuchowski and
Rockette, Communications in Statistics 1995), with seeds for readers: the variances add up. What both share, the
interaction of image and seed, counts twice, which errs on the side of caution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
"""Metrics that image scores alone determine."""

NUM_REPLICATES = 1000
"""Of a bootstrap; its standard error is then known to about 2 %."""


@dataclass(frozen=True)
class Estimate:
    """A number with its sampling variance."""

    value: float
    variance: float | None = None
    """None: not known, so there is no interval and no test."""
    dof: float = math.inf
    """Degrees of freedom of `variance`."""

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """Symmetric interval that covers the true value with probability `confidence`; None without a variance."""
        if self.variance is None:
            return None
        half = float(stdtrit(self.dof, (1 + confidence) / 2)) * math.sqrt(self.variance)
        return self.value - half, self.value + half

    def p_value(self) -> float | None:
        """Two-sided p-value of "the true value is zero"; None without a variance."""
        if self.variance is None:
            return None
        if self.variance == 0:  # only ever beside a difference of nothing
            return 1.0
        return float(2 * stdtr(self.dof, -abs(self.value) / math.sqrt(self.variance)))


def add_variances(value: float, parts: Iterable[Estimate]) -> Estimate:
    """An estimate whose variance is the sum of independent parts, with the degrees of freedom of Satterthwaite (1946).

    Parts without a variance are left out; without any there is none.
    """
    known = [(part.variance, part.dof) for part in parts if part.variance is not None]
    total = sum(variance for variance, _ in known)
    spread = sum(variance**2 / dof for variance, dof in known)
    dof = total**2 / spread if spread > 0 else math.inf
    return Estimate(value, total, dof) if known else Estimate(value)


# --- over images -----------------------------------------------------------------------------------------------


def placements(scores: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two structural components of AUROC (DeLong et al. 1988, eq. 4 and 5); ties count one half.

    Args:
        scores: (K, N) image scores of K detectors on the same images, higher = more anomalous.
        label: (N,) 0 normal, 1 anomalous.

    Returns:
        (K, m) per anomalous image the share of normal ones it beats, and (K, n) per normal image the share of anomalous
        ones that beat it. The mean of either is the AUROC.
    """
    anomalous = label == 1
    positive, negative = scores[:, anomalous], scores[:, ~anomalous]
    return _shares_below(positive, negative), 1 - _shares_below(negative, positive)


def _shares_below(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(K, a) for each score the share of the (K, b) others of its row that lie below it; equal ones count one half."""
    shares = np.empty(scores.shape)
    for row, score, other in zip(shares, scores, np.sort(others, axis=1), strict=True):
        row[:] = np.searchsorted(other, score, "left") + np.searchsorted(other, score, "right")
    return shares / (2 * others.shape[1])


def delong(scores: np.ndarray, label: np.ndarray, weights: np.ndarray) -> Estimate:
    """A weighted sum of the AUROCs of K detectors on the same images.

    Args:
        scores: (K, N) image scores, higher = more anomalous.
        label: (N,) 0 normal, 1 anomalous.
        weights: (K,) such as (1, -1) for a difference.

    Returns:
        The sum; without a variance where a class has fewer than two images, and where the images show none although
        the sum is not zero, because then they are too few to tell.
    """
    return weigh_placements(*placements(scores, label), weights)


def weigh_placements(beats: np.ndarray, beaten: np.ndarray, weights: np.ndarray) -> Estimate:
    """As `delong`, from the placements (K, m) and (K, n) of the detectors."""
    value = float(weights @ beats.mean(axis=1))
    if min(beats.shape[1], beaten.shape[1]) < 2:
        return Estimate(value)
    parts = [
        Estimate(value, float(np.var(weights @ part, ddof=1)) / part.shape[1], part.shape[1] - 1)
        for part in (beats, beaten)
    ]
    return _checked(value, add_variances(value, parts))


def _checked(value: float, estimate: Estimate) -> Estimate:
    """No variance where the sample shows none: nothing is known then, unless the difference itself is nothing."""
    # Sums of rounded shares differ from zero in the last bits.
    if estimate.variance is None or estimate.variance > 1e-18:
        return estimate
    return Estimate(0.0, 0.0) if abs(value) < 1e-9 else Estimate(value)


def weighted_metric(metric: str, score: np.ndarray, label: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A metric of image scores when every image counts several times or not at all.

    Args:
        metric: name in `IMAGE_METRICS`.
        score: (N,) higher = more anomalous.
        label: (N,) 0 normal, 1 anomalous.
        counts: (N, R) float, how often each image counts; every column has images of both classes.

    Returns:
        (R,) values in [0, 1].
    """
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.diff(score[order], append=-np.inf))  # of each group of equal scores
    sorted_counts = counts[order]
    chosen = np.cumsum(sorted_counts, axis=0)
    hits = np.cumsum(sorted_counts * (label[order] == 1)[:, None].astype(counts.dtype), axis=0)
    if len(last) < len(order):
        chosen, hits = chosen[last], hits[last]  # (thresholds, R)
    num_anomalous, num_normal = hits[-1], chosen[-1] - hits[-1]
    if metric == "image_auroc":
        heights = (hits + _before(hits)) / 2
        return (_steps(chosen - hits) * heights).sum(axis=0) / (num_anomalous * num_normal)
    if metric == "image_ap":
        return (_steps(hits) * hits / np.maximum(chosen, 1)).sum(axis=0) / num_anomalous
    if metric == "image_f1_max":
        return (2 * hits / (chosen + num_anomalous)).max(axis=0)
    raise ValueError(f"{metric!r} is no metric of image scores; known: {', '.join(IMAGE_METRICS)}")


def _before(values: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(values[:1]), values[:-1]])


def _steps(values: np.ndarray) -> np.ndarray:
    return values - _before(values)


def resample(label: np.ndarray, seed: int, num_replicates: int = NUM_REPLICATES) -> np.ndarray | None:
    """How often each image is drawn in each replicate; every class keeps its size.

    Returns:
        (N, R) float32, or None where a class has fewer than two images.
    """
    classes = [np.flatnonzero(label == name) for name in (0, 1)]
    if min(len(members) for members in classes) < 2:
        return None
    generator = np.random.default_rng(seed)
    counts = np.zeros((label.size, num_replicates), dtype=np.float32)
    for members in classes:
        shares = np.full(len(members), 1 / len(members))
        counts[members] = generator.multinomial(len(members), shares, size=num_replicates).T
    return counts


def bootstrap(
    metric: str,
    scores: np.ndarray,
    label: np.ndarray,
    weights: np.ndarray,
    seed: int,
    num_replicates: int = NUM_REPLICATES,
) -> Estimate:
    """A weighted sum of a metric of K detectors on the same images, its variance by resampling the images.

    All detectors see the same resampled images.

    Args:
        metric: name in `IMAGE_METRICS`.
        scores: (K, N) image scores, higher = more anomalous.
        label: (N,) 0 normal, 1 anomalous.
        weights: (K,) such as (1, -1) for a difference.
        seed: of the resampling.
        num_replicates: how often to resample.

    Returns:
        The sum, without a variance in the cases that `delong` names.
    """
    value = float(sum(w * plain_metric(metric, row, label) for w, row in zip(weights, scores, strict=True)))
    counts = resample(label, seed, num_replicates)
    if counts is None:
        return Estimate(value)
    replicates = np.stack([weighted_metric(metric, row, label, counts) for row in scores])
    return weigh_replicates(value, replicates, weights)


def plain_metric(metric: str, score: np.ndarray, label: np.ndarray) -> float:
    """The metric when every image counts once."""
    return float(weighted_metric(metric, score, label, np.ones((label.size, 1)))[0])


def weigh_replicates(value: float, replicates: np.ndarray, weights: np.ndarray) -> Estimate:
    """As `bootstrap`, from the metric (K, R) of every detector in every replicate."""
    return _checked(value, Estimate(value, float(np.var(weights @ replicates, ddof=1))))


# --- over seeds --------------------------------------------------------------------------------------------------


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one number per seed, with the variance of that mean.

    None for a single seed, and none where the seeds change nothing: that says nothing of chance.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean)
    return _checked(mean, Estimate(mean, float(np.var(values, ddof=1)) / len(values), len(values) - 1))


def difference_over_seeds(candidate: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Difference of two means over different seeds (Welch 1947); no variance where a side has a single seed."""
    value = float(np.mean(candidate) - np.mean(baseline))
    if min(len(candidate), len(baseline)) < 2:
        return Estimate(value)
    parts = (mean_over_seeds(np.subtract(side, np.mean(side)).tolist()) for side in (candidate, baseline))
    return _checked(value, add_variances(value, parts))


# --- many comparisons ------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted p-values (Holm 1979): below alpha exactly where Holm's procedure rejects at alpha; None stays None.

    The chance of even one false finding among them is then at most alpha, whatever the dependence between them.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for step, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - step) * p))
        adjusted[place] = largest
    return adjusted
