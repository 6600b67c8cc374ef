# LEAD TO METRICS ENGINEER: I overwrote your file by mistake at 01:28, sorry. Write yours again over this one (mine is kept at /tmp/lead_metrics.py; take from either what is better: it is exact and takes 0.24 s for 100 maps 256x256). Same for maps.py (/tmp/lead_maps.py).
"""Image and pixel metrics, exact to a bound that comes with the number.

The order of float32 bit patterns, after a flip for negative numbers, is the order of the numbers. So a histogram over
their upper 20 bits needs no range, takes constant memory and merges by addition over batches, workers and nodes. The
order of pixels is unknown only inside a bin, which bounds the error. A second look at the same maps resolves the bins
that carry the bound, by sorting their pixels.

All metrics read one curve: groups of pixels in falling order of score, each with its normal pixels, its defective
pixels and their weight 1 / (area of their region).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from scipy import ndimage, special
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import Tensor

METRIC_VERSION = 1
"""Raised when a number moves; enters every cell id."""

BOUND = 1e-6
"""Largest error that is left where the maps can be looked at again."""
LOW_BITS = 12
NUM_BINS = 1 << (32 - LOW_BITS)
SORT_PIXELS = 1 << 23
"""Pixels sorted at once in the second look; bounds its memory at about 100 MiB."""

Replay = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class MetricError(ValueError):
    """Scores or labels for which a metric is not defined."""


@dataclasses.dataclass(frozen=True)
class MetricInfo:
    """A metric as reports name it."""

    kind: str
    """`image` or `pixel`."""
    title: str
    definition: str


METRICS = {
    "image_auroc": MetricInfo("image", "image AUROC", "area under the ROC curve of the image scores"),
    "image_ap": MetricInfo("image", "image AP", "average precision of the image scores, step sum"),
    "image_f1_max": MetricInfo("image", "image F1-max", "best F1 along the precision-recall curve of the image scores"),
    "pixel_auroc": MetricInfo("pixel", "pixel AUROC", "area under the ROC curve of all pixels of the category, pooled"),
    "pixel_ap": MetricInfo("pixel", "pixel AP", "average precision of all pixels of the category, pooled, step sum"),
    "pixel_f1_max": MetricInfo("pixel", "pixel F1-max", "best F1 along the precision-recall curve of all pixels"),
    "aupro": MetricInfo("pixel", "AUPRO", "area under the mean overlap of defect regions, up to a false-positive rate"),
}
"""Every metric in the order of reports."""


# --- images ----------------------------------------------------------------------------------------------------


def image_metrics(image_score: Tensor | np.ndarray, label: Tensor | np.ndarray) -> dict[str, float]:
    """Exact metrics of image scores, with ties as scikit-learn treats them.

    Args:
        image_score: (N,) finite, higher = more anomalous.
        label: (N,) 1 = anomalous, 0 = normal.

    Returns:
        `image_auroc`, `image_ap` and `image_f1_max`, in [0, 1].

    Raises:
        MetricError: scores that are not finite, shapes that differ, only one class.
    """
    scores, labels = np.asarray(image_score, dtype=np.float64), np.asarray(label).astype(np.int64)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise MetricError(f"image scores {scores.shape} and labels {labels.shape} must be one list of the same length")
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores))
        raise MetricError(f"{len(bad)} of {len(scores)} image scores are NaN or infinite, the first at index {bad[0]}")
    num_anomalous = int(labels.sum())
    if num_anomalous in (0, len(labels)):
        lacking = "anomalous" if num_anomalous == 0 else "normal"
        raise MetricError(f"no {lacking} image among {len(labels)} test images; image metrics need both classes")
    precision, recall, _ = precision_recall_curve(labels, scores)
    return {
        "image_auroc": float(roc_auc_score(labels, scores)),
        "image_ap": float(average_precision_score(labels, scores)),
        "image_f1_max": float(_f1(precision, recall).max()),
    }


def _f1(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    return 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)


# --- pixels ----------------------------------------------------------------------------------------------------


def label_regions(mask: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected regions of defective pixels, diagonal neighbours included.

    Args:
        mask: (H, W), non-zero is defect.

    Returns:
        (H, W) int32 labels from 1, 0 outside; (R,) int64 areas in pixels.
    """
    labels, num = ndimage.label(np.asarray(mask) != 0, structure=np.ones((3, 3), dtype=bool), output=np.int32)
    return labels, np.bincount(labels.ravel(), minlength=num + 1)[1:].astype(np.int64)


