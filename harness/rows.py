"""Result rows: what every row says about how its number came about."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import platform
import socket
import subprocess
import traceback
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.contracts import Cell, EvaluationProtocol, ResultRow, RowStatus, RunSettings, Trial, Tuned
from harness.evaluate import Evaluation
from harness.identity import protocol_id
from harness.metrics import METRIC_VERSION
from harness.registry import method_version
from harness.resolve import CategoryData, ResolvedTrial

RESCORED = "rescored"
"""Stamp of a row that was computed from stored maps; its costs are those of the first time."""
PACKAGES = ("torch", "timm", "ray", "numpy", "scikit-learn", "pillow", "pyarrow")


def finished_row(
    resolved: ResolvedTrial,
    cell: Cell,
    data: CategoryData,
    evaluation: Evaluation,
    facts: Mapping[str, Any],
    costs: Mapping[str, float],
    rescored: bool,
    settings: RunSettings,
) -> ResultRow:
    """The row of a cell that was scored; `facts` are those of its prediction, `costs` all that were measured."""
    stamps = []
    if resolved.trial.weights == "random":
        stamps.append("random weights")
    if rescored:
        stamps.append(RESCORED)
    if resolved.trial.trained is not None:
        stamps += resolved.trial.trained.stamps
    if resolved.protocol.selection == "test_best":
        stamps.append("state picked on test data")
    stamps += facts.get("warnings", [])
    protocol = _plain_resolved(resolved.trial.protocol, resolved.protocol, facts)
    row, trained = _row(resolved.trial, cell, "ok", settings), resolved.trial.trained
    return dataclasses.replace(
        row,
        resolved_protocol=protocol,
        metrics=evaluation.metrics,
        metric_bounds=evaluation.bounds,
        costs=costs,
        curves={name: tuple(losses) for name, losses in facts.get("curves", {}).items()},
        stamps=(*stamps, *row.stamps),
        provenance={
            **row.provenance,
            **{key: str(facts[key]) for key in ("device", "device_name") if facts.get(key)},
            "method_version": str(method_version(resolved.trial.method)),
            "metric_version": str(METRIC_VERSION),
            "weights_fingerprint": resolved.weights_id,
            **({"representation_artifact": trained.artifact_id} if trained is not None else {}),
            "images_fingerprint": data.images_id,
            "truth_fingerprint": data.truth_id,
        },
    )


def scored_row(
    row: ResultRow,
    cell_id: str,
    evaluation: Evaluation,
    facts: Mapping[str, Any],
    asked: EvaluationProtocol,
    resolved: EvaluationProtocol,
    costs: Mapping[str, float],
    command: str,
    run_id: str,
) -> ResultRow:
    """A finished row scored once more, from its stored prediction with `facts`, under a protocol as asked for."""
    return dataclasses.replace(
        row,
        cell_id=cell_id,
        protocol=_plain(asked),
        protocol_id=protocol_id(asked),
        resolved_protocol=_plain_resolved(asked, resolved, facts),
        metrics=evaluation.metrics,
        metric_bounds=evaluation.bounds,
        costs=costs,
        stamps=row.stamps if RESCORED in row.stamps else (*row.stamps, RESCORED),
        provenance={
            **row.provenance,
            **software_facts(),
            "metric_version": str(METRIC_VERSION),
            "command": command,
            "run_id": run_id,
            "host": socket.gethostname(),
            "finished_at": dt.datetime.now(dt.UTC).isoformat(timespec="microseconds"),
        },
    )


def unfinished_row(
    trial: Trial, cell: Cell, status: RowStatus, error: BaseException | str, settings: RunSettings
) -> ResultRow:
    """A row with a reason instead of a number."""
    row = _row(trial, cell, status, settings)
    if isinstance(error, str):
        return dataclasses.replace(row, reason=error)
    text = "".join(traceback.format_exception(error))
    return dataclasses.replace(row, reason=f"{type(error).__name__}: {error}", traceback=text)


def _row(trial: Trial, cell: Cell, status: RowStatus, settings: RunSettings) -> ResultRow:
    return ResultRow(
        cell_id=cell.cell_id,
        prediction_id=cell.prediction_id,
        trial_id=trial.trial_id,
        status=status,
        method=trial.method,
        backbone=trial.backbone,
        layers=trial.layers,
        representation=trial.representation,
        dataset=trial.dataset.name,
        category=cell.category,
        shots=trial.shots,
        seed=trial.seed,
        params=dict(trial.params),
        protocol=_plain(trial.protocol),
        protocol_id=protocol_id(trial.protocol),
        provenance={
            **software_facts(),
            "command": settings.command,
            "run_id": settings.run_id,
            "invocation": settings.invocation,
            "host": socket.gethostname(),
            "finished_at": dt.datetime.now(dt.UTC).isoformat(timespec="microseconds"),
        },
        stamps=_tuning_stamps(trial.tuned),
        tuned=_plain_tuned(trial.tuned),
    )


def show_row(row: ResultRow, trial_id: str, tuned: Tuned | None) -> ResultRow:
    """A stored row as a run shows it: as part of one of its own trials, and with what that has to do with tuning.

    Rows are shared by all runs that come to the same cell, and it is each run's own affair how it came to its
    configuration.
    """
    kept = tuple(stamp for stamp in row.stamps if not stamp.startswith(_TUNED_STAMPS))
    return dataclasses.replace(
        row,
        trial_id=trial_id,
        stamps=(*kept, *_tuning_stamps(tuned)),
        tuned=_plain_tuned(tuned),
    )


_TUNED_STAMPS = ("tuned on ", "TUNED ON TEST DATA")


def _plain_tuned(tuned: Tuned | None) -> dict[str, Any]:
    return {} if tuned is None else _plain(tuned)


def _tuning_stamps(tuned: Tuned | None) -> tuple[str, ...]:
    if tuned is None or (tuned.is_sample and not tuned.on_test):
        return ()
    cells = ", ".join(tuned.cells)
    return (f"TUNED ON TEST DATA: {cells}" if tuned.on_test else f"tuned on {cells}",)


def _plain_resolved(
    asked: EvaluationProtocol, resolved: EvaluationProtocol, facts: Mapping[str, Any]
) -> dict[str, Any]:
    protocol = _plain(resolved)
    if facts.get("own_image_score") and asked.score_reduction == "method":
        protocol["score_reduction"] = "the method's own"
    return protocol


def _plain(record: EvaluationProtocol | Tuned) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(record).items()
    }


@functools.cache
def software_facts() -> dict[str, str]:
    """Versions of this program and of the packages that numbers depend on, and the commit of a checkout."""
    versions = {}
    for package in ("adgrid", *PACKAGES):
        try:
            versions[f"{package}_version"] = version(package)
        except PackageNotFoundError:
            versions[f"{package}_version"] = "not installed"
    return {**versions, "python_version": platform.python_version(), "git_commit": _git_commit()}


def _git_commit() -> str:
    """Commit of the checkout the code runs from, with `+changes` if it is not clean; empty for an installed wheel."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        # A wheel installed inside somebody else's checkout must not take that checkout's commit for its own.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
