"""Contact sheets: per cell, the most and the least anomalous test images with their heat maps.

The worker draws one beside each row, where images and maps are at hand; a report draws those that are missing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from harness.contracts import AdgridError, Preprocessing, ResultRow, Sample
from harness.datasets.images import load_image, load_mask
from harness.evaluate import stored_samples
from harness.figures import ScoredImage, draw_contact_sheet, pick_extremes
from harness.maps import full_resolution
from harness.store import Store, StoredPrediction

COLUMNS = 6
"""Images per row of a sheet."""


def sheet_key(cell_id: str) -> str:
    """Where the sheet of a cell lies in a store."""
    return f"sheets/{cell_id}.webp"


def preprocessing_of(row: ResultRow) -> Preprocessing:
    """What the backbone saw in a finished cell."""
    protocol = row.resolved_protocol
    height, width = protocol["image_size"]
    return Preprocessing(image_size=(height, width), resize=protocol["resize"], interpolation=protocol["interpolation"])


def publish_sheet(
    store: Store,
    row: ResultRow,
    prediction: StoredPrediction,
    test: Sequence[Sample],
    image_scores: Sequence[float] | np.ndarray,
    preprocessing: Preprocessing,
    smoothing: float,
) -> None:
    """Draws the sheet of one cell and saves it.

    Args:
        store: where to.
        row: the cell.
        prediction: raw maps in the order of `test`.
        test: the test images.
        image_scores: (N,) final scores in the same order.
        preprocessing: what the backbone saw; the sheet shows the same pixels.
        smoothing: sigma in pixels of the Gaussian over the maps, as evaluated.
    """
    high, low = pick_extremes(image_scores, COLUMNS)
    chosen = [*high, *low]
    maps = full_resolution(torch.from_numpy(prediction.anomaly_maps[chosen]), preprocessing.image_size, smoothing)
    items = [
        ScoredImage(
            image=load_image(test[position].path, preprocessing).transpose(1, 2, 0),
            anomaly_map=anomaly_map.numpy(),
            mask=load_mask(test[position], preprocessing) if test[position].mask_path else None,
            score=float(image_scores[position]),
            label=test[position].label,
            defect_type=test[position].defect_type,
            name=Path(test[position].path).name,
        )
        for position, anomaly_map in zip(chosen, maps, strict=True)
    ]
    title = f"{row.method} · {row.backbone or 'no backbone'} · {row.dataset}/{row.category}"
    drawn, packed = io.BytesIO(), io.BytesIO()
    draw_contact_sheet(items, drawn, title, columns=COLUMNS)
    # A tenth of the size of PNG: grids of ten thousand cells keep their sheets.
    Image.open(drawn).convert("RGB").save(packed, "webp", quality=82, method=2)
    store.publish(sheet_key(row.cell_id), packed.getvalue())


def remake_sheets(store: Store, rows: Sequence[ResultRow]) -> list[str]:
    """Draws the missing sheets of finished rows from stored predictions.

    Returns:
        Notes on cells whose sheet cannot be drawn here: maps not kept, or images on another machine.
    """
    notes = []
    for row in rows:
        if row.status != "ok" or store.exists(sheet_key(row.cell_id)):
            continue
        prediction, scores = store.load_prediction(row.prediction_id), store.load_scores(row.cell_id)
        name = f"{row.method} on {row.dataset}/{row.category}"
        if prediction is None or scores is None:
            notes.append(f"no picture of {name}: its anomaly maps were not kept")
            continue
        test, preprocessing = stored_samples(scores, row.category), preprocessing_of(row)
        try:
            publish_sheet(
                store,
                row,
                prediction,
                test,
                scores["image_score"],
                preprocessing,
                float(row.resolved_protocol["smoothing"]),
            )
        except (OSError, AdgridError) as error:
            notes.append(f"no picture of {name}: {error}")
    return notes
