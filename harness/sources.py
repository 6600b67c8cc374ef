"""Finds the rows that a command names: a run id, a run folder, a storage root or a run in MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.bundle import SCORES_FILE, ImageScores, load_image_scores, scores_from_parquet
from harness.contracts import AdgridError, ResultRow
from harness.matching import AXES, axis_value
from harness.registry import suggest
from harness.run_folder import find_run, open_store
from harness.store import Store


@dataclass(frozen=True)
class Source:
    """The rows of one run or of a whole root, and where their image scores are."""

    name: str
    rows: tuple[ResultRow, ...]
    scores: Mapping[str, ImageScores]
    """Those at hand, by cell id."""
    store: Store | None = None
    """Where the others are."""

    def load_scores(self, cell_id: str) -> ImageScores | None:
        """Image scores of one cell, or None."""
        if cell_id in self.scores:
            return self.scores[cell_id]
        return None if self.store is None else load_image_scores(self.store, cell_id)


def load_any_scores(sources: Iterable[Source], cell_id: str) -> ImageScores | None:
    """Image scores of one cell from whichever source has them; equal ids mean equal scores."""
    listed = list(sources)
    for source in listed:
        if cell_id in source.scores:
            return source.scores[cell_id]
    for source in listed:
        found = source.load_scores(cell_id)
        if found is not None:
            return found
    return None


def open_run(word: str, root: str, tracking_uri: str | None = None) -> Source:
    """The rows of one run.

    Args:
        word: the id of a run below `root`, a run folder (`results/runs/NAME`), or `mlflow:RUN` (also `runs:/RUN`).
        root: storage root of runs named by their id.
        tracking_uri: where a run of MLflow is; None for the SQLite file below `root`.

    Raises:
        AdgridError: no such run, or MLflow cannot be reached.
    """
    for prefix in ("mlflow:", "runs:/"):
        if word.startswith(prefix):
            return _open_mirrored(word.removeprefix(prefix).strip("/"), root, tracking_uri)
    store, record = find_run(word, root)
    try:
        scores = scores_from_parquet(store.read(f"runs/{record.run_id}/report/{SCORES_FILE}"))
    except FileNotFoundError:
        scores = {}
    return Source(record.run_id, record.rows, scores, store)


def open_any(word: str, root: str, tracking_uri: str | None = None) -> Source:
    """As `open_run`, and a storage root stands for all rows in it."""
    if not word.startswith(("mlflow:", "runs:/")) and "/runs/" not in word and ("://" in word or Path(word).is_dir()):
        store = open_store(word)
        rows = store.load_rows()
        if not rows:
            raise AdgridError(f"{word}: no rows there; name a storage root such as results, a run folder or a run id")
        return Source(word, tuple(rows.values()), {}, store)
    return open_run(word, root, tracking_uri)


def open_experiment(tracking_uri: str | None, experiment: str, root: str) -> list[Source]:
    """Every run of an experiment of MLflow. Raises AdgridError where there is none or MLflow cannot be reached."""
    from harness.mirrored import read_mirrored_experiment

    runs = read_mirrored_experiment(tracking_uri or _default_uri(root), experiment)
    return [Source(run.name, run.rows, run.scores) for run in runs]


def name_apart(sources: Sequence[Source]) -> dict[str, Source]:
    """Sources by name; a name that occurs again gets a number."""
    named: dict[str, Source] = {}
    for source in sources:
        number = 2
        name = source.name
        while name in named:
            name, number = f"{source.name} ({number})", number + 1
        named[name] = source
    return named


def _open_mirrored(run: str, root: str, tracking_uri: str | None) -> Source:
    # Imported here: who compares runs on disk does not wait for MLflow.
    from harness.mirrored import read_mirrored_run

    found = read_mirrored_run(tracking_uri or _default_uri(root), run)
    return Source(found.name, found.rows, found.scores)


def _default_uri(root: str) -> str:
    database = None if "://" in root else Path(root).expanduser().resolve() / "mlflow.db"
    if database is None or not database.is_file():
        raise AdgridError(f"there is no mlflow.db below --root {root}; name the server with --tracking-uri")
    return f"sqlite:///{database}"


# --- narrowing -------------------------------------------------------------------------------------------------

FILTERS = ("method", "backbone", "representation", "layers", "shots", "seed", "dataset", "category", "protocol_id")


def parse_conditions(texts: Sequence[str]) -> dict[str, set[str]]:
    """`axis=value[,value]` texts; a row must agree with every one. Raises AdgridError on an unknown axis."""
    conditions: dict[str, set[str]] = {}
    for text in texts:
        axis, sign, values = text.partition("=")
        if not sign or not values:
            raise AdgridError(f"--where {text}: write axis=value, such as method=patchcore or dataset=mvtec_ad,visa")
        if axis not in FILTERS and not axis.startswith("params."):
            raise AdgridError(f"--where {text}: unknown axis{suggest(axis, (*FILTERS, 'params.<field>'))}")
        conditions.setdefault(axis, set()).update(value.strip() for value in values.split(","))
    return conditions


def keep_rows(rows: Sequence[ResultRow], conditions: dict[str, set[str]]) -> list[ResultRow]:
    """The rows that agree with every condition, in order. Raises AdgridError where a condition leaves none."""
    kept = list(rows)
    for axis, wanted in conditions.items():
        known = dict.fromkeys(_text(row, axis) for row in kept)
        kept = [row for row in kept if _text(row, axis) in wanted]
        if not kept:
            raise AdgridError(
                f"--where {axis}={','.join(sorted(wanted))}: no such rows; they have {', '.join(list(known)[:20])}"
            )
    return kept


def _text(row: ResultRow, axis: str) -> str:
    value = axis_value(row, axis) if axis in AXES or axis.startswith("params.") else str(getattr(row, axis))
    return "none" if value is None else value
