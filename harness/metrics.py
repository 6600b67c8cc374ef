"""Image and pixel metrics: exact, or exact to a bound that is returned with the number.

Image metrics sort the few scores there are. Pixel metrics never hold the pixels. The bit patterns of float32 numbers,
read as integers, are ordered as the numbers are (once those of negative numbers are flipped), so a histogram over
their upper 20 bits needs no range, adds up over batches, workers and nodes, and orders all scores but those that
share a bin. From it each metric follows with the largest error that any order inside the bins could cause. A second
pass over the same maps splits only the bins that carry this error, by the lower 12 bits.

Ties count as in scikit-learn: AUROC joins them by a straight line, average precision and F1 take them at once.

AUPRO is the one of Bergmann et al., "The MVTec 3D-AD Dataset" (arXiv 2112.09045), with every threshold there is: each
8-connected region weighs the same, its overlap is the share of its pixels strictly above a threshold, the thresholds
are the scores of the normal pixels, the curve is straight between them and ends at (1, 1), it is cut by interpolation
at the false-positive limit, and the area is divided by that limit. Normal pixels that share one score are one step
along the false-positive rate, as in AUROC, so that a constant map gets half the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness.curves import Result, aupro, draw_pixel_curves, rank_metrics
from harness.pixel_counts import (
    LOW_BITS,
    NUM_BINS,
    Histogram,
    Intervals,
    MetricError,
    bin_of,
    check_finite,
    label_regions,
    read_pixels,
    score_of,
    to_numpy,
)
from harness.quantisation import Counts, MapError, aupro_range, rank_ranges

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "METRICS",
    "METRIC_VERSION",
    "TOLERANCE",
    "MetricError",
    "MetricInfo",
    "PixelMetrics",
    "Refinement",
    "image_metrics",
    "image_ranges",
    "label_regions",
]

METRIC_VERSION = 2
"""Raised when the numbers move: rows are then scored again from stored predictions."""

TOLERANCE = 1e-6
"""Largest error that `PixelMetrics.compute` leaves in a metric when it may replay the maps."""

_MAX_SLOTS = 1 << 22  # intervals that one replay may count: 64 MiB


@dataclass(frozen=True)
class MetricInfo:
    """What a metric is called and what it measures."""

    kind: Literal["image", "sample", "pixel"]
    """What is ranked: images, objects seen in several images, or pixels."""
    title: str
    definition: str


METRICS: dict[str, MetricInfo] = {
    "image_auroc": MetricInfo("image", "Image AUROC", "area under the ROC curve of the image scores"),
    "image_ap": MetricInfo("image", "Image AP", "average precision of the image scores (step sum)"),
    "image_f1_max": MetricInfo("image", "Image F1-max", "best F1 of the image scores over all thresholds"),
    "sample_auroc": MetricInfo(
        "sample",
        "Sample AUROC",
        "area under the ROC curve of the samples: objects scored by the highest of their views",
    ),
    "pixel_auroc": MetricInfo("pixel", "Pixel AUROC", "area under the ROC curve of all pixels of all images, pooled"),
    "pixel_ap": MetricInfo("pixel", "Pixel AP", "average precision of all pixels, pooled (step sum)"),
    "pixel_f1_max": MetricInfo("pixel", "Pixel F1-max", "best F1 of all pixels, pooled, over all thresholds"),
    "aupro": MetricInfo(
        "pixel", "AUPRO", "area under the per-region overlap up to a false-positive rate, over that rate"
    ),
}
"""All metrics in the order in which reports show them; rates in [0, 1], higher is better."""


def image_metrics(image_score: np.ndarray | Tensor, label: np.ndarray | Tensor) -> dict[str, float]:
    """AUROC, average precision and best F1 of image scores, exact.

    Args:
        image_score: (N,) higher = more anomalous.
        label: (N,) 0 normal, 1 anomalous.

    Returns:
        `image_auroc`, `image_ap` and `image_f1_max`, in [0, 1].

    Raises:
        MetricError: wrong shapes, labels other than 0 and 1, NaN or infinite scores, or only one class.
    """
    score, truth = to_numpy(image_score), to_numpy(label)
    if score.ndim != 1 or truth.shape != score.shape:
        raise MetricError(f"image_score and label must both be (N,), got {score.shape} and {truth.shape}")
    if not np.isin(truth, (0, 1)).all():
        raise MetricError(f"labels must be 0 (normal) or 1 (anomalous), got {np.unique(truth)[:5].tolist()}")
    check_finite(score, "image score")
    num_anomalous = int(np.count_nonzero(truth))
    _check_both_classes("image", "anomalous", len(truth) - num_anomalous, num_anomalous)
    distinct, place = np.unique(score, return_inverse=True)
    anomalous = np.bincount(place[truth != 0], minlength=len(distinct))
    normal = np.bincount(place) - anomalous
    results = rank_metrics(normal, anomalous, exact=np.ones(len(distinct), dtype=bool))
    return {f"image_{name}": result.value for name, result in results.items()}


def image_ranges(
    image_score: np.ndarray | Tensor, label: np.ndarray | Tensor, error: MapError
) -> dict[str, tuple[float, float]]:
    """The lowest and highest values that `image_metrics` could have given for scores within an error of these."""
    counts = Counts.of_scores(to_numpy(image_score), to_numpy(label))
    return {f"image_{name}": value for name, value in rank_ranges(counts, error).items()}


class PixelMetrics:
    """Pixel AUROC, AP, F1-max and AUPRO of any number of maps in constant memory (16 MiB; pickled, a small part of it).

    Counts are integers and the weights 1/area are float64, so neither the order and size of the batches nor the number
    of workers changes more than the last digits (1e-12). Workers count their own maps and `merge`. Where the maps are
    spread over workers too, `plan_refinement` on the merged object, `Refinement.update` on every worker's own maps,
    `Refinement.merge` and `refine` do together what `compute(replay)` does alone.
    """

    def __init__(self, aupro_limit: float = 0.3) -> None:
        """Args: aupro_limit, the false-positive rate up to which AUPRO integrates, in (0, 1]."""
        if not 0 < aupro_limit <= 1:
            raise MetricError(f"aupro_limit must be in (0, 1], got {aupro_limit}")
        self.aupro_limit = aupro_limit
        self._histogram = Histogram(NUM_BINS)
        self._refined: Intervals | None = None

    def update(
        self, anomaly_map: np.ndarray | Tensor, mask: np.ndarray | Tensor, regions: np.ndarray | Tensor | None = None
    ) -> None:
        """Counts the pixels of a batch. What was refined before is forgotten.

        Args:
            anomaly_map: (B, H, W) or (H, W), higher = more anomalous; read as float32, from any device in one copy.
            mask: same shape, non-zero is defect.
            regions: same shape, the labels of `label_regions` for each image; None labels the masks here.

        Raises:
            MetricError: shapes differ, a score is NaN or infinite, or regions and mask disagree.
        """
        self._histogram.add(read_pixels(anomaly_map, mask, regions), bin_of)
        self._refined = None

    def merge(self, other: PixelMetrics) -> PixelMetrics:
        """Adds the counts of another worker to these and returns self. Raises MetricError if the limits differ."""
        if other.aupro_limit != self.aupro_limit:
            raise MetricError(f"cannot merge AUPRO limits {self.aupro_limit} and {other.aupro_limit}")
        self._histogram.merge(other._histogram)
        self._refined = None
        return self

    def compute(self, replay: Callable[[], Iterable[tuple[Any, ...]]] | None = None) -> dict[str, float]:
        """The four metrics, each with the largest error that it can have.

        Args:
            replay: yields the arguments that `update` was given, in any order. It is called until every bound is at
                most `TOLERANCE`: not at all where one pass was enough, otherwise as a rule once.

        Returns:
            `pixel_auroc`, `pixel_ap`, `pixel_f1_max`, `aupro` in [0, 1], and for each `<name>_bound`: the true value
            is no further than this from the number, rounding of float64 (1e-12) aside.

        Raises:
            MetricError: there is no defective or no normal pixel, or the replayed pixels are not those counted before.
        """
        results = self._results()
        while replay is not None and (refinement := self._plan(results)) is not None:
            for batch in replay():
                refinement.update(*batch)
            self.refine(refinement)
            results = self._results()
        bounds = {f"{name}_bound": result.bound for name, result in results.items()}
        return {name: result.value for name, result in results.items()} | bounds

    def ranges(self, error: MapError) -> dict[str, tuple[float, float]]:
        """The lowest and highest values that the four metrics could have had for maps within an error of these.

        What is counted together may have any order. Closest to the numbers after `compute`.
        """
        intervals = self._intervals()
        counts = Counts(
            low=score_of(intervals.low),
            high=score_of(intervals.high),
            normal=intervals.normal.astype(np.int64),
            defect=intervals.defect,
        )
        ranked = {f"pixel_{name}": value for name, value in rank_ranges(counts, error).items()}
        area = aupro_range(counts, intervals.weight, self._histogram.num_regions, self.aupro_limit, error)
        return {**ranked, "aupro": area}

    def draw_curves(self, num_points: int = 80) -> dict[str, np.ndarray]:
        """Points of the ROC and of the PRO curve; see `harness.curves.draw_pixel_curves`."""
        return draw_pixel_curves(self._intervals(), num_points)

    def plan_refinement(self) -> Refinement | None:
        """The second pass that is needed, with nothing counted yet; None when every bound is at most `TOLERANCE`."""
        return self._plan(self._results())

    def refine(self, refinement: Refinement) -> None:
        """Replaces the bins of a counted second pass. Raises MetricError if it has seen other pixels than the first."""
        if not refinement._agrees_with(self._histogram):
            raise MetricError(
                "the replayed maps or masks are not those counted before: replay must give the same pixels"
            )
        self._refined = self._intervals().replace(refinement._intervals())

    def _intervals(self) -> Intervals:
        if self._refined is not None:
            return self._refined
        occupied = np.flatnonzero(self._histogram.pixels != 0)
        shift = np.full(len(occupied), LOW_BITS, dtype=np.int32)
        bins = occupied.astype(np.int32)
        return Intervals.count(self._histogram, occupied, np.arange(len(occupied)), bins, shift, first_slot=occupied)

    def _results(self) -> dict[str, Result]:
        """The metrics and, per interval, what its unknown inner order may change."""
        intervals, num_regions = self._intervals(), self._histogram.num_regions
        num_defect = int(intervals.defect.sum())
        _check_both_classes("pixel", "defective", int(intervals.normal.sum()), num_defect)
        exact = intervals.shift <= self._histogram.num_unused_bits()
        ranked = rank_metrics(intervals.normal, intervals.defect, exact)
        area = aupro(intervals, exact, num_regions, self.aupro_limit)
        return {f"pixel_{name}": result for name, result in ranked.items()} | {"aupro": area}

    def _plan(self, results: dict[str, Result]) -> Refinement | None:
        """Splits as few bins as finely as it takes to bring each bound below the tolerance.

        Scores are taken to be spread evenly inside a bin, so that r times as many slots leave 1/r of its error. The
        fewest slots in all are then had with r in proportion to the root of (error / slots), by Lagrange's rule.
        """
        if all(result.bound <= TOLERANCE for result in results.values()):
            return None
        intervals = self._intervals()
        is_start = np.diff(intervals.bin, prepend=-1) != 0
        starts, bin_place = np.flatnonzero(is_start), np.cumsum(is_start) - 1
        slots = 2.0 ** (LOW_BITS - intervals.shift[starts])
        wanted, weight = np.zeros(len(starts)), np.zeros(len(starts))
        for result in results.values():
            if result.bound <= TOLERANCE:
                continue
            error = np.zeros(len(starts))
            combine = np.add if result.errors_add_up else np.maximum
            for place, part in result.parts:
                combine.at(error, bin_place[place], part)
            if result.errors_add_up:
                factor = np.sqrt(error / slots) * np.sqrt(error * slots).sum() / (0.9 * TOLERANCE)
            else:
                # The best F1 hangs on single pixels, and on those of few bins.
                factor = np.where(error > TOLERANCE, 1 << LOW_BITS, 0)
            # A bin that is split again was not spread evenly; at least four-fold, it is soon resolved.
            wanted = np.maximum(wanted, np.where(factor > 1, slots * np.maximum(factor, np.where(slots > 1, 4, 1)), 0))
            weight = np.maximum(weight, error / result.bound)
        chosen = np.flatnonzero(wanted > 0)
        split_bits = np.maximum(np.rint(np.log2(wanted[chosen])), 1).astype(np.int32)
        split_bits = np.minimum(split_bits, LOW_BITS - self._histogram.num_unused_bits())
        heaviest_first = np.argsort(-weight[chosen], kind="stable")
        fits = heaviest_first[np.cumsum(1 << split_bits[heaviest_first]) <= _MAX_SLOTS]
        return Refinement(intervals.bin[starts[chosen[fits]]], LOW_BITS - split_bits[fits])


class Refinement:
    """A second pass: counts the scores of some bins by their lower bits. Made by `PixelMetrics.plan_refinement`."""

    def __init__(self, bins: np.ndarray, shift: np.ndarray) -> None:
        """Args: bins (S,) distinct; shift (S,), how many low bits of a score each leaves unresolved."""
        order = np.argsort(bins)
        self._bins, self._shift = bins[order], shift[order]
        sizes = 1 << (LOW_BITS - self._shift)
        num_slots = int(sizes.sum())
        self._first_slot = np.cumsum(sizes) - sizes
        self._histogram = Histogram(num_slots + 1)
        # One more slot, the last, takes the pixels of all other bins. The table has an entry for every bin from one
        # before the first to one after the last of those to be split, and these two stand for all bins beyond as well:
        # the bin's first slot, and in the lowest four bits its shift.
        self._table_start = self._bins[0] - 1 - NUM_BINS // 2
        self._table = np.full(self._bins[-1] - self._bins[0] + 3, num_slots << 4 | LOW_BITS, dtype=np.int32)
        self._table[self._bins - self._bins[0] + 1] = self._first_slot << 4 | self._shift

    def __getstate__(self) -> tuple[np.ndarray, np.ndarray, Histogram]:
        return self._bins, self._shift, self._histogram

    def __setstate__(self, state: tuple[np.ndarray, np.ndarray, Histogram]) -> None:
        self.__init__(*state[:2])  # type: ignore[misc]
        self._histogram = state[2]

    def update(
        self, anomaly_map: np.ndarray | Tensor, mask: np.ndarray | Tensor, regions: np.ndarray | Tensor | None = None
    ) -> None:
        """Counts a batch again; arguments and errors as in `PixelMetrics.update`."""
        self._histogram.add(read_pixels(anomaly_map, mask, regions), self._slot_of)

    def merge(self, other: Refinement) -> Refinement:
        """Adds the counts of another worker to these and returns self. Raises MetricError if the plans differ."""
        if not (np.array_equal(self._bins, other._bins) and np.array_equal(self._shift, other._shift)):
            raise MetricError("cannot merge two refinements that come from different plans")
        self._histogram.merge(other._histogram)
        return self

    def _slot_of(self, keys: np.ndarray) -> np.ndarray:
        entries = self._table.take((keys >> LOW_BITS) - self._table_start, mode="clip")
        slots = keys & ((1 << LOW_BITS) - 1)
        slots >>= entries & 15
        slots += entries >> 4
        return slots

    def _agrees_with(self, first: Histogram) -> bool:
        """Whether the pixels are those of a first pass, as far as both can tell."""
        second = self._histogram
        return (
            np.array_equal(np.add.reduceat(second.pixels[:-1], self._first_slot), first.pixels[self._bins])
            and np.array_equal(np.add.reduceat(second.defects[:-1], self._first_slot), first.defects[self._bins])
            and (second.num_pixels, second.num_regions) == (first.num_pixels, first.num_regions)
        )

    def _intervals(self) -> Intervals:
        occupied = np.flatnonzero(self._histogram.pixels[:-1] != 0)
        first = np.searchsorted(occupied, self._first_slot)
        return Intervals.count(self._histogram, occupied, first, self._bins, self._shift, self._first_slot)


def _check_both_classes(what: str, defect_word: str, num_normal: int, num_defect: int) -> None:
    missing = [word for word, count in (("normal", num_normal), (defect_word, num_defect)) if count == 0]
    if missing:
        raise MetricError(
            f"{what} metrics need both classes, but there is no {' and no '.join(missing)} {what}: "
            f"{num_normal} normal, {num_defect} {defect_word}"
        )
