"""From raw predictions to metrics: resize and smooth the maps, reduce them to image scores, compare with the masks.

A fresh cell and one that is re-scored later both come through here, so their numbers agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.contracts import EvaluationProtocol, Sample
from harness.maps import full_resolution, reduce_maps
from harness.metrics import METRICS, PixelMetrics, image_metrics, image_ranges
from harness.store import StoredPrediction
from harness.truth import Truth

CHUNK = 32
"""Maps at full resolution held at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The metrics of one cell and the image scores behind them."""

    metrics: dict[str, float]
    bounds: dict[str, float]
    """Largest possible error of a metric of maps, their rounding for storage included."""
    curves: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Points of the pixel ROC and PRO curves; see `harness.curves.draw_pixel_curves`."""
    image_scores: np.ndarray
    """(N,) float32 in the order of the test images."""
    label: np.ndarray
    """(N,) 1 = anomalous, as it was counted; the protocol may have made some images normal."""


def evaluate(
    prediction: StoredPrediction,
    label: Sequence[int],
    truth: Truth | None,
    protocol: EvaluationProtocol,
    own_score: bool,
    sample_id: Sequence[str] | None = None,
) -> Evaluation:
    """Metrics of one category.

    Args:
        prediction: maps and scores of the test images.
        label: (N,) 1 = anomalous, in the same order.
        truth: their masks; None leaves pixel metrics out: they are not available.
        protocol: resolved, no field left to method or backbone.
        own_score: keep the method's own image score where it gives one; False reduces the map for every method.
        sample_id: (N,) the objects shown; those of several images get metrics of their own. None: no such metrics.

    Raises:
        MetricError: one-class test set, scores that are not finite, no defective pixel.
    """
    maps, error = prediction.anomaly_maps, prediction.maps.error
    if len(maps) != len(label):
        raise ValueError(f"{len(maps)} predictions for {len(label)} test images")
    scores, reduction = prediction.image_scores if own_score else None, protocol.score_reduction
    assert reduction != "method"

    def chunks(maps: np.ndarray) -> Iterator[Tensor]:
        for start in range(0, len(maps), CHUNK):
            some = torch.from_numpy(maps[start : start + CHUNK])
            yield full_resolution(some, protocol.image_size, float(protocol.smoothing))

    def chunks_with_truth(truth: Truth) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
        for number, rows in enumerate(chunks(prediction.maps.scaled)):  # of finer resolution, in the same order
            regions = truth.regions(number * CHUNK, number * CHUNK + len(rows))
            yield rows, regions != 0, regions

    reduced = scores is None
    if scores is None:
        scores = torch.cat([reduce_maps(rows, reduction) for rows in chunks(maps)]).numpy()
    counted = count_labels(label, truth, protocol)
    metrics, ranges = image_metrics(scores, counted), {}
    if reduced:
        # A padded mean counts what is beyond the border as 0, so that it may fall below the lowest value of the maps.
        lowest = min(error.offset, 0.0) if reduction == "mean_pool_21" else error.offset
        error_of_score = dataclasses.replace(error, offset=lowest)
        ranges = image_ranges(scores, counted, error_of_score)
    if sample_id is not None:
        samples = sample_scores(scores, counted, sample_id)
        if samples is not None:
            metrics["sample_auroc"] = image_metrics(*samples)["image_auroc"]
            if reduced:
                ranges["sample_auroc"] = image_ranges(*samples, error_of_score)["image_auroc"]
    curves = {}
    if truth is not None:
        pixel = PixelMetrics(aupro_limit=protocol.aupro_limit)
        for batch in chunks_with_truth(truth):
            pixel.update(*batch)
        found = pixel.compute(replay=lambda: chunks_with_truth(truth))
        metrics |= {name: value for name, value in found.items() if name in METRICS}
        ranges |= pixel.ranges(prediction.maps.scaled_error)
        curves = {name: values.round(5).tolist() for name, values in pixel.draw_curves().items()}
    bounds = {name: max(high - metrics[name], metrics[name] - low) for name, (low, high) in ranges.items()}
    return Evaluation(metrics=metrics, bounds=bounds, image_scores=scores, label=counted, curves=curves)


def score_columns(test: Sequence[Sample], result: Evaluation) -> dict[str, list[Any]]:
    """What is kept of every test image, for reports, comparisons and later scoring: see `Store.publish_scores`."""
    return {
        "path": [sample.path for sample in test],
        "mask_path": [sample.mask_path for sample in test],
        "sample_id": [sample.sample_id for sample in test],
        "label": result.label.tolist(),
        "true_label": [sample.label for sample in test],
        "defect_type": [sample.defect_type for sample in test],
        "image_score": result.image_scores.tolist(),
    }


def stored_samples(columns: Mapping[str, Sequence[Any]], category: str) -> tuple[Sample, ...]:
    """The test images behind such columns."""
    paths = columns["path"]
    labels = columns.get("true_label", columns["label"])  # scores of earlier versions lack what came later
    samples = zip(
        paths, columns.get("sample_id", paths), labels, columns["defect_type"], columns["mask_path"], strict=True
    )
    return tuple(
        Sample(
            path=path,
            category=category,
            sample_id=sample_id,
            split="test",
            label=label,
            defect_type=defect_type,
            mask_path=mask_path,
        )
        for path, sample_id, label, defect_type, mask_path in samples
    )


def count_labels(label: Sequence[int], truth: Truth | None, protocol: EvaluationProtocol) -> np.ndarray:
    """Labels as the protocol counts them.

    Args:
        label: (N,) 1 = anomalous.
        truth: masks after resize and crop; None where there are none, so that no label changes.
        protocol: `cropped_anomaly: normal` counts an anomalous image as normal when it is cropped and nothing of its
            mask is left. Without a crop nothing is cut away, and every label stays.

    Returns:
        (N,) int64, 1 = anomalous.
    """
    counted = np.array(label, dtype=np.int64)
    if protocol.cropped_anomaly == "normal" and protocol.resize is not None and truth is not None:
        counted[np.diff(truth.starts) == 0] = 0
    return counted


def sample_scores(
    image_scores: np.ndarray, label: np.ndarray, sample_id: Sequence[str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """What `sample_auroc` ranks: objects that are seen in several images (Real-IAD, arXiv 2403.12580).

    An object is scored by the highest of its views and anomalous when any of them is.

    Args:
        image_scores: (N,) higher = more anomalous.
        label: (N,) 1 = anomalous.
        sample_id: (N,) the object that an image shows.

    Returns:
        (S,) scores and (S,) labels; None where every object is seen once, or where all objects are of one class.
    """
    samples, place = np.unique(np.array(sample_id), return_inverse=True)
    score = np.full(len(samples), -np.inf, dtype=np.asarray(image_scores).dtype)
    np.maximum.at(score, place, image_scores)
    anomalous = np.zeros(len(samples), dtype=np.int64)
    np.maximum.at(anomalous, place, label)
    if len(samples) == len(label) or anomalous.min() == anomalous.max():
        return None
    return score, anomalous
