"""The rows of a run and the image scores behind them as two files, so that results travel without their store.

    rows.parquet            every row, complete
    image_scores.parquet    cell_id, image, label, image_score: one line per test image of every finished cell

Both lie in the report folder and are mirrored with it, so runs can be compared from an MLflow server alone.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from harness.contracts import ResultRow
from harness.row_files import rows_from_parquet, rows_to_parquet, table_to_parquet
from harness.store import Store

ROWS_FILE, SCORES_FILE = "rows.parquet", "image_scores.parquet"

_SCHEMA = pa.schema(
    [
        ("cell_id", pa.dictionary(pa.int32(), pa.string())),
        ("image", pa.string()),
        ("label", pa.int8()),
        ("image_score", pa.float64()),
    ]
)


@dataclass(frozen=True, eq=False)
class ImageScores:
    """What one cell said of every test image."""

    images: tuple[str, ...]
    """Paths below the folder that holds all test images of the category, so that they agree between machines."""
    label: np.ndarray
    """(N,) 0 normal, 1 anomalous, as they were counted."""
    score: np.ndarray
    """(N,) float64, higher = more anomalous."""

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[Any]]) -> ImageScores:
        """From the columns of `Store.load_scores`."""
        folder = os.path.commonpath([os.path.dirname(path) for path in columns["path"]])
        images = tuple(path[len(folder) :].lstrip("/") for path in columns["path"])
        return cls(images, np.array(columns["label"]), np.array(columns["image_score"], dtype=np.float64))

    def reorder(self, images: Sequence[str]) -> ImageScores | None:
        """The same scores in the order of other images, or None where they are not the same images."""
        if tuple(images) == self.images:
            return self
        places = {image: place for place, image in enumerate(self.images)}
        if len(places) != len(self.images) or places.keys() != set(images) or len(images) != len(places):
            return None
        order = [places[image] for image in images]
        return ImageScores(tuple(images), self.label[order], self.score[order])


def write_bundle(store: Store, run_id: str, rows: Sequence[ResultRow], folder: str | Path) -> list[Path]:
    """Writes the two files of a run into `folder` and returns them.

    The scores of cells that an earlier bundle of the run holds come from there, which is one file instead of one per
    cell.
    """
    try:
        known = scores_from_parquet(store.read(f"runs/{run_id}/report/{SCORES_FILE}"))
    except (FileNotFoundError, pa.ArrowInvalid):
        known = {}
    scores = {}
    for row in rows:
        if row.status == "ok":
            found = known.get(row.cell_id) or load_image_scores(store, row.cell_id)
            if found is not None:
                scores[row.cell_id] = found
    files = [Path(folder) / ROWS_FILE, Path(folder) / SCORES_FILE]
    for file, data in zip(files, (rows_to_parquet(rows), scores_to_parquet(scores)), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return files


def read_bundle(folder: str | Path) -> tuple[list[ResultRow], dict[str, ImageScores]]:
    """The rows of a bundle, and image scores by cell id. Raises FileNotFoundError where a file is not there."""
    rows = rows_from_parquet((Path(folder) / ROWS_FILE).read_bytes())
    return rows, scores_from_parquet((Path(folder) / SCORES_FILE).read_bytes())


def load_image_scores(store: Store, cell_id: str) -> ImageScores | None:
    """The image scores of one cell in a store, or None."""
    columns = store.load_scores(cell_id)
    return ImageScores.of(columns) if columns and columns["path"] else None


def scores_to_parquet(scores: Mapping[str, ImageScores]) -> bytes:
    """Image scores by cell id as the bytes of a Parquet file."""
    counts = [len(each.images) for each in scores.values()]
    cells = pa.DictionaryArray.from_arrays(
        pa.array(np.repeat(np.arange(len(counts), dtype=np.int32), counts)), pa.array(list(scores), pa.string())
    )
    labels = [each.label.astype(np.int8) for each in scores.values()]
    values = [each.score for each in scores.values()]
    columns = [
        cells,
        pa.array([image for each in scores.values() for image in each.images], pa.string()),
        pa.array(np.concatenate([np.zeros(0, np.int8), *labels])),
        pa.array(np.concatenate([np.zeros(0), *values])),
    ]
    return table_to_parquet(pa.table(columns, schema=_SCHEMA))


def scores_from_parquet(data: bytes) -> dict[str, ImageScores]:
    """The image scores of `scores_to_parquet`."""
    table = pq.read_table(io.BytesIO(data))
    images = table["image"].to_pylist()
    label, score = table["label"].to_numpy(), table["image_score"].to_numpy()
    cells = table["cell_id"].combine_chunks()
    if isinstance(cells, pa.ChunkedArray):  # what an empty column stays
        return {}
    names, codes = cells.dictionary.to_pylist(), cells.indices.to_numpy()
    starts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    return {
        names[codes[start]]: ImageScores(tuple(images[start:stop]), label[start:stop], score[start:stop])
        for start, stop in itertools.pairwise(starts)
        if stop > start
    }
