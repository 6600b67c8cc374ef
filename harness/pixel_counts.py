"""Pixels of anomaly maps, counted by score: what the pixel metrics are computed from.

The bit patterns of float32 numbers, read as integers, are ordered as the numbers are (once those of negative numbers
are flipped): these are the keys by which pixels are counted. A bin is what shares the upper 20 bits of a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from torch import Tensor

LOW_BITS = 12
NUM_BINS = 1 << (32 - LOW_BITS)
_CHUNK = 1 << 15  # pixels counted at once, so that what is computed from them stays in the cache
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
_INFINITY = 0x7F80_0000  # bit pattern of +inf; those above it are NaN


class MetricError(ValueError):
    """Scores or ground truth that no metric can be computed from."""


def label_regions(mask: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the 8-connected defect regions of a mask.

    Args:
        mask: (H, W), non-zero is defect.

    Returns:
        (H, W) int32 labels, 0 outside and 1..R inside, and (R,) int64 areas in pixels.
    """
    defect = to_numpy(mask) != 0
    labels = np.zeros(defect.shape, dtype=np.int32)
    box = _bounding_box(defect)
    ndimage.label(defect[box], structure=_EIGHT_NEIGHBOURS, output=labels[box])
    return labels, np.bincount(labels[box].ravel(), minlength=1)[1:]


class Pixels(NamedTuple):
    """A batch as it is counted."""

    keys: np.ndarray
    """(B * H * W,) int32, ordered as the scores are; equal where these are equal."""
    defect_at: np.ndarray
    """(K,) positions of the defective pixels, ascending."""
    weights: np.ndarray
    """(K,) float64, 1 / area of the region each belongs to."""
    num_regions: int
    used_bits: int
    """All bit patterns or-ed."""


