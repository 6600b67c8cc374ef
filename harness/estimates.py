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
    difference_over_seeds,
    mean_over_seeds,
    placements,
    plain_metric,
    resample,
    weigh_placements,
    weigh_replicates,
    weighted_metric,
)
from harness.matching import Pair

LoadScores = Callable[[str], "ImageScores | None"]
"""Image scores of a cell by its id; None where they were not kept."""


class Scores:
    """Image scores of cells, each read once, with their images in one order and what is made of them kept."""

    def __init__(self, load: LoadScores) -> None:
        self._load = load
        self._read: dict[str, ImageScores | None] = {}
        self._placed: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._counts: dict[tuple[str, str, bytes], np.ndarray | None] = {}
        self._replicates: dict[tuple[str, str], np.ndarray] = {}

    def of(self, row: ResultRow) -> ImageScores | None:
        """The scores of a cell, sorted by image; None where there are none, or they are not those behind its number."""
        if row.cell_id not in self._read:
            found = self._load(row.cell_id)
            if found is not None:
                found = found.reorder(sorted(found.images))
            self._read[row.cell_id] = found if found is not None and _belongs(found, row) else None
        return self._read[row.cell_id]

    def placements(self, cell_id: str) -> tuple[np.ndarray, np.ndarray]:
        """(m,) and (n,) placements of a cell that `of` has given."""
        if cell_id not in self._placed:
            found = self._read[cell_id]
            assert found is not None
            beats, beaten = placements(found.score[None], found.label)
            self._placed[cell_id] = beats[0], beaten[0]
        return self._placed[cell_id]

    def replicates(self, metric: str, cell_id: str, test_set: tuple[str, str]) -> np.ndarray | None:
        """(R,) metric of such a cell in the replicates of its test set; None where there are too few images."""
        found = self._read[cell_id]
        assert found is not None
        key = (*test_set, found.label.tobytes())
        if key not in self._counts:
            self._counts[key] = resample(found.label, derive_seed("bootstrap", *test_set))
        counts = self._counts[key]
        if counts is None:
            return None
        if (metric, cell_id) not in self._replicates:
            self._replicates[metric, cell_id] = weighted_metric(metric, found.score, found.label, counts)
        return self._replicates[metric, cell_id]


def _belongs(scores: ImageScores, row: ResultRow) -> bool:
    if len(np.unique(scores.label)) < 2:
        return False
    value = plain_metric("image_auroc", scores.score, scores.label)
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

    def _on_one_test_set(self, test_set: tuple[str, str], terms: Sequence[tuple[float, ResultRow]]) -> Estimate | None:
        terms = [(weight, row) for weight, row in terms if abs(weight) > 1e-12]
        if not terms:
            return Estimate(0.0, 0.0)
        found = [self.scores.of(row) for _, row in terms]
        first = found[0]
        for each in found:
            if first is None or each is None or each.images != first.images:
                return None
            if not np.array_equal(each.label, first.label):
                return None
        weights = np.array([weight for weight, _ in terms])
        cells = [row.cell_id for _, row in terms]
        if self.metric == "image_auroc" and self.interval == "delong":
            placed = [self.scores.placements(cell_id) for cell_id in cells]
            return weigh_placements(
                np.stack([beats for beats, _ in placed]), np.stack([last for _, last in placed]), weights
            )
        replicates = [self.scores.replicates(self.metric, cell_id, test_set) for cell_id in cells]
        if any(each is None for each in replicates):
            return None
        value = sum(weight * row.metrics[self.metric] for weight, row in terms)
        return weigh_replicates(value, np.stack([each for each in replicates if each is not None]), weights)

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
