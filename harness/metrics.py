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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from torch import Tensor

METRIC_VERSION = 1
"""Raised when the numbers move: rows are then scored again from stored predictions."""

TOLERANCE = 1e-6
"""Largest error that `PixelMetrics.compute` leaves in a metric when it may replay the maps."""

_LOW_BITS = 12
_NUM_BINS = 1 << (32 - _LOW_BITS)
_MAX_SLOTS = 1 << 22  # intervals that one replay may count: 64 MiB
_CHUNK = 1 << 15  # pixels counted at once, so that what is computed from them stays in the cache
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
_INFINITY = 0x7F80_0000  # bit pattern of +inf; those above it are NaN


class MetricError(ValueError):
    """Scores or ground truth that no metric can be computed from."""


@dataclass(frozen=True)
class MetricInfo:
    """What a metric is called and what it measures."""

    kind: Literal["image", "pixel"]
    title: str
    definition: str


METRICS: dict[str, MetricInfo] = {
    "image_auroc": MetricInfo("image", "Image AUROC", "area under the ROC curve of the image scores"),
    "image_ap": MetricInfo("image", "Image AP", "average precision of the image scores (step sum)"),
    "image_f1_max": MetricInfo("image", "Image F1-max", "best F1 of the image scores over all thresholds"),
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
    score, truth = _to_numpy(image_score), _to_numpy(label)
    if score.ndim != 1 or truth.shape != score.shape:
        raise MetricError(f"image_score and label must both be (N,), got {score.shape} and {truth.shape}")
    if not np.isin(truth, (0, 1)).all():
        raise MetricError(f"labels must be 0 (normal) or 1 (anomalous), got {np.unique(truth)[:5].tolist()}")
    _check_finite(score, "image score")
    num_anomalous = int(np.count_nonzero(truth))
    _check_both_classes("image", "anomalous", len(truth) - num_anomalous, num_anomalous)
    distinct, place = np.unique(score, return_inverse=True)
    anomalous = np.bincount(place[truth != 0], minlength=len(distinct))[::-1]
    normal = np.bincount(place)[::-1] - anomalous
    results = _rank_metrics(normal, anomalous, exact=np.ones(len(distinct), dtype=bool))
    return {f"image_{name}": result.value for name, result in results.items()}


def label_regions(mask: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the 8-connected defect regions of a mask.

    Args:
        mask: (H, W), non-zero is defect.

    Returns:
        (H, W) int32 labels, 0 outside and 1..R inside, and (R,) int64 areas in pixels.
    """
    defect = _to_numpy(mask) != 0
    labels = np.zeros(defect.shape, dtype=np.int32)
    box = _bounding_box(defect)
    ndimage.label(defect[box], structure=_EIGHT_NEIGHBOURS, output=labels[box])
    return labels, np.bincount(labels[box].ravel(), minlength=1)[1:]


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
        self._histogram = _Histogram(_NUM_BINS)
        self._refined: _Intervals | None = None

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
        self._histogram.add(_read_pixels(anomaly_map, mask, regions), _bin_of)
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

    def _intervals(self) -> _Intervals:
        if self._refined is not None:
            return self._refined
        occupied = np.flatnonzero(self._histogram.pixels != 0)[::-1]
        shift = np.full(len(occupied), _LOW_BITS, dtype=np.int32)
        return _Intervals.count(self._histogram, occupied, occupied.astype(np.int32), shift)

    def _results(self) -> dict[str, _Result]:
        """The metrics and, per interval, what its unknown inner order may change."""
        intervals, num_regions = self._intervals(), self._histogram.num_regions
        num_defect = int(intervals.defect.sum())
        _check_both_classes("pixel", "defective", int(intervals.normal.sum()), num_defect)
        exact = intervals.shift <= self._histogram.num_unused_bits()
        ranked = _rank_metrics(intervals.normal, intervals.defect, exact)
        aupro = _aupro(intervals, exact, num_regions, self.aupro_limit)
        return {f"pixel_{name}": result for name, result in ranked.items()} | {"aupro": aupro}

    def _plan(self, results: dict[str, _Result]) -> Refinement | None:
        """Splits as few bins as finely as it takes to bring each bound below the tolerance.

        Scores are taken to be spread evenly inside a bin, so that r times as many slots leave 1/r of its error. The
        fewest slots in all are then had with r in proportion to the root of (error / slots), by Lagrange's rule.
        """
        if all(result.bound <= TOLERANCE for result in results.values()):
            return None
        intervals = self._intervals()
        starts = np.flatnonzero(np.diff(intervals.bin, prepend=-1))
        slots = 2.0 ** (_LOW_BITS - intervals.shift[starts])
        wanted, weight = np.zeros(len(starts)), np.zeros(len(starts))
        for result in results.values():
            if result.bound <= TOLERANCE:
                continue
            if result.errors_add_up:
                error = np.add.reduceat(result.error, starts)
                factor = np.sqrt(error / slots) * np.sqrt(error * slots).sum() / (0.8 * TOLERANCE)
            else:
                # The best F1 hangs on single pixels, and on those of few bins.
                error = np.maximum.reduceat(result.error, starts)
                factor = np.where(error > TOLERANCE, 1 << _LOW_BITS, 0)
            # A bin that is split again was not spread evenly; at least four-fold, it is soon resolved.
            wanted = np.maximum(wanted, np.where(factor > 1, slots * np.maximum(factor, np.where(slots > 1, 4, 1)), 0))
            weight = np.maximum(weight, error / result.bound)
        chosen = np.flatnonzero(wanted > 0)
        split_bits = np.maximum(np.rint(np.log2(wanted[chosen])), 1).astype(np.int32)
        split_bits = np.minimum(split_bits, _LOW_BITS - self._histogram.num_unused_bits())
        heaviest_first = np.argsort(-weight[chosen], kind="stable")
        fits = heaviest_first[np.cumsum(1 << split_bits[heaviest_first]) <= _MAX_SLOTS]
        return Refinement(intervals.bin[starts[chosen[fits]]], _LOW_BITS - split_bits[fits])


class Refinement:
    """A second pass: counts the scores of some bins by their lower bits. Made by `PixelMetrics.plan_refinement`."""

    def __init__(self, bins: np.ndarray, shift: np.ndarray) -> None:
        """Args: bins (S,) distinct; shift (S,), how many low bits of a score each leaves unresolved."""
        order = np.argsort(bins)
        self._bins, self._shift = bins[order], shift[order]
        self._num_slots = 1 << (_LOW_BITS - self._shift)
        num_slots = int(self._num_slots.sum())
        self._first_slot = np.cumsum(self._num_slots) - self._num_slots
        # One more slot, the last, takes the pixels of all other bins. The tables begin one bin before the first and
        # end one after the last of those to be split, and stand for all bins beyond as well.
        self._histogram = _Histogram(num_slots + 1)
        place = self._bins - self._bins[0] + 1
        self._table_start = self._bins[0] - 1 - _NUM_BINS // 2
        self._shift_table = np.full(place[-1] + 2, _LOW_BITS, dtype=np.int32)
        self._shift_table[place] = self._shift
        self._slot_table = np.full(place[-1] + 2, num_slots, dtype=np.int32)
        self._slot_table[place] = self._first_slot

    def __getstate__(self) -> tuple[np.ndarray, np.ndarray, _Histogram]:
        return self._bins, self._shift, self._histogram

    def __setstate__(self, state: tuple[np.ndarray, np.ndarray, _Histogram]) -> None:
        self.__init__(*state[:2])  # type: ignore[misc]
        self._histogram = state[2]

    def update(
        self, anomaly_map: np.ndarray | Tensor, mask: np.ndarray | Tensor, regions: np.ndarray | Tensor | None = None
    ) -> None:
        """Counts a batch again; arguments and errors as in `PixelMetrics.update`."""
        self._histogram.add(_read_pixels(anomaly_map, mask, regions), self._slot_of)

    def merge(self, other: Refinement) -> Refinement:
        """Adds the counts of another worker to these and returns self. Raises MetricError if the plans differ."""
        if not (np.array_equal(self._bins, other._bins) and np.array_equal(self._shift, other._shift)):
            raise MetricError("cannot merge two refinements that come from different plans")
        self._histogram.merge(other._histogram)
        return self

    def _slot_of(self, keys: np.ndarray) -> np.ndarray:
        place = (keys >> _LOW_BITS) - self._table_start
        slots = keys & ((1 << _LOW_BITS) - 1)
        slots >>= self._shift_table.take(place, mode="clip")
        slots += self._slot_table.take(place, mode="clip")
        return slots

    def _agrees_with(self, first: _Histogram) -> bool:
        """Whether the pixels are those of a first pass, as far as both can tell."""
        second = self._histogram
        return (
            np.array_equal(np.add.reduceat(second.pixels[:-1], self._first_slot), first.pixels[self._bins])
            and np.array_equal(np.add.reduceat(second.defects[:-1], self._first_slot), first.defects[self._bins])
            and (second.num_pixels, second.num_regions) == (first.num_pixels, first.num_regions)
        )

    def _intervals(self) -> _Intervals:
        occupied = np.flatnonzero(self._histogram.pixels[:-1] != 0)[::-1]
        place = np.repeat(np.arange(len(self._bins), dtype=np.int32), self._num_slots)[occupied]
        return _Intervals.count(self._histogram, occupied, self._bins[place], self._shift[place])


class _Pixels(NamedTuple):
    """A batch as it is counted."""

    keys: np.ndarray
    """(B * H * W,) int32, ordered as the scores are; equal where these are equal."""
    defect_at: np.ndarray
    """(K,) positions of the defective pixels."""
    weights: np.ndarray
    """(K,) float64, 1 / area of the region each belongs to."""
    num_regions: int
    used_bits: int
    """All bit patterns or-ed."""


class _Histogram:
    """Pixels, defective pixels and region weights per slot."""

    def __init__(self, num_slots: int) -> None:
        self.pixels = np.zeros(num_slots, dtype=np.uint32)
        self.defects = np.zeros(num_slots, dtype=np.uint32)
        self.weights = np.zeros(num_slots)
        self.num_pixels = 0
        self.num_regions = 0
        self.used_bits = 0

    def add(self, batch: _Pixels, slot_of: Callable[[np.ndarray], np.ndarray]) -> None:
        self._make_room(len(batch.keys))
        one = self.pixels.dtype.type(1)
        for start in range(0, len(batch.keys), _CHUNK):
            np.add.at(self.pixels, slot_of(batch.keys[start : start + _CHUNK]), one)
        slots = slot_of(batch.keys[batch.defect_at])
        np.add.at(self.defects, slots, one)
        np.add.at(self.weights, slots, batch.weights)
        self.num_regions += batch.num_regions
        self.used_bits |= batch.used_bits

    def merge(self, other: _Histogram) -> None:
        self._make_room(other.num_pixels)
        self.pixels += other.pixels.astype(self.pixels.dtype)
        self.defects += other.defects.astype(self.pixels.dtype)
        self.weights += other.weights
        self.num_regions += other.num_regions
        self.used_bits |= other.used_bits

    def _make_room(self, num_pixels: int) -> None:
        """Widens the counts before a slot could overflow; 32 bits, while they do, keep more of them in the cache."""
        self.num_pixels += num_pixels
        if self.num_pixels >= 1 << 32:
            self.pixels, self.defects = self.pixels.astype(np.uint64), self.defects.astype(np.uint64)

    def num_unused_bits(self) -> int:
        """Low bits that are zero in every score (13 in float16 ones): slots no wider than these hold one value each."""
        return ((self.used_bits | 1 << 31) & -(self.used_bits | 1 << 31)).bit_length() - 1

    def __getstate__(self) -> dict[str, Any]:
        occupied = np.flatnonzero(self.pixels != 0)
        sparse = {name: getattr(self, name)[occupied] for name in ("pixels", "defects", "weights")}
        return vars(self) | sparse | {"occupied": occupied, "num_slots": len(self.pixels)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["num_slots"])  # type: ignore[misc]
        self._make_room(state["num_pixels"])
        for name in ("pixels", "defects", "weights"):
            getattr(self, name)[state["occupied"]] = state[name]
        self.num_regions, self.used_bits = state["num_regions"], state["used_bits"]


@dataclass(frozen=True, kw_only=True)
class _Intervals:
    """Disjoint ranges of scores that hold pixels, the highest first: I of them, each inside one bin."""

    bin: np.ndarray
    shift: np.ndarray
    """Low bits that the range leaves unresolved."""
    normal: np.ndarray
    defect: np.ndarray
    weight: np.ndarray
    last: np.ndarray
    """Most normal pixels that can share the lowest of their scores."""

    @classmethod
    def count(cls, histogram: _Histogram, slots: np.ndarray, bins: np.ndarray, shift: np.ndarray) -> _Intervals:
        """Reads occupied slots, the highest first, and joins neighbours of one bin that hold normal pixels alone."""
        defect = histogram.defects[slots].astype(np.int64)
        normal = histogram.pixels[slots].astype(np.int64) - defect
        is_end = np.ones(len(slots), dtype=bool)
        is_end[:-1] = (defect[:-1] > 0) | (defect[1:] > 0) | (bins[1:] != bins[:-1])
        ends = np.flatnonzero(is_end)
        return cls(
            bin=bins[ends],
            shift=shift[ends],
            normal=np.diff(np.cumsum(normal)[ends], prepend=0),
            defect=defect[ends],
            weight=histogram.weights[slots[ends]],
            last=normal[ends],
        )

    def replace(self, finer: _Intervals) -> _Intervals:
        """These with the intervals of another's bins replaced."""
        kept = np.flatnonzero(~np.isin(self.bin, finer.bin))
        place = np.searchsorted(-finer.bin, -self.bin[kept])
        return _Intervals(
            **{name: np.insert(getattr(finer, name), place, ours[kept]) for name, ours in vars(self).items()}
        )


class _Result(NamedTuple):
    """A metric, the largest error it can have, and (I,) what each interval has part in that."""

    value: float
    bound: float
    error: np.ndarray
    errors_add_up: bool = True


def _rank_metrics(normal: np.ndarray, defect: np.ndarray, exact: np.ndarray) -> dict[str, _Result]:
    """AUROC, AP and F1-max of counts per interval of scores.

    Args:
        normal: (I,) normal pixels or images, the highest scores first.
        defect: (I,) defective ones.
        exact: (I,) whether the interval holds a single score.
    """
    size = len(normal)
    # Only intervals with defects add to a metric; what lies above them are the false and true positives.
    place = np.flatnonzero(defect > 0)
    known = np.flatnonzero(exact[place])
    num_normal, num_defect = float(normal.sum()), float(defect.sum())
    counts = np.cumsum(normal) - normal, np.cumsum(defect) - defect, normal, defect
    false, true, normal, defect = (count[place].astype(np.float64) for count in counts)

    def add_up(terms: np.ndarray, error: np.ndarray) -> _Result:
        error[known] = 0
        return _Result(float(terms.sum()), float(error.sum()), np.bincount(place, error, minlength=size))

    share = defect / num_defect
    auroc = add_up(share * ((num_normal - false - normal / 2) / num_normal), share * (normal / 2 / num_normal))

    def precision(found: np.ndarray, normals_taken: np.ndarray | int) -> np.ndarray:
        return found / (found + false + normals_taken)

    all_found = true + defect
    after = precision(all_found, normal)
    estimate = precision(true + (defect + 1) / 2, normal / 2)
    # Precision is concave in the defects found, so its mean is at least that of the first and the last of them.
    error = np.maximum(precision(all_found, 0) - estimate, estimate - (precision(true + 1, normal) + after) / 2)
    estimate[known] = after[known]
    ap = add_up(share * estimate, share * error)

    f1 = 2 * all_found / (all_found + false + normal + num_defect)
    best = float(f1.max())
    above_best = np.maximum(2 * all_found / (all_found + false + num_defect) - best, 0)
    above_best[known] = 0
    error = np.bincount(place, above_best, minlength=size)
    return {"auroc": auroc, "ap": ap, "f1_max": _Result(best, float(error.max()), error, errors_add_up=False)}


def _aupro(intervals: _Intervals, exact: np.ndarray, num_regions: int, limit: float) -> _Result:
    """Area under the mean region overlap up to a false-positive rate, over that rate.

    A defective pixel joins the curve between two thresholds, which are normal scores: the lowest one that is not below
    its own, and the next. The curve rises by its weight along the normal pixels that have the first of these scores.
    """
    normal = intervals.normal
    end = limit * float(normal.sum())
    false = np.cumsum(normal) - normal
    # For each interval the closest one above it that has normal pixels; number 0 has none above.
    above = np.concatenate([[0], np.maximum.accumulate(np.arange(len(normal)) * (normal > 0))[:-1]])
    last_above = intervals.last[above]
    last_above[0] = 0

    place = np.flatnonzero((intervals.defect > 0) & (false - last_above < end))
    above = above[place]
    last_above, false, normal = (count[place].astype(np.float64) for count in (last_above, false, normal))
    mixed, pure = np.flatnonzero(normal > 0), np.flatnonzero(normal == 0)

    def rise(start: np.ndarray, width: np.ndarray) -> np.ndarray:
        """Integral up to `end` of what rises from 0 at `start` to 1 after `width` false positives."""
        area = end - start - width / 2
        cut = np.flatnonzero(start + width > end)
        area[cut] = np.maximum(end - start[cut], 0) ** 2 / (2 * width[cut])
        return area

    # Defective pixels of an interval may all lie above its normal ones: they rise along the last score above it. Or
    # all below: they rise along its own last score. How many normal pixels have that score is known only where exact.
    width, start = normal.copy(), false.copy()
    width[pure] = np.where(exact[above[pure]], last_above[pure], np.minimum(last_above[pure], 1))
    start[pure] -= width[pure]
    estimate = rise(start, width)
    start[mixed] += normal[mixed] - 1
    width[mixed] = 1
    error = estimate - rise(start, width)
    at_once = np.maximum(end - false, 0)
    error[mixed] = np.maximum(error, at_once - estimate)[mixed]
    before = rise(false - last_above, last_above) - np.maximum(estimate, at_once)
    known = mixed[exact[place[mixed]]]
    error[known] = before[known] = 0

    scale = intervals.weight[place] / (end * num_regions)
    error *= scale
    before *= scale
    # What may happen along the interval above is for that one to resolve, unless it is exact.
    errors = np.bincount(place, error, minlength=len(exact))
    errors += np.bincount(np.where(exact[above], place, above), before, minlength=len(exact))
    return _Result(float((estimate * scale).sum()), float(errors.sum()), errors)


def _read_pixels(
    anomaly_map: np.ndarray | Tensor, mask: np.ndarray | Tensor, regions: np.ndarray | Tensor | None
) -> _Pixels:
    scores, truth = _to_numpy(anomaly_map), _to_numpy(mask)
    labels = None if regions is None else _to_numpy(regions)
    if scores.ndim not in (2, 3) or truth.shape != scores.shape:
        raise MetricError(
            f"anomaly_map and mask must both be (B, H, W) or (H, W), got {scores.shape} and {truth.shape}"
        )
    if labels is not None and labels.shape != scores.shape:
        raise MetricError(f"regions must have the shape of the mask {truth.shape}, got {labels.shape}")
    with np.errstate(over="ignore"):  # becomes infinite, and that is an error below
        scores = np.ascontiguousarray(scores, dtype=np.float32)
    defect = truth != 0
    if defect.ndim == 2:
        defect, labels = defect[None], None if labels is None else labels[None]
    weights, num_regions = _region_weights(defect, labels)
    keys = bits = scores.reshape(-1).view(np.int32)
    used_bits = int(np.bitwise_or.reduce(bits))
    if used_bits < 0:  # some sign is set
        bits = (scores.reshape(-1) + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
        keys = bits ^ ((bits >> 31) & 0x7FFF_FFFF)
    if len(keys) and not (keys.min() >= -_INFINITY and keys.max() < _INFINITY):
        _check_finite(scores, "anomaly map")
    return _Pixels(keys, np.flatnonzero(defect), weights, num_regions, used_bits)


def _bin_of(keys: np.ndarray) -> np.ndarray:
    return (keys >> _LOW_BITS) + np.int64(_NUM_BINS // 2)


def _region_weights(defect: np.ndarray, regions: np.ndarray | None) -> tuple[np.ndarray, int]:
    """1 / area for the defective pixels of (B, H, W) masks in order, and the number of regions in all."""
    if regions is not None and not np.array_equal(regions != 0, defect):
        raise MetricError("regions and mask disagree: labels must be non-zero exactly where the mask is")
    weights, num_regions = [np.zeros(0)], 0
    for image in np.flatnonzero(defect.any(axis=(1, 2))):
        box = _bounding_box(defect[image])
        inside = defect[image][box]
        boxed = ndimage.label(inside, structure=_EIGHT_NEIGHBOURS)[0] if regions is None else regions[image][box]
        labels = boxed[inside]
        areas = np.bincount(labels)
        weights.append(1 / areas[labels])
        num_regions += int(np.count_nonzero(areas))
    return np.concatenate(weights), num_regions


def _bounding_box(defect: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of an (H, W) mask that hold its defects, so that no more than these are searched for regions."""
    rows, columns = np.flatnonzero(defect.any(axis=1)), np.flatnonzero(defect.any(axis=0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _to_numpy(values: np.ndarray | Tensor) -> np.ndarray:
    if not hasattr(values, "detach"):
        return np.asarray(values)
    values = values.detach()
    half = values.is_floating_point() and values.element_size() < 4  # numpy has no bfloat16
    return (values.float() if half else values).cpu().numpy()


def _check_finite(scores: np.ndarray, what: str) -> None:
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        index = tuple(int(i) for i in np.unravel_index(wrong[0], scores.shape))
        raise MetricError(
            f"{len(wrong)} of {scores.size} {what} values are NaN or infinite, the first at index {index}"
        )


def _check_both_classes(what: str, defect_word: str, num_normal: int, num_defect: int) -> None:
    missing = [word for word, count in (("normal", num_normal), (defect_word, num_defect)) if count == 0]
    if missing:
        raise MetricError(
            f"{what} metrics need both classes, but there is no {' and no '.join(missing)} {what}: "
            f"{num_normal} normal, {num_defect} {defect_word}"
        )
