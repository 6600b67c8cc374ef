"""Is a run what it should be? Compares two stores cell by cell, and counts what must not be doubled."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from harness.contracts import ResultRow
from harness.run_folder import read_run
from harness.store import Store

ELASTIC_AUROC, ELASTIC_PAIRS = 1e-3, 2
"""Largest difference of AUROC and AUPRO where the number of workers changed, since rounding differs then; of image
AUROC also that of so many pairs of a normal and an anomalous image, of which small test sets have few."""


def compare_runs(expected: Store, found: Store, elastic: bool = False) -> list[str]:
    """In what the only run of a store differs from the same run in another store; nothing if it does not.

    Rows must be complete and finished. Metrics, loss curves and raw anomaly maps must be equal to the last bit; of
    trained methods, where the number of workers was free, AUROC and AUPRO to within `ELASTIC_AUROC`. That holds for
    trainings that do not enlarge rounding errors from step to step.
    """
    record, calm = (read_run(store, *store.folders("runs")) for store in (found, expected))
    rows, pinned = ({row.cell_id: row for row in one.rows} for one in (record, calm))
    problems = []
    if not record.num_expected == len(rows) == len(pinned) or rows.keys() != pinned.keys():
        problems.append(f"{len(rows)} rows of {record.num_expected} cells")
    for cell_id in rows.keys() & pinned.keys():
        problem = _compare(pinned[cell_id], rows[cell_id], expected, found, elastic)
        if problem:
            row = rows[cell_id]
            problems.append(f"{row.method} {row.dataset}/{row.category} seed {row.seed}: {problem}")
    return sorted(problems)


def _compare(pinned: ResultRow, row: ResultRow, expected: Store, found: Store, elastic: bool) -> str:
    if row.status != "ok":
        return f"{row.status}: {row.reason}"
    if row.metrics.keys() != pinned.metrics.keys():
        return f"has {', '.join(row.metrics)}, expected {', '.join(pinned.metrics)}"
    if elastic and pinned.curves:
        ranked = [name for name in pinned.metrics if name.endswith(("auroc", "aupro"))]
        off = {name: abs(row.metrics[name] - pinned.metrics[name]) for name in ranked}
        bounds = dict.fromkeys(off, ELASTIC_AUROC) | {"image_auroc": _elastic_image_auroc(expected, pinned)}
        return ", ".join(f"{name} is off by {value:.2g}" for name, value in off.items() if value > bounds[name])
    differing = [name for name, value in pinned.metrics.items() if row.metrics[name] != value]
    if differing:
        return ", ".join(f"{name} is {row.metrics[name]!r}, expected {pinned.metrics[name]!r}" for name in differing)
    if dict(row.curves) != dict(pinned.curves):
        return "its loss curves differ"
    maps = [store.load_prediction(row.prediction_id) for store in (expected, found)]
    if maps[0] is not None and maps[1] is not None:
        parts = [(one.maps.values, one.maps.remainder) for one in maps if one is not None]
        if not all(np.array_equal(a, b) for a, b in zip(*parts, strict=True)):
            return "its anomaly maps differ"
    return ""


def _elastic_image_auroc(store: Store, row: ResultRow) -> float:
    columns = store.load_scores(row.cell_id)
    labels = [] if columns is None else columns["label"]
    pairs = labels.count(0) * labels.count(1)
    return max(ELASTIC_AUROC, ELASTIC_PAIRS / pairs) if pairs else ELASTIC_AUROC


def count_finished(store: Store) -> dict[str, int]:
    """Cell id to the number of times it was finished, over all row files; the same row in two files counts once."""
    times: dict[str, set[str]] = defaultdict(set)
    for row in store.all_rows():
        if row.status == "ok":
            times[row.cell_id].add(row.provenance.get("finished_at", ""))
    return {cell_id: len(found) for cell_id, found in times.items()}