def read_pixels(
    anomaly_map: np.ndarray | Tensor, mask: np.ndarray | Tensor, regions: np.ndarray | Tensor | None
) -> Pixels:
    """Reads a batch; arguments and errors as in `harness.metrics.PixelMetrics.update`."""
    scores, truth = to_numpy(anomaly_map), to_numpy(mask)
    labels = None if regions is None else to_numpy(regions)
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
        defect = defect[None]
    defect_at = np.flatnonzero(defect)
    weights, num_regions = [np.zeros(0)], 0
    for of_image in _label_images(defect) if labels is None else _split_labels(labels, defect, defect_at):
        areas = np.bincount(of_image)
        weights.append((1 / np.maximum(areas, 1))[of_image])
        num_regions += int(np.count_nonzero(areas))
    keys = bits = scores.reshape(-1).view(np.int32)
    used_bits = int(np.bitwise_or.reduce(bits))
    if used_bits < 0:  # some sign is set
        bits = (scores.reshape(-1) + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
        keys = bits ^ ((bits >> 31) & 0x7FFF_FFFF)
    if len(keys) and not (keys.min() >= -_INFINITY and keys.max() < _INFINITY):
        check_finite(scores, "anomaly map")
    return Pixels(keys, defect_at, np.concatenate(weights), num_regions, used_bits)


def _label_images(defect: np.ndarray) -> Iterator[np.ndarray]:
    """The region labels of the defective pixels of each (H, W) mask that has any, in order."""
    for mask in defect[defect.any(axis=(1, 2))]:
        inside = mask[_bounding_box(mask)]
        yield ndimage.label(inside, structure=_EIGHT_NEIGHBOURS)[0][inside]


def _split_labels(labels: np.ndarray, defect: np.ndarray, defect_at: np.ndarray) -> Iterator[np.ndarray]:
    """The same from labels that were made before."""
    inside = labels.reshape(-1)[defect_at]
    if not inside.all() or np.count_nonzero(labels) > len(inside):
        raise MetricError("regions and mask disagree: labels must be non-zero exactly where the mask is")
    per_image = defect[0].size if len(defect) else 1
    return (part for part in np.split(inside, np.searchsorted(defect_at, range(per_image, defect.size, per_image))))


def _bounding_box(defect: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of an (H, W) mask that hold its defects, so that no more than these are searched for regions."""
    rows, columns = np.flatnonzero(defect.any(axis=1)), np.flatnonzero(defect.any(axis=0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def to_numpy(values: np.ndarray | Tensor) -> np.ndarray:
    """An array or tensor of any device as a numpy array."""
    if not hasattr(values, "detach"):
        return np.asarray(values)
    values = values.detach()
    half = values.is_floating_point() and values.element_size() < 4  # numpy has no bfloat16
    return (values.float() if half else values).cpu().numpy()


def check_finite(scores: np.ndarray, what: str) -> None:
    """Raises MetricError with the number of values that are not finite and the place of the first."""
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        index = tuple(int(i) for i in np.unravel_index(wrong[0], scores.shape))
        raise MetricError(
            f"{len(wrong)} of {scores.size} {what} values are NaN or infinite, the first at index {index}"
        )


def bin_of(keys: np.ndarray) -> np.ndarray:
    """The bin of each key, in [0, NUM_BINS)."""
    return (keys >> LOW_BITS) + np.int64(NUM_BINS // 2)


def score_of(keys: np.ndarray) -> np.ndarray:
    """The scores, in float64, that int64 keys stand for; what lies beyond the largest float32 is cut to it."""
    keys = keys.clip(-_INFINITY, _INFINITY - 1).astype(np.int32)
    return (keys ^ ((keys >> 31) & 0x7FFF_FFFF)).view(np.float32).astype(np.float64)


class Histogram:
    """Pixels, defective pixels and region weights per slot."""

    def __init__(self, num_slots: int) -> None:
        """Args: num_slots, none of which holds a pixel yet."""
        self.pixels = np.zeros(num_slots, dtype=np.uint32)
        self.defects = np.zeros(num_slots, dtype=np.uint32)
        self.weights = np.zeros(num_slots)
        self.num_pixels = 0
        self.num_regions = 0
        self.used_bits = 0

    def add(self, batch: Pixels, slot_of: Callable[[np.ndarray], np.ndarray]) -> None:
        """Counts a batch; slot_of gives the slots of keys."""
        self._make_room(len(batch.keys))
        one = self.pixels.dtype.type(1)
        for start in range(0, len(batch.keys), _CHUNK):
            np.add.at(self.pixels, slot_of(batch.keys[start : start + _CHUNK]), one)
        slots = slot_of(batch.keys[batch.defect_at])
        np.add.at(self.defects, slots, one)
        np.add.at(self.weights, slots, batch.weights)
        self.num_regions += batch.num_regions
        self.used_bits |= batch.used_bits

    def merge(self, other: Histogram) -> None:
        """Adds the counts of another with as many slots."""
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
class Intervals:
    """Disjoint ranges of scores that hold pixels, the lowest first: I of them, each inside one bin."""

    bin: np.ndarray
    shift: np.ndarray
    """Low bits that the range leaves unresolved."""
    normal: np.ndarray
    defect: np.ndarray
    weight: np.ndarray
    last: np.ndarray
    """Most normal pixels that can share the lowest of their scores."""
    low: np.ndarray
    """Lowest key that the range may hold."""
    high: np.ndarray

    @classmethod
    def count(
        cls,
        histogram: Histogram,
        slots: np.ndarray,
        first: np.ndarray,
        bins: np.ndarray,
        shift: np.ndarray,
        first_slot: np.ndarray,
    ) -> Intervals:
        """Reads slots and joins neighbours of one bin that hold normal pixels alone.

        Args:
            histogram: the counts.
            slots: (K,) all that hold pixels, ascending.
            first: (S,) where in `slots` each bin begins.
            bins: (S,) ascending.
            shift: (S,) low bits that the slots of each bin leave unresolved.
            first_slot: (S,) the slot that holds the lowest scores of each bin.
        """
        pixels, defect = histogram.pixels[slots], histogram.defects[slots]
        mixed = defect > 0
        is_start = np.ones(len(slots), dtype=bool)
        np.logical_or(mixed[1:], mixed[:-1], out=is_start[1:])
        is_start[first] = True
        starts = np.flatnonzero(is_start)
        num_intervals = np.diff(np.searchsorted(starts, first), append=len(starts))
        bin_of_slot = np.repeat(np.arange(len(bins)), np.diff(first, append=len(slots)))
        width = shift[bin_of_slot].astype(np.int64)
        keys = (bins[bin_of_slot].astype(np.int64) - NUM_BINS // 2) << LOW_BITS
        keys += (slots - first_slot[bin_of_slot]) << width
        ends = np.append(starts, len(slots))[1:] - 1
        return cls(
            bin=np.repeat(bins, num_intervals),
            shift=np.repeat(shift, num_intervals),
            normal=np.add.reduceat(pixels, starts, dtype=pixels.dtype) - defect[starts],
            defect=defect[starts],
            weight=histogram.weights[slots[starts]],
            last=pixels[starts] - defect[starts],
            low=keys[starts],
            high=keys[ends] + (1 << width[ends]) - 1,
        )

    def replace(self, finer: Intervals) -> Intervals:
        """These with the intervals of another's bins replaced."""
        is_start = np.diff(finer.bin, prepend=-1) != 0
        kept = np.flatnonzero(~np.isin(self.bin, finer.bin[is_start]))
        place = np.searchsorted(finer.bin, self.bin[kept])
        return Intervals(
            **{name: np.insert(getattr(finer, name), place, ours[kept]) for name, ours in vars(self).items()}
        )
