"""Anomaly maps in three bytes a value, and what that may do to a metric.

A cell's maps are shifted and scaled together to [0, 32768] in float16, so that a value keeps 11
significant bits above the smallest one, over nine decades. A further byte holds what this rounds away, which leaves
one part in 500,000. Everything that is evaluated is evaluated from these maps, so a number does not depend on whether
it was made at once or from stored maps later.

The largest error of a metric follows from the order in which any maps as close as the rounding allows could put the
pixels. Upsampling and smoothing take weighted means, so what holds for a small map holds for a large one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

_LARGEST = 2.0**15
_PARTS = 254
"""Into which the remainder byte divides the distance between two numbers of float16."""
_FLOAT32 = 2.0**-24
_ROUNDING = 2.0**-10 / (2 * _PARTS) * (1 + 2.0**-9) + 4 * _FLOAT32
"""Relative to the kept value: of the remainder, and of float32 here, at full resolution and in the predicted maps."""


@dataclass(frozen=True)
class MapError:
    """How far a value may lie from the predicted one: by at most `relative * (value - offset) + absolute`."""

    offset: float = 0.0
    relative: float = 0.0
    absolute: float = 0.0

    def followed_by(self, other: MapError) -> MapError:
        """Of values that were changed once more; the offset of this lies at or below that of the other."""
        factor = 1 + self.relative
        return MapError(self.offset, self.relative + factor * other.relative, self.absolute + factor * other.absolute)

    def highest_below(self, low: np.ndarray) -> np.ndarray:
        """A pixel below this lies surely below one that is at least `low`."""
        return self.offset + ((low - self.offset) * (1 - self.relative) - 2 * self.absolute) / (1 + self.relative)

    def lowest_above(self, high: np.ndarray) -> np.ndarray:
        """A pixel above this lies surely above one that is at most `high`."""
        return self.offset + ((high - self.offset) * (1 + self.relative) + 2 * self.absolute) / (1 - self.relative)


@dataclass(frozen=True, eq=False)
class QuantisedMaps:
    """The anomaly maps of a cell: `offset + step * scaled`."""

    values: np.ndarray
    """(N, h, w) float16, >= 0."""
    remainder: np.ndarray
    """(N, h, w) int8, in parts of the spacing of float16 numbers at `values`."""
    offset: float
    step: float
    scaled_error: MapError
    """Of the scaled maps at any resolution."""

    @cached_property
    def scaled(self) -> np.ndarray:
        """(N, h, w) float32 in [0, 32768], ordered as the maps are; what pixels are ranked by."""
        result = np.empty(self.values.shape, np.float32)
        with np.errstate(invalid="ignore"):
            for place, (values, remainder) in enumerate(zip(self.values, self.remainder, strict=True)):
                result[place] = values + np.spacing(values).astype(np.float32) * (remainder / np.float32(_PARTS))
        return result

    @cached_property
    def restored(self) -> np.ndarray:
        """(N, h, w) float32 in the units of the method, higher = more anomalous."""
        result = np.empty(self.values.shape, np.float32)
        for place, scaled in enumerate(self.scaled):
            result[place] = scaled.astype(np.float64) * self.step + self.offset
        return result

    @property
    def error(self) -> MapError:
        """Of the restored maps at any resolution."""
        if self.scaled_error == MapError():
            return MapError(self.offset)
        error, largest = self.scaled_error, max(abs(self.offset), abs(self.offset + self.step * _LARGEST))
        absolute = self.step * error.absolute + 4 * _FLOAT32 * largest
        return MapError(self.offset + self.step * error.offset, error.relative, absolute)

    @property
    def nbytes(self) -> int:
        """Bytes of all maps."""
        return self.values.nbytes + self.remainder.nbytes


def quantise(maps: np.ndarray, earlier: MapError | None = None) -> QuantisedMaps:
    """Rounds the maps of a cell.

    Args:
        maps: (N, h, w) float32.
        earlier: an error that they have already; its offset lies at or below all of them.
    """
    low, high = (float(maps.min()), float(maps.max())) if maps.size else (0.0, 0.0)
    step = (high - low) / _LARGEST or 1.0 if np.isfinite(high - low) else np.nan
    values, remainder = np.empty(maps.shape, np.float16), np.empty(maps.shape, np.int8)
    with np.errstate(invalid="ignore"):  # a map that is not finite makes all of them NaN, which evaluation refuses
        for place, one in enumerate(maps):
            scaled = (one.astype(np.float64) - low) / step
            values[place] = scaled
            remainder[place] = np.rint((scaled - values[place]) / np.spacing(values[place]) * _PARTS)
    error = MapError(0.0, _ROUNDING, 2.0**-24 / _PARTS) if high > low else MapError()
    if earlier is not None:
        known = MapError((earlier.offset - low) / step, earlier.relative, earlier.absolute / step)
        error = known.followed_by(error)
    return QuantisedMaps(values, remainder, low, step, error)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Pixels or images in I disjoint ranges of scores, the lowest first."""

    low: np.ndarray
    """(I,) float64, the lowest score that a range may hold."""
    high: np.ndarray
    normal: np.ndarray
    """(I,) how many normal ones it holds."""
    defect: np.ndarray

    @classmethod
    def of_scores(cls, score: np.ndarray, label: np.ndarray) -> Counts:
        """Each distinct score (N,) is a range; label (N,) 1 = anomalous."""
        distinct, place = np.unique(score.astype(np.float64), return_inverse=True)
        defect = np.bincount(place[label == 1], minlength=len(distinct))
        return cls(low=distinct, high=distinct, normal=np.bincount(place) - defect, defect=defect)


