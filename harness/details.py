"""What the HTML report shows of a cell beside its number: curves, and small pictures of what was missed or raised.

The worker keeps them beside each row, where images and maps are at hand; a report makes those that are missing.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from harness.contracts import AdgridError, EvaluationProtocol, ResultRow, Sample
from harness.datasets.images import load_image, load_mask
from harness.evaluate import Evaluation, evaluate, stored_samples
from harness.figures import heat_layer, heat_limits
from harness.maps import full_resolution
from harness.metrics import MetricError
from harness.sheets import preprocessing_of
from harness.store import Store, StoredPrediction
from harness.truth import load_truth

NUM_PICTURES = 6
"""Of anomalous images with the lowest scores, and as many of normal ones with the highest."""
SIDE, HEAT_SIDE = 176, 88
"""Longer side in pixels of a photo and its mask, and of a heat map."""


def details_key(cell_id: str) -> str:
    """Where the details of a cell lie in a store."""
    return f"details/{cell_id}.json"


def publish_details(
    store: Store,
    row: ResultRow,
    prediction: StoredPrediction,
    test: Sequence[Sample],
    result: Evaluation,
    with_pictures: bool,
) -> None:
    """Saves the curves of one cell and, where asked, its pictures.

    Args:
        store: where to.
        row: the finished cell.
        prediction: its maps, in the order of `test`.
        test: the test images.
        result: their scores and labels as they were counted.
        with_pictures: False for curves alone.
    """
    pictures = _draw_pictures(row, prediction, test, result) if with_pictures else []
    details = {"curves": result.curves, "pictures": pictures}
    store.publish(details_key(row.cell_id), json.dumps(details, separators=(",", ":")).encode())


def load_details(store: Store, cell_id: str) -> dict[str, Any]:
    """`curves`, see `Evaluation.curves`, and `pictures`; both empty where nothing was kept.

    A picture has `name`, `label` (as counted), `defect`, `score`, `id` (of the photo: equal for equal photos), and the
    bytes of WebP files in base64: `photo`, `heat` (RGBA) and, where there is a mask, `mask` (RGBA outline).
    """
    try:
        details = json.loads(store.read(details_key(cell_id)))
    except (FileNotFoundError, ValueError):
        return {"curves": {}, "pictures": []}
    return dict(details)


def remake_details(store: Store, rows: Sequence[ResultRow], cache_dir: str) -> list[str]:
    """Makes the missing details of finished rows from stored predictions.

    Returns:
        Notes on cells for which that is not possible here: maps not kept, or images on another machine.
    """
    notes = []
    kept = set(store.names("details"))
    for row in rows:
        if row.status != "ok" or details_key(row.cell_id).removeprefix("details/") in kept:
            continue
        name = f"{row.method} on {row.dataset}/{row.category}"
        prediction, columns = store.load_prediction(row.prediction_id), store.load_scores(row.cell_id)
        if prediction is None or columns is None:
            notes.append(f"no curves and pictures of {name}: its anomaly maps were not kept")
            continue
        test = stored_samples(columns, row.category)
        try:
            result = score_again(row, prediction, test, evaluation_protocol(row), cache_dir)
            publish_details(store, row, prediction, test, result, with_pictures=True)
        except (OSError, AdgridError, MetricError) as error:
            notes.append(f"no curves and pictures of {name}: {error}")
    return notes


def evaluation_protocol(row: ResultRow) -> EvaluationProtocol:
    """The protocol of a finished row, no field left open; an image score of the method's own is `max` here."""
    fields = dict(row.resolved_protocol)
    if fields["score_reduction"] == "the method's own":
        fields["score_reduction"] = "max"
    return EvaluationProtocol(**{**fields, "image_size": tuple(fields["image_size"])})


def score_again(
    row: ResultRow,
    prediction: StoredPrediction,
    test: Sequence[Sample],
    protocol: EvaluationProtocol,
    cache_dir: str,
) -> Evaluation:
    """Evaluates stored maps of a finished row; masks come from the cache or from beside the images.

    Args:
        row: says which masks its number came from, and whether there are any.
        prediction: its maps, in the order of `test`.
        test: the test images.
        protocol: no field left open.
        cache_dir: node-local cache.
    """
    truth = None
    if "pixel_auroc" in row.metrics:
        truth_id = row.provenance["truth_fingerprint"]
        truth = load_truth(test, truth_id, preprocessing_of(row), cache_dir)
    own_score = row.protocol["score_reduction"] == "method"
    labels, sample_ids = [sample.label for sample in test], [sample.sample_id for sample in test]
    return evaluate(prediction, labels, truth, protocol, own_score, sample_ids)


def pick_mistakes(scores: np.ndarray, label: np.ndarray, num: int = NUM_PICTURES) -> list[int]:
    """Positions of the anomalous images with the lowest scores, then of the normal ones with the highest.

    Args:
        scores: (N,) higher = more anomalous.
        label: (N,) 1 = anomalous.
        num: of each.
    """
    order = np.argsort(scores, kind="stable")
    missed, raised = order[label[order] == 1][:num], order[label[order] == 0][::-1][:num]
    return [int(place) for place in (*missed, *raised)]


def _draw_pictures(
    row: ResultRow, prediction: StoredPrediction, test: Sequence[Sample], result: Evaluation
) -> list[dict[str, Any]]:
    preprocessing, smoothing = preprocessing_of(row), float(row.resolved_protocol["smoothing"])
    chosen = pick_mistakes(result.image_scores, result.label)
    maps = full_resolution(torch.from_numpy(prediction.anomaly_maps[chosen]), preprocessing.image_size, smoothing)
    limits = heat_limits(list(maps.numpy()))
    pictures = []
    for position, anomaly_map in zip(chosen, maps, strict=True):
        sample = test[position]
        pixels = load_image(sample.path, preprocessing).transpose(1, 2, 0)
        photo = _shrink(Image.fromarray(pixels), SIDE)
        small = _shrink(Image.fromarray(anomaly_map.numpy()), HEAT_SIDE)
        picture = {
            "name": "/".join(sample.path.replace("\\", "/").split("/")[-2:]),
            "label": int(result.label[position]),
            "defect": sample.defect_type,
            "score": float(result.image_scores[position]),
            "id": hashlib.sha256(photo.tobytes()).hexdigest()[:12],
            "photo": _pack(photo, quality=62),
            "heat": _pack(Image.fromarray(heat_layer(np.asarray(small), limits)), quality=50),
        }
        if sample.mask_path:
            mask = Image.fromarray(np.uint8(255) * (load_mask(sample, preprocessing) != 0))
            picture["mask"] = _pack(_outline(np.asarray(mask.resize(photo.size, Image.Resampling.BOX)) > 127))
        pictures.append(picture)
    return pictures


def _shrink(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.LANCZOS if image.mode == "RGB" else Image.Resampling.BILINEAR)


def _outline(mask: np.ndarray) -> Image.Image:
    """A white line around a mask with a dark one beside it, clear elsewhere."""
    line = mask & ~ndimage.binary_erosion(mask)
    shadow = ndimage.binary_dilation(mask) & ~mask
    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[shadow], layer[line] = (0, 0, 0, 150), (255, 255, 255, 255)
    return Image.fromarray(layer)


def _pack(image: Image.Image, quality: int | None = None) -> str:
    """A WebP file in base64; lossless without a quality."""
    packed = io.BytesIO()
    image.save(packed, "webp", lossless=quality is None, quality=80 if quality is None else quality, method=3)
    return base64.b64encode(packed.getvalue()).decode()