class PixelMetrics:
    """Pixel AUROC, AP, F1-max and AUPRO of one category, gathered batch by batch.

    AUPRO is the official definition of MVTec AD (Bergmann et al., IJCV 2021, section 5.2) with every distinct score as
    a threshold: each 8-connected region weighs the same, the overlap of a region is the share of its pixels above the
    threshold, and the mean overlap is integrated by trapezoids over the false-positive rate up to the limit, divided by it.

    Memory does not grow with the number of images, and results do not depend on how images are batched or spread.
    """

    def __init__(self, aupro_limit: float = 0.3) -> None:
        """Args: false-positive rate up to which AUPRO integrates, in (0, 1]."""
        if not 0 < aupro_limit <= 1:
            raise ValueError(f"aupro_limit must be in (0, 1], got {aupro_limit}")
        self.aupro_limit = aupro_limit
        self._counts = np.zeros((NUM_BINS, 2), dtype=np.int64)
        self._weights = np.zeros(NUM_BINS, dtype=np.float64)
        self._num_regions = 0

    def update(
        self, anomaly_map: Tensor, mask: Tensor, regions: Iterable[tuple[np.ndarray, np.ndarray]] | None = None
    ) -> None:
        """Adds images.

        Args:
            anomaly_map: (B, H, W) or (H, W) finite scores, higher = more anomalous.
            mask: the same shape; non-zero is defect.
            regions: `label_regions` of each mask, where they are known already.

        Raises:
            MetricError: scores that are not finite, or shapes that differ.
        """
        keys, defect, weight, num_regions = _read(anomaly_map, mask, regions)
        bins = (keys >> LOW_BITS) + NUM_BINS // 2
        flags = torch.zeros_like(bins)
        flags[defect] = 1
        index = bins * 2 + flags
        self._counts += torch.bincount(index, minlength=2 * NUM_BINS).reshape(-1, 2).cpu().numpy()
        if len(defect):
            self._weights += torch.bincount(bins[defect], weights=weight, minlength=NUM_BINS).cpu().numpy()
        self._num_regions += num_regions

    def merge(self, other: PixelMetrics) -> None:
        """Adds what another instance gathered. Raises ValueError if its AUPRO limit differs."""
        if other.aupro_limit != self.aupro_limit:
            raise ValueError(f"cannot merge AUPRO limits {self.aupro_limit} and {other.aupro_limit}")
        self._counts += other._counts
        self._weights += other._weights
        self._num_regions += other._num_regions

    def compute(self, replay: Replay | None = None) -> dict[str, float]:
        """The metrics of all images so far.

        Args:
            replay: yields all (anomaly_map, mask) of `update` again, in any order and batches. Without it the numbers
                come from the histogram alone.

        Returns:
            `pixel_auroc`, `pixel_ap`, `pixel_f1_max`, `aupro` in [0, 1], and for each `<name>_bound`, the largest
            possible error; with `replay` every bound is at most 1e-6.

        Raises:
            MetricError: no defective or no normal pixel.
        """
        num_normal, num_defect = (int(total) for total in self._counts.sum(axis=0))
        if num_defect == 0 or num_normal == 0:
            lacking = "defective" if num_defect == 0 else "normal"
            raise MetricError(f"no {lacking} pixel in the masks of the test images; pixel metrics need both")
        curve = _Curve.from_bins(self._counts, self._weights / self._num_regions)
        if replay is not None:
            curve = self._resolve(curve, replay)
        return {name: float(value) for name, value in curve.metrics(self.aupro_limit).items()}

    def _resolve(self, curve: _Curve, replay: Replay) -> _Curve:
        """Replaces the bins that carry the bounds by their sorted pixels, a bounded number of pixels at a time."""
        chosen = curve.worst_bins(self.aupro_limit, BOUND)
        sizes = np.cumsum(self._counts[chosen].sum(axis=1))
        groups = (
            np.split(chosen, np.searchsorted(sizes, np.arange(SORT_PIXELS, sizes[-1], SORT_PIXELS)))
            if len(chosen)
            else []
        )
        parts = [curve.without(chosen)]
        for group in groups:
            if len(group):
                parts.append(_sort_bins(np.sort(group), replay, self._num_regions))
        return _Curve.join(parts)


