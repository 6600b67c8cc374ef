"""What the HTML report holds of each cell: ROC curve, score histogram, pixel curves, and pictures within a budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from harness.bundle import ImageScores
from harness.contracts import ResultRow
from harness.details import NUM_PICTURES
from harness.intervals import Estimate, add_variances, delong, mean_over_seeds

NUM_BINS = 32
_FEW_CELLS = 300
"""Up to here curves have many points."""


def draw_roc(scores: ImageScores, num_points: int) -> dict[str, Any]:
    """The ROC curve of image scores in counts, as thresholds fall.

    Args:
        scores: of one cell.
        num_points: about how many points are kept; the one of the best F1 always is.

    Returns:
        `threshold` (an image is called anomalous from here on), `false` and `true` positives at it; `best`, the place
        of the best F1; `normal` and `anomalous`, how many there are.
    """
    order = np.argsort(-scores.score, kind="stable")
    score, label = scores.score[order], scores.label[order]
    last = np.flatnonzero(np.diff(score, append=-np.inf))
    true, false = np.cumsum(label == 1)[last], np.cumsum(label == 0)[last]
    num_anomalous, num_normal = int(true[-1]), int(false[-1])
    best = int(np.argmax(2 * true / (true + false + num_anomalous)))
    length = np.cumsum(
        np.diff(true, prepend=0) / max(num_anomalous, 1) + np.diff(false, prepend=0) / max(num_normal, 1)
    )
    chosen = np.searchsorted(length, np.linspace(0, length[-1], num_points)).clip(max=len(length) - 1)
    chosen = np.union1d(chosen, best)
    return {
        "threshold": [float(f"{value:.5g}") for value in score[last][chosen]],
        "false": false[chosen].tolist(),
        "true": true[chosen].tolist(),
        "best": int(np.searchsorted(chosen, best)),
        "normal": num_normal,
        "anomalous": num_anomalous,
    }


def count_scores(scores: ImageScores) -> dict[str, Any]:
    """How many normal and anomalous images have scores in each of equal ranges from `low` to `high`."""
    low, high = float(scores.score.min()), float(scores.score.max())
    edges = np.linspace(low, high if high > low else low + 1, NUM_BINS + 1)
    normal, anomalous = (np.histogram(scores.score[scores.label == kind], edges)[0].tolist() for kind in (0, 1))
    return {"low": edges[0], "high": edges[-1], "normal": normal, "anomalous": anomalous}


def describe_cells(
    rows: Sequence[ResultRow],
    scores: Mapping[str, ImageScores],
    details: Callable[[str], Mapping[str, Any]],
    picture_bytes: int,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every finished cell for the page, and the photos that its pictures name.

    Args:
        rows: those of the report.
        scores: by cell id; cells without have no ROC curve.
        details: those of a cell by its id, as `harness.details.load_details` gives them; asked for one at a time, and
            once more for cells that get pictures, since those of all cells need not fit into memory.
        picture_bytes: room for photos and heat maps. Each cell gets its worst mistake before any gets a second.

    Returns:
        One record per finished row, in their order, and photos in base64 by id.
    """
    finished = [row for row in rows if row.status == "ok"]
    points = 160 if len(finished) <= _FEW_CELLS else 60
    records: list[dict[str, Any]] = []
    sizes: list[list[list[_Size]]] = []
    for row in finished:
        found, known = scores.get(row.cell_id), details(row.cell_id)
        sizes.append([[_measure(picture) for picture in kind] for kind in _by_kind(known)])
        records.append(
            {
                "id": row.cell_id,
                "category": row.category,
                "seed": row.seed,
                "metrics": {name: round(value, 6) for name, value in row.metrics.items()},
                "bounds": {name: float(f"{value:.1e}") for name, value in row.metric_bounds.items()},
                "costs": dict(row.costs),
                "layers": list(row.layers),
                "params": dict(row.params),
                "stamps": list(row.stamps),
                "roc": None if found is None else draw_roc(found, points),
                "histogram": None if found is None else count_scores(found),
                "curves": _thin(known.get("curves") or {}, points // 2),
                "pictures": [],
            }
        )
    photos: dict[str, str] = {}
    for record, chosen in zip(records, _choose_pictures(sizes, picture_bytes), strict=True):
        kinds = _by_kind(details(record["id"])) if chosen else []
        for kind, rank in chosen:
            picture = kinds[kind][rank]
            photos[picture["id"]] = picture["photo"]
            record["pictures"].append({name: value for name, value in picture.items() if name != "photo"})
    return records, photos


def _thin(curves: Mapping[str, Sequence[float]], num_points: int) -> dict[str, list[float]]:
    if not curves:
        return {}
    length = len(next(iter(curves.values())))
    chosen = np.unique(np.linspace(0, length - 1, min(num_points, length)).round().astype(int))
    return {name: [round(values[place], 4) for place in chosen] for name, values in curves.items()}


class _Size(NamedTuple):
    """What a picture takes in the page."""

    photo_id: str
    photo: int
    """Bytes, unless another picture has the same photo."""
    own: int


def _measure(picture: Mapping[str, Any]) -> _Size:
    return _Size(picture["id"], len(picture["photo"]), len(picture["heat"]) + len(picture.get("mask", "")))


def _by_kind(details: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
    """The pictures of anomalous images and of normal ones, the worst first."""
    return [[picture for picture in details.get("pictures", ()) if picture["label"] == label] for label in (1, 0)]


def _choose_pictures(sizes: Sequence[Sequence[Sequence[_Size]]], room: int) -> list[list[tuple[int, int]]]:
    """Which pictures of which cell fit: each cell's worst mistakes before any gets a second.

    Args:
        sizes: of every cell's pictures by kind and rank.
        room: bytes for all of them; equal photos are kept once.

    Returns:
        (kind, rank) of those that each cell gets.
    """
    chosen: list[list[tuple[int, int]]] = [[] for _ in sizes]
    photos: set[str] = set()
    for rank, (place, kinds) in itertools.product(range(NUM_PICTURES), enumerate(sizes)):
        for kind, pictures in enumerate(kinds):
            if rank >= len(pictures):
                continue
            size = pictures[rank]
            needed = size.own + (0 if size.photo_id in photos else size.photo)
            if needed <= room:
                room -= needed
                photos.add(size.photo_id)
                chosen[place].append((kind, rank))
    return chosen


class Intervals:
    """95 % intervals of mean image AUROCs over test images (DeLong) and, where there are several, seeds."""

    def __init__(self, scores: Mapping[str, ImageScores]) -> None:
        """Args: scores, by cell id."""
        self._scores = scores
        self._known: dict[tuple[str, ...], Estimate] = {}

    def of(self, rows: Sequence[ResultRow]) -> tuple[float, float] | None:
        """The interval of a mean over categories, then seeds.

        Args:
            rows: of one line of a matrix on one dataset, all finished: every category with every seed.

        Returns:
            Its ends in [0, 1]; None where scores are missing or some category shows no variance.
        """
        categories: dict[str, list[ResultRow]] = {}
        per_seed: dict[int, list[float]] = {}
        for row in rows:
            categories.setdefault(row.category, []).append(row)
            per_seed.setdefault(row.seed, []).append(row.metrics["image_auroc"])
        parts = []
        for members in categories.values():
            part = self._over_images(members)
            if part.variance is None:
                return None
            parts.append(Estimate(part.value, part.variance / len(categories) ** 2, part.dof))
        means = [float(np.mean(values)) for values in per_seed.values()]
        value = float(np.mean(means))
        ends = add_variances(value, [add_variances(value, parts), mean_over_seeds(means)]).interval(0.95)
        return None if ends is None else (max(ends[0], 0.0), min(ends[1], 1.0))

    def _over_images(self, rows: Sequence[ResultRow]) -> Estimate:
        """The mean over seeds on the images of one category; they are drawn for all seeds at once."""
        key = tuple(row.cell_id for row in rows)
        if key not in self._known:
            found = [self._scores.get(cell_id) for cell_id in key]
            first = found[0]
            aligned = [None if one is None or first is None else one.reorder(first.images) for one in found]
            known = [
                one for one in aligned if one is not None and first is not None and (one.label == first.label).all()
            ]
            self._known[key] = Estimate(0.0)
            if first is not None and len(known) == len(rows):
                stacked = np.stack([one.score for one in known])
                self._known[key] = delong(stacked, first.label, np.full(len(known), 1 / len(known)))
        return self._known[key]
