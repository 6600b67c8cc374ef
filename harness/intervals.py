"""How sure a difference is: intervals over test images and over seeds, and p-values for many comparisons at once.

What is estimated is always a weighted sum of metrics, such as one AUROC minus another or a mean of such differences.

- **Over images**, for AUROC: DeLong, DeLong and Clarke-Pearson (Biometrics 1988), computed by ranks as Sun and Xu
  (IEEE Signal Processing Letters 2014) do, with the degrees of freedom that Brunner and Munzel (Biometrical Journal
  2000) give the same variance. Any weights, so the scores of many seeds and detectors on the same images count jointly.
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
from scipy.stats import rankdata
from scipy.stats import t as student_t

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
"""Metrics that image scores alone determine."""

_CHUNK = 250  # replicates at once: bounds memory at 250 * N counts per curve


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
        half = float(student_t.ppf((1 + confidence) / 2, self.dof)) * math.sqrt(self.variance)
        return self.value - half, self.value + half

    def p_value(self) -> float | None:
        """Two-sided p-value of "the true value is zero"; None without a variance."""
        if self.variance is None:
            return None
        if self.variance == 0:  # only ever beside a difference of nothing
            return 1.0
        return float(2 * student_t.sf(abs(self.value) / math.sqrt(self.variance), self.dof))


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
    ranks = rankdata(scores, axis=1)
    beats = (ranks[:, anomalous] - rankdata(positive, axis=1)) / negative.shape[1]
    beaten = 1 - (ranks[:, ~anomalous] - rankdata(negative, axis=1)) / positive.shape[1]
    return beats, beaten


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
    beats, beaten = placements(scores, label)
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


def weighted_metric(metric: str, scores: np.ndarray, label: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """A metric of image scores when every image counts several times or not at all.

    Args:
        metric: name in `IMAGE_METRICS`.
        scores: (N,) higher = more anomalous.
        label: (N,) 0 normal, 1 anomalous.
        counts: (R, N) how often each image counts; every row has images of both classes.

    Returns:
        (R,) values in [0, 1].
    """
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # of each group of equal scores
    sorted_counts, is_anomalous = counts[:, order], label[order] == 1
    hits = np.cumsum(sorted_counts * is_anomalous, axis=1)[:, last].astype(float)  # (R, thresholds)
    alarms = np.cumsum(sorted_counts * ~is_anomalous, axis=1)[:, last].astype(float)
    num_anomalous, num_normal = hits[:, -1], alarms[:, -1]
    if metric == "image_auroc":
        heights = (hits + np.pad(hits, ((0, 0), (1, 0)))[:, :-1]) / 2
        return (np.diff(alarms, axis=1, prepend=0) * heights).sum(axis=1) / (num_anomalous * num_normal)
    if metric == "image_ap":
        precision = hits / np.maximum(hits + alarms, 1)
        return (np.diff(hits, axis=1, prepend=0) * precision).sum(axis=1) / num_anomalous
    if metric == "image_f1_max":
        return (2 * hits / (hits + alarms + num_anomalous[:, None])).max(axis=1)
    raise ValueError(f"{metric!r} is no metric of image scores; known: {', '.join(IMAGE_METRICS)}")


def bootstrap(
    metric: str, scores: np.ndarray, label: np.ndarray, weights: np.ndarray, seed: int, num_replicates: int = 1000
) -> Estimate:
    """A weighted sum of a metric of K detectors on the same images, its variance by resampling the images.

    All detectors see the same resampled images, and each class keeps its size.

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
    ones = np.ones((1, label.size), dtype=np.int64)
    value = float(sum(w * weighted_metric(metric, row, label, ones)[0] for w, row in zip(weights, scores, strict=True)))
    classes = [np.flatnonzero(label == name) for name in (0, 1)]
    if min(len(members) for members in classes) < 2:
        return Estimate(value)
    generator = np.random.default_rng(seed)
    sums = np.zeros(num_replicates)
    for start in range(0, num_replicates, _CHUNK):
        rows = slice(start, min(start + _CHUNK, num_replicates))
        counts = np.zeros((rows.stop - rows.start, label.size), dtype=np.int64)
        for members in classes:
            shares = np.full(len(members), 1 / len(members))
            counts[:, members] = generator.multinomial(len(members), shares, size=len(counts))
        for weight, row in zip(weights, scores, strict=True):
            sums[rows] += weight * weighted_metric(metric, row, label, counts)
    return _checked(value, Estimate(value, float(np.var(sums, ddof=1))))


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