@dataclasses.dataclass(frozen=True)
class _Curve:
    """Groups of pixels, any order until `join`; positions are float32 order keys of the group's lowest pixel."""

    position: np.ndarray
    normal: np.ndarray
    defect: np.ndarray
    weight: np.ndarray
    tied: np.ndarray
    """Whether all pixels of the group are known to have one score, or to be of one class in a known order."""

    @classmethod
    def from_bins(cls, counts: np.ndarray, weights: np.ndarray) -> _Curve:
        bins = np.flatnonzero(counts.sum(axis=1))[::-1]
        normal, defect = counts[bins, 0], counts[bins, 1]
        position = (bins.astype(np.int64) - NUM_BINS // 2) << LOW_BITS
        return cls(position, normal, defect, weights[bins], (defect == 0) | ((normal == 0) & (defect == 1)))

    @staticmethod
    def join(parts: list[_Curve]) -> _Curve:
        columns = [np.concatenate([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(_Curve)]
        order = np.argsort(-columns[0], kind="stable")
        return _Curve(*(column[order] for column in columns))

    def bins(self) -> np.ndarray:
        return (self.position >> LOW_BITS) + NUM_BINS // 2

    def without(self, bins: np.ndarray) -> _Curve:
        keep = ~np.isin(self.bins(), bins)
        return _Curve(*(getattr(self, f.name)[keep] for f in dataclasses.fields(_Curve)))

    def metrics(self, limit: float) -> dict[str, float]:
        terms = self._terms(limit)
        result: dict[str, float] = {}
        for name, (value, error) in terms.items():
            if name == "pixel_f1_max":
                result[name] = value.max()
                result[f"{name}_bound"] = max((value + error).max() - value.max(), 0.0)
            else:
                result[name] = min(max(value.sum(), 0.0), 1.0)
                result[f"{name}_bound"] = error.sum()
        return result

    def worst_bins(self, limit: float, bound: float) -> np.ndarray:
        """The fewest bins, about, that must be resolved so that every bound ends below `bound`."""
        chosen = np.zeros(len(self.position), dtype=bool)
        for name, (value, error) in self._terms(limit).items():
            if name == "pixel_f1_max":
                chosen |= value + error > value.max() + bound / 2
                continue
            order = np.argsort(error)
            # Half the bound may stay where it is; the rest is resolved, the largest errors first.
            chosen[order[np.cumsum(error[order]) > bound / 2]] = True
        return self.bins()[chosen & ~self.tied]

    def _terms(self, limit: float) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Per group, the contribution to each metric (F1: the value reached there) and its largest error."""
        normal, defect = self.normal.astype(np.float64), self.defect.astype(np.float64)
        num_normal, num_defect = normal.sum(), defect.sum()
        true_before, false_before = np.cumsum(defect) - defect, np.cumsum(normal) - normal
        true_after, false_after = true_before + defect, false_before + normal
        open_ = ~self.tied

        # A defective pixel beats the normal pixels below it, and half of those tied with it.
        auroc = defect * (num_normal - false_after + normal / 2) / (num_normal * num_defect)
        auroc_error = np.where(open_, defect * normal / 2, 0) / (num_normal * num_defect)

        tied_ap = defect * true_after / np.maximum(true_after + false_after, 1)
        # Inside a group the best order has the defective pixels first and tied, the worst has them last, one by one.
        best_ap = defect * true_after / np.maximum(true_after + false_before, 1)
        worst_ap = defect - false_after * (
            special.digamma(true_after + false_after + 1) - special.digamma(true_before + false_after + 1)
        )
        ap = np.where(open_, (best_ap + worst_ap) / 2, tied_ap) / num_defect
        ap_error = np.where(open_, (best_ap - worst_ap) / 2, 0) / num_defect

        f1 = 2 * true_after / (true_after + false_after + num_defect)
        best_f1 = 2 * true_after / (true_after + false_before + num_defect)
        f1_error = np.where(open_, np.maximum(best_f1 - f1, 0), 0)

        overlap_before = np.cumsum(self.weight) - self.weight
        # The part of the group's step in false-positive rate that lies below the limit.
        width = np.clip(limit * num_normal - false_before, 0, normal) / num_normal
        share = width * num_normal / np.maximum(normal, 1)
        aupro = width * (overlap_before + self.weight * share / 2) / limit
        aupro_error = np.where(open_, width * self.weight * np.maximum(share, 1 - share / 2) / limit, 0)
        aupro_error = np.where(share == 1, aupro_error / 2, aupro_error)
        return {
            "pixel_auroc": (auroc, auroc_error),
            "pixel_ap": (ap, ap_error),
            "pixel_f1_max": (f1, f1_error),
            "aupro": (aupro, aupro_error),
        }


def _read(
    anomaly_map: Tensor, mask: Tensor, regions: Iterable[tuple[np.ndarray, np.ndarray]] | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Order keys (P,) int32 of all pixels; indices, weights (float64, 1 / area) of the defective ones; number of regions."""
    if anomaly_map.shape != mask.shape or anomaly_map.ndim not in (2, 3):
        raise MetricError(f"anomaly map {tuple(anomaly_map.shape)} and mask {tuple(mask.shape)} must have one shape")
    scores = anomaly_map.detach().float().reshape(-1)
    # The sum is finite only if every score is, but for an overflow of finite scores.
    if not torch.isfinite(scores.sum()) and not torch.isfinite(scores).all():
        bad = (~torch.isfinite(scores)).nonzero()
        raise MetricError(
            f"{len(bad)} of {len(scores)} pixel scores are NaN or infinite, the first at index {int(bad[0])}"
        )
    bits = (scores + 0.0).view(torch.int32)  # the sum turns -0.0 into 0.0
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    masks = np.asarray(mask.cpu()).reshape(-1, *mask.shape[-2:])
    defect, weight, num_regions, offset = [], [], 0, 0
    known: Any = regions if regions is not None else (None for _ in masks)
    for single, region in zip(masks, known, strict=True):
        if region is not None or single.any():
            labels, areas = label_regions(single) if region is None else region
            inside = np.flatnonzero(labels)
            defect.append(inside + offset)
            weight.append(1.0 / areas[labels.ravel()[inside] - 1])
            num_regions += len(areas)
        offset += single.size
    device = scores.device
    indices = torch.from_numpy(np.concatenate(defect) if defect else np.zeros(0, np.int64)).to(device)
    weights = torch.from_numpy(np.concatenate(weight) if weight else np.zeros(0)).to(device)
    return keys, indices, weights, num_regions


def _sort_bins(bins: np.ndarray, replay: Replay, num_regions: int) -> _Curve:
    """The pixels of some bins as groups of equal score: one per distinct score of a defective pixel, and the normal
    pixels between two of them."""
    wanted = torch.zeros(NUM_BINS, dtype=torch.bool)
    wanted[torch.from_numpy(bins)] = True
    normals, defects, weights = [], [], []
    for anomaly_map, mask in replay():
        keys, defect, weight, _ = _read(anomaly_map, mask)
        keep = wanted.to(keys.device)[(keys >> LOW_BITS) + NUM_BINS // 2]
        inside = keep[defect]
        defects.append(keys[defect[inside]].cpu().numpy())
        weights.append(weight[inside].cpu().numpy())
        keep[defect] = False
        normals.append(keys[keep].cpu().numpy())
    normal = np.sort(np.concatenate(normals))
    key, inverse = np.unique(np.concatenate(defects), return_inverse=True)
    count = np.bincount(inverse, minlength=len(key))
    weight_of = np.bincount(inverse, weights=np.concatenate(weights), minlength=len(key)) / num_regions
    below, up_to = np.searchsorted(normal, key, "left"), np.searchsorted(normal, key, "right")
    ties = np.stack([key.astype(np.int64), up_to - below, count, weight_of])
    # Normal pixels between neighbouring defect scores, bin by bin so that they stay between the bins left as they are.
    edges = np.union1d(key.astype(np.int64), (bins.astype(np.int64) - NUM_BINS // 2) << LOW_BITS)
    starts = np.searchsorted(normal, edges, "left")
    tied_at = np.searchsorted(edges, key)
    between = np.diff(np.append(starts, len(normal)))
    between[tied_at] -= up_to - below
    gaps = np.stack([edges, between, np.zeros(len(edges)), np.zeros(len(edges))])
    # A gap lies above its edge: at equal position it comes first in falling order.
    position, num_normal, num_defect, weight_sum = np.concatenate([gaps, ties], axis=1)
    keep_group = num_normal + num_defect > 0
    columns = [position.astype(np.int64), num_normal, num_defect, weight_sum, np.ones(len(position), dtype=bool)]
    return _Curve(*(column[keep_group] for column in columns))
