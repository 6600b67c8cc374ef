"""From raw predictions to metrics: resize and smooth the maps, reduce them to image scores, compare with the masks.

A fresh cell and one that is re-scored later both come through here, so their numbers agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from harness.contracts import EvaluationProtocol
from harness.maps import full_resolution, reduce_maps
from harness.metrics import PixelMetrics, image_metrics
from harness.store import StoredPrediction
from harness.truth import Truth

CHUNK = 32
"""Maps at full resolution held at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The metrics of one cell and the image scores behind them."""

    metrics: dict[str, float]
    bounds: dict[str, float]
    """Largest possible numerical error of a pixel metric."""
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
        prediction: raw maps and scores of the test images.
        label: (N,) 1 = anomalous, in the same order.
        truth: their masks; None leaves pixel metrics out: they are not available.
        protocol: resolved, no field left to method or backbone.
        own_score: keep the method's own image score where it gives one; False reduces the map for every method.
        sample_id: (N,) the objects shown; those of several images get metrics of their own. None: no such metrics.

    Raises:
        MetricError: one-class test set, scores that are not finite, no defective pixel.
    """
    maps = torch.from_numpy(np.array(prediction.anomaly_maps))
    if len(maps) != len(label):
        raise ValueError(f"{len(maps)} predictions for {len(label)} test images")
    scores, reduction = prediction.image_scores if own_score else None, protocol.score_reduction
    assert reduction != "method"

    def chunks() -> Iterator[Tensor]:
        for start in range(0, len(maps), CHUNK):
            yield full_resolution(maps[start : start + CHUNK], protocol.image_size, float(protocol.smoothing))

    def chunks_with_truth(truth: Truth) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
        for number, rows in enumerate(chunks()):
            regions = truth.regions(number * CHUNK, number * CHUNK + len(rows))
            yield rows, regions != 0, regions

    if scores is None:
        scores = torch.cat([reduce_maps(rows, reduction) for rows in chunks()]).numpy()
    counted = count_labels(label, truth, protocol)
    metrics = image_metrics(scores, counted)
    if sample_id is not None:
        metrics |= sample_metrics(scores, counted, sample_id)
    bounds: dict[str, float] = {}
    if truth is not None:
        pixel = PixelMetrics(aupro_limit=protocol.aupro_limit)
        for batch in chunks_with_truth(truth):
            pixel.update(*batch)
        for name, value in pixel.compute(replay=lambda: chunks_with_truth(truth)).items():
            (bounds if name.endswith("_bound") else metrics)[name.removesuffix("_bound")] = value
    return Evaluation(metrics=metrics, bounds=bounds, image_scores=scores, label=counted)


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


def sample_metrics(image_scores: np.ndarray, label: np.ndarray, sample_id: Sequence[str]) -> dict[str, float]:
    """`sample_auroc`, for objects that are seen in several images (Real-IAD, arXiv 2403.12580).

    An object is scored by the highest of its views and anomalous when any of them is.

    Args:
        image_scores: (N,) higher = more anomalous.
        label: (N,) 1 = anomalous.
        sample_id: (N,) the object that an image shows.

    Returns:
        The metric in [0, 1]; nothing where every object is seen once, or where all objects are of one class.
    """
    samples, place = np.unique(np.array(sample_id), return_inverse=True)
    score = np.full(len(samples), -np.inf, dtype=np.asarray(image_scores).dtype)
    np.maximum.at(score, place, image_scores)
    anomalous = np.zeros(len(samples), dtype=np.int64)
    np.maximum.at(anomalous, place, label)
    if len(samples) == len(label) or anomalous.min() == anomalous.max():
        return {}
    return {"sample_auroc": image_metrics(score, anomalous)["image_auroc"]}
