"""Average ranks over test sets and which of them differ, after Demšar (JMLR 7, 2006).

Each category of a dataset ranks the contestants; Friedman's test asks whether they differ at all, and two of them
differ where their average ranks are further apart than Nemenyi's critical difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import friedmanchisquare, rankdata, studentized_range, wilcoxon


@dataclass(frozen=True, kw_only=True)
class AverageRanks:
    """Contestants ordered by their average rank."""

    names: tuple[str, ...]
    """Best first."""
    ranks: tuple[float, ...]
    """Average rank of each, 1 = best."""
    num_tests: int
    """Categories that ranked them."""
    critical_difference: float
    p_value: float
    """Of "all are alike": Friedman's test, for two contestants Wilcoxon's signed-rank test."""
    confidence: float

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Longest runs of contestants that do not differ: (first, last) places in `names`, none within another."""
        found: list[tuple[int, int]] = []
        for first, rank in enumerate(self.ranks):
            last = max(place for place, other in enumerate(self.ranks) if other - rank < self.critical_difference)
            if last > first and (not found or last > found[-1][1]):
                found.append((first, last))
        return found


def average_ranks(names: Sequence[str], values: np.ndarray, confidence: float = 0.95) -> AverageRanks:
    """Ranks contestants on every test set and averages.

    Args:
        names: of the k contestants, at least two.
        values: (N, k) one row per test set, at least two; higher = better. Equal values share their mean rank.
        confidence: of the critical difference.
    """
    values = np.round(values, 12)  # means of equal numbers may differ in the last bits
    num_tests, num_names = values.shape
    means = rankdata(-values, axis=1).mean(axis=0)
    order = sorted(range(num_names), key=lambda place: (means[place], place))
    return AverageRanks(
        names=tuple(names[place] for place in order),
        ranks=tuple(float(means[place]) for place in order),
        num_tests=num_tests,
        critical_difference=critical_difference(num_names, num_tests, confidence),
        p_value=_p_value(values),
        confidence=confidence,
    )


def critical_difference(num_names: int, num_tests: int, confidence: float = 0.95) -> float:
    """Nemenyi's critical difference of average ranks (Demšar 2006, section 3.2.2)."""
    quantile = float(studentized_range.ppf(confidence, num_names, np.inf)) / math.sqrt(2)
    return quantile * math.sqrt(num_names * (num_names + 1) / (6 * num_tests))


def _p_value(values: np.ndarray) -> float:
    if np.all(values == values[:, :1]):
        return 1.0
    if values.shape[1] == 2:
        return float(wilcoxon(values[:, 0], values[:, 1], method="asymptotic" if len(values) > 50 else "auto").pvalue)
    return float(friedmanchisquare(*values.T).pvalue)