def rank_ranges(counts: Counts, error: MapError) -> dict[str, tuple[float, float]]:
    """The lowest and highest AUROC, AP and F1-max that scores within the error could have."""
    at = np.flatnonzero(counts.defect > 0)
    defect, num_defect = counts.defect[at].astype(np.float64), float(counts.defect.sum())
    num_normal = float(counts.normal.sum())
    most_false, least_false, most_true = _around(counts, error, at)
    found = _at_least(counts.defect)[at].astype(np.float64)  # surely above the lowest place of this range
    share = defect / num_defect

    auroc = (share * (num_normal - most_false)).sum() / num_normal, (share * (num_normal - least_false)).sum()
    # The k-th highest anomalous score is at least the k-th highest of the lowest ones; precision is concave in k.
    first = found - defect + 1
    lowest = (first / (first + most_false) + found / (found + most_false)) / 2
    highest = most_true / (most_true + least_false)
    f1 = 2 * found / (found + most_false + num_defect), 2 * most_true / (most_true + least_false + num_defect)
    return {
        "auroc": (float(auroc[0]), float(auroc[1]) / num_normal),
        "ap": (float((share * lowest).sum()), min(float((share * highest).sum()), 1.0)),
        "f1_max": (float(f1[0].max()), min(float(f1[1].max()), 1.0)),
    }


def aupro_range(
    counts: Counts, weight: np.ndarray, num_regions: int, limit: float, error: MapError
) -> tuple[float, float]:
    """The lowest and highest AUPRO that pixels within the error could have.

    A defective pixel joins the curve at the latest when all normal pixels have that could lie above it. It may begin to
    rise at the lowest normal score above it, and those that could share this score are not counted before.

    Args:
        counts: of pixels.
        weight: (I,) sum of 1 / area over the defective pixels of each range.
        num_regions: regions in all masks together.
        limit: the false-positive rate up to which to integrate.
        error: of the scores.
    """
    end = limit * float(counts.normal.sum())
    at = np.flatnonzero(counts.defect > 0)
    most_false, _, _ = _around(counts, error, at)
    with_normal = np.flatnonzero(counts.normal > 0)
    surely_above = np.searchsorted(counts.low[with_normal], error.lowest_above(counts.high[at]), side="right")
    shared = with_normal[np.minimum(surely_above, len(with_normal) - 1)]
    beyond = error.lowest_above(error.lowest_above(counts.high[shared]))
    start = _total(_at_least(counts.normal), np.searchsorted(counts.low, beyond, side="right"))
    start[surely_above == len(with_normal)] = 0
    scale = weight[at] / (end * num_regions)
    lowest = float((np.maximum(end - most_false, 0) * scale).sum())
    return lowest, min(float((np.maximum(end - start, 0) * scale).sum()), 1.0)


def _around(counts: Counts, error: MapError, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For the anomalous of some ranges: the most and the fewest normal ones at or above, the most anomalous ones."""
    maybe = np.searchsorted(counts.high, error.highest_below(counts.low[at]), side="left")
    surely = np.searchsorted(counts.low, error.lowest_above(counts.high[at]), side="right")
    normal, defect = _at_least(counts.normal), _at_least(counts.defect)
    return _total(normal, maybe), _total(normal, surely), _total(defect, maybe)


def _at_least(counts: np.ndarray) -> np.ndarray:
    """(I,) sums of a range and all above."""
    return np.cumsum(counts[::-1], dtype=np.int64)[::-1]


def _total(sums: np.ndarray, place: np.ndarray) -> np.ndarray:
    return np.append(sums, 0)[place].astype(np.float64)
