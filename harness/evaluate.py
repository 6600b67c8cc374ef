"""From raw predictions to metrics: resize and smooth the maps, reduce them to image scores, compare with the masks.

A fresh cell and one that is re-scored later both come through here, so their numbers agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from harness.contracts import EvaluationProtocol, Preprocessing, Sample
from harness.datasets.images import load_mask
from harness.maps import full_resolution, reduce_maps
from harness.metrics import PixelMetrics, image_metrics
from harness.store import StoredPrediction

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


def evaluate(
    prediction: StoredPrediction,
    test: tuple[Sample, ...],
    has_masks: bool,
    protocol: EvaluationProtocol,
    preprocessing: Preprocessing,
    own_score: bool,
) -> Evaluation:
    """Metrics of one category.

    Args:
        prediction: raw maps and scores in the order of `test`.
        test: the test images with their labels and masks.
        has_masks: False leaves pixel metrics out: they are not available.
        protocol: resolved, no field left to method or backbone.
        preprocessing: what was done to the images, so that masks follow.
        own_score: keep the method's own image score where it gives one; False reduces the map for every method.

    Raises:
        MetricError: one-class test set, scores that are not finite, no defective pixel.
        AdgridError: a mask that cannot be read or has another size than its image.
    """
    maps = torch.from_numpy(np.array(prediction.anomaly_maps))
    if len(maps) != len(test):
        raise ValueError(f"{len(maps)} predictions for {len(test)} test images")
    scores = prediction.image_scores if own_score else None
    masks = [torch.from_numpy(load_mask(sample, preprocessing)) for sample in test] if has_masks else []

    def chunks() -> Iterator[tuple[Tensor, Tensor | None]]:
        for start in range(0, len(maps), CHUNK):
            rows = full_resolution(maps[start : start + CHUNK], preprocessing.image_size, float(protocol.smoothing))
            yield rows, torch.stack(masks[start : start + CHUNK]) if has_masks else None

    pixel = PixelMetrics(aupro_limit=protocol.aupro_limit)
    reduced = []
    for rows, truth in chunks() if has_masks or scores is None else ():
        if truth is not None:
            pixel.update(rows, truth)
        if scores is None:
            reduced.append(reduce_maps(rows, protocol.score_reduction))  # type: ignore[arg-type]
    if scores is None:
        scores = torch.cat(reduced).numpy()
    metrics = image_metrics(scores, np.array([sample.label for sample in test]))
    bounds: dict[str, float] = {}
    if has_masks:
        for name, value in pixel.compute(replay=chunks).items():
            (bounds if name.endswith("_bound") else metrics)[name.removesuffix("_bound")] = value
    return Evaluation(metrics=metrics, bounds=bounds, image_scores=scores)
