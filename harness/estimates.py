"""Estimates of differences between rows: which image scores belong together, and what their chance is.

A difference of means is a weighted sum over rows; rows on the same test images count jointly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from harness.bundle import ImageScores
from harness.contracts import ResultRow, derive_seed
from harness.intervals import (
    IMAGE_METRICS,
    Estimate,
    add_variances,
    bootstrap,
    delong,
    difference_over_seeds,
    mean_over_seeds,
    weighted_metric,
)
from harness.matching import Pair

LoadScores = Callable[[str], "ImageScores | None"]
"""Image scores of a cell by its id; None where they were not kept."""


class Scores:
    """Image scores of cells, each read once and checked to be those behind the row's number."""

    def __init__(self, load: LoadScores) -> None:
        self._load = load
        self._read: dict[str, ImageScores | None] = {}

    def of(self, row: ResultRow) -> ImageScores | None:
        if row.cell_id not in self._read:
            found = self._load(row.cell_id)
            if found is not None and not _belongs(found, row):
                found = None
            self._read[row.cell_id] = found
        return self._read[row.cell_id]


def _belongs(scores: ImageScores, row: ResultRow) -> bool:
    if len(np.unique(scores.label)) < 2:
        return False
    ones = np.ones((1, scores.label.size), dtype=np.int64)
    value = weighted_metric("image_auroc", scores.score, scores.label, ones)[0]
    return abs(value - row.metrics.get("image_auroc", np.nan)) < 1e-6


@dataclass(frozen=True)
class Estimator:
    """Variances of weighted sums of differences, of one metric."""

    metric: str
    interval: Literal["delong", "bootstrap"]
    scores: Scores

    def over_images(self, pairs: Sequence[Pair], weights: Sequence[float]) -> Estimate:
        """Test sets are independent of one another; all rows on one test set count jointly."""
        terms: dict[tuple[str, str], dict[str, tuple[float, ResultRow]]] = {}
        value = 0.0
        for pair, weight in zip(pairs, weights, strict=True):
            on_test = terms.setdefault((pair.place.dataset, pair.place.category), {})
            for sign, rows in ((1, pair.candidate_rows), (-1, pair.baseline_rows)):
                for row in rows:
                    share = sign * weight / len(rows)
                    known = on_test.get(row.cell_id, (0.0, row))[0]
                    on_test[row.cell_id] = (known + share, row)
                    value += share * row.metrics[self.metric]
        if self.metric not in IMAGE_METRICS:
            # A row compared with itself differs by nothing, whatever the metric.
            same = all(abs(weight) < 1e-12 for on_test in terms.values() for weight, _ in on_test.values())
            return Estimate(0.0, 0.0) if same else Estimate(value)
        parts = [self._on_one_test_set(key, list(on_test.values())) for key, on_test in terms.items()]
        if any(part is None or part.variance is None for part in parts):
            return Estimate(value)
        return add_variances(value, [part for part in parts if part is not None])

    def _on_one_test_set(self, key: tuple[str, str], terms: Sequence[tuple[float, ResultRow]]) -> Estimate | None:
        terms = [(weight, row) for weight, row in terms if abs(weight) > 1e-12]
        if not terms:
            return Estimate(0.0, 0.0)
        first = self.scores.of(terms[0][1])
        if first is None:
            return None
        aligned = []
        for _, row in terms:
            found = self.scores.of(row)
            same = None if found is None else found.reorder(first.images)
            if same is None or not np.array_equal(same.label, first.label):
                return None
            aligned.append(same.score)
        stacked, weights = np.stack(aligned), np.array([weight for weight, _ in terms])
        if self.metric == "image_auroc" and self.interval == "delong":
            return delong(stacked, first.label, weights)
        return bootstrap(self.metric, stacked, first.label, weights, derive_seed("bootstrap", *key))

    def over_seeds(self, pairs: Sequence[Pair], weights: Sequence[float]) -> Estimate:
        """Differences per seed where both sides have the same seeds, else the spread of each side."""
        sides = [
            [{row.seed: row.metrics[self.metric] for row in getattr(pair, side)} for pair in pairs]
            for side in ("candidate_rows", "baseline_rows")
        ]
        common = [sorted(set.intersection(*(set(each) for each in side))) for side in sides]
        if not all(common):
            return Estimate(0.0)
        means = [
            [sum(weight * each[seed] for weight, each in zip(weights, side, strict=True)) for seed in seeds]
            for side, seeds in zip(sides, common, strict=True)
        ]
        if all(set(ours) == set(theirs) for ours, theirs in zip(*sides, strict=True)):
            return mean_over_seeds([ours - theirs for ours, theirs in zip(*means, strict=True)])
        return difference_over_seeds(*means)
