"""AUROC, average precision, best F1 and AUPRO from counts per interval of scores, each with its largest possible error.

An interval is a range of scores with the number of normal and of defective pixels (or images) in it. What order these
have inside is unknown, unless the interval is a single score; the error is what any order inside could cause.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from harness.pixel_counts import Intervals

_BLOCK = 1 << 13  # intervals computed at once, so that their terms stay in the cache


class Result(NamedTuple):
    """A metric, the largest error it can have, and who has part in that."""

    value: float
    bound: float
    parts: tuple[tuple[np.ndarray, np.ndarray], ...]
    """Pairs of (K,) intervals and (K,) what each has part in the bound."""
    errors_add_up: bool = True


def rank_metrics(normal: np.ndarray, defect: np.ndarray, exact: np.ndarray) -> dict[str, Result]:
    """AUROC, AP and F1-max of counts per interval of scores.

    Args:
        normal: (I,) normal pixels or images, the lowest scores first.
        defect: (I,) defective ones.
        exact: (I,) whether the interval holds a single score.
    """
    num_normal, num_defect = float(normal.sum()), float(defect.sum())
    # Only intervals with defects add to a metric; what lies above them are the false and true positives.
    place = np.flatnonzero(defect > 0)
    counts = _sum_above(normal), _sum_above(defect), normal, defect
    auroc = ap = f1_max = 0.0
    auroc_error, ap_error, f1_error = np.empty((3, len(place)))
    for block in _blocks(len(place)):
        at = place[block]
        false, true, normals, defects = (count[at].astype(np.float64) for count in counts)
        unsure = ~exact[at]
        share = defects / num_defect
        auroc += float((share * (num_normal - false - normals / 2)).sum()) / num_normal
        auroc_error[block] = share * (normals / 2 / num_normal) * unsure

        found = true + defects
        after = found / (found + false + normals)
        half = true + (defects + 1) / 2
        middle = half / (half + false + normals / 2)
        # Precision is concave in the defects found, so its mean is at least that of the first and the last of them.
        least = ((true + 1) / (true + 1 + false + normals) + after) / 2
        ap += float((share * np.where(unsure, middle, after)).sum())
        ap_error[block] = share * np.maximum(found / (found + false) - middle, middle - least) * unsure

        f1 = 2 * found / (found + false + normals + num_defect)
        f1_max = max(f1_max, float(f1.max()))
        f1_error[block] = np.where(unsure, 2 * found / (found + false + num_defect), f1)
    f1_error -= f1_max
    np.maximum(f1_error, 0, out=f1_error)
    return {
        "auroc": Result(auroc, float(auroc_error.sum()), ((place, auroc_error),)),
        "ap": Result(ap, float(ap_error.sum()), ((place, ap_error),)),
        "f1_max": Result(f1_max, float(f1_error.max()), ((place, f1_error),), errors_add_up=False),
    }


def aupro(intervals: Intervals, exact: np.ndarray, num_regions: int, limit: float) -> Result:
    """Area under the mean region overlap up to a false-positive rate, over that rate.

    A defective pixel joins the curve between two thresholds, which are normal scores: the lowest one that is not below
    its own, and the next. The curve rises by its weight along the normal pixels that have the first of these scores.

    Args:
        intervals: counts of pixels.
        exact: (I,) whether the interval holds a single score.
        num_regions: regions in all masks together.
        limit: the false-positive rate, in (0, 1].
    """
    end = limit * float(intervals.normal.sum())
    false = _sum_above(intervals.normal)
    # For each interval the closest one above it that has normal pixels; the highest has none above.
    top = len(false) - 1
    above = np.where(intervals.normal > 0, np.arange(len(false)), top)[::-1]
    above = np.concatenate([np.minimum.accumulate(above)[-2::-1], [top]])
    last_above = intervals.last[above]
    last_above[top] = 0
    place = np.flatnonzero((intervals.defect > 0) & (false - last_above < end))

    def rise(start: np.ndarray, width: np.ndarray) -> np.ndarray:
        """Integral up to `end` of what rises from 0 at `start` to 1 after `width` false positives."""
        area = end - start - width / 2
        cut = np.flatnonzero(start + width > end)
        area[cut] = np.maximum(end - start[cut], 0) ** 2 / (2 * width[cut])
        return area

    value = 0.0
    error, error_above = np.empty((2, len(place)))
    blamed = np.empty_like(place)
    for block in _blocks(len(place)):
        at = place[block]
        normals, higher, step = (count[at].astype(np.float64) for count in (intervals.normal, false, last_above))
        mixed = normals > 0
        # Defective pixels of an interval may all lie above its normal ones: they rise along the last score above it.
        # Or all below: they rise along its own last score. How many normal pixels have that score is known only where
        # exact.
        is_known = exact[above[at]]
        known_step = np.where(is_known, step, np.minimum(step, 1))
        width = np.where(mixed, normals, known_step)
        start = np.where(mixed, higher, higher - known_step)
        middle = rise(start, width)
        at_once = np.maximum(end - higher, 0)
        lowest = rise(np.where(mixed, higher + normals - 1, start), np.where(mixed, 1, width))
        scale = intervals.weight[at] / (end * num_regions)
        value += float((middle * scale).sum())
        scale *= ~(mixed & exact[at])
        error[block] = np.where(mixed, np.maximum(middle - lowest, at_once - middle), middle - lowest) * scale
        error_above[block] = (rise(higher - step, step) - np.maximum(middle, at_once)) * scale
        # What may happen along the interval above is for that one to resolve, unless it is exact.
        blamed[block] = np.where(is_known, at, above[at])
    return Result(value, float(error.sum() + error_above.sum()), ((place, error), (blamed, error_above)))


def draw_pixel_curves(intervals: Intervals, num_points: int) -> dict[str, np.ndarray]:
    """Points of the ROC and of the PRO curve, from no pixel to all, where the curves are long.

    Args:
        intervals: counts of pixels.
        num_points: about how many points.

    Returns:
        `false_positive_rate`, `true_positive_rate`, `region_overlap`: (K,) rising from 0 to 1.
    """
    counts = (intervals.normal, intervals.defect, intervals.weight)
    sums = [np.concatenate([[0.0], np.cumsum(count[::-1], dtype=np.float64)]) for count in counts]
    false, true, overlap = (values / values[-1] for values in sums)
    # Where defects are found the false positives are few, so their rate counts by its root too.
    length = sum(np.abs(np.diff(values, prepend=0)).cumsum() for values in (false, np.sqrt(false), true, overlap))
    chosen = np.unique(np.searchsorted(length, np.linspace(0, length[-1], num_points)).clip(max=len(length) - 1))
    curves = {"false_positive_rate": false, "true_positive_rate": true, "region_overlap": overlap}
    return {name: values[chosen] for name, values in curves.items()}


def _sum_above(counts: np.ndarray) -> np.ndarray:
    """(I,) int64 sums of all that follows."""
    return int(counts.sum()) - np.cumsum(counts, dtype=np.int64)


def _blocks(length: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, length, _BLOCK))
