"""The main job: a search space goes in; rows, matrices, pictures and MLflow runs come out."""

from __future__ import annotations

import dataclasses
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from harness.bundle import write_bundle
from harness.contracts import AdgridError, Job, Pretraining, ResultRow, RunSettings, Trial
from harness.identity import canonical_json
from harness.options import RunOptions
from harness.placement import check_placement
from harness.plan import Plan, make_plan
from harness.progress import Listener, ProgressBoard
from harness.report import rows_frame, write_report
from harness.sheets import sheet_key
from harness.space import load_space
from harness.store import Store
from harness.tracking import Mirror, TrackingUnavailable

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run left behind."""

    plan: Plan
    rows: tuple[ResultRow, ...]
    """One row per planned cell, in the order of the plan."""
    num_computed: int
    """Rows of this start; the others were there before."""
    run_folder: str
    """Path or URI of the run folder."""
    tracking_uri: str | None
    notes: tuple[str, ...]
    """What a person should be told beside the results."""

    @property
    def num_failed(self) -> int:
        """Planned cells without a number."""
        return len(self.plan.cell_ids) - sum(row.status == "ok" for row in self.rows)


def plan_run(space_path: str, options: RunOptions, console: Console) -> Plan:
    """Reads, checks and plans a space, with a note of what is being hashed."""
    space = load_space(space_path, options.overrides)
    with console.status("planning") as status:
        return make_plan(
            space,
            options.places,
            options.random_weights,
            lambda what, done, total: status.update(f"planning: {what}"),
            options.download,
        )


def execute(space_path: str, options: RunOptions, console: Console, command: str) -> Outcome:
    """Plans a space, runs what is missing, writes the report and mirrors everything to MLflow.

    Raises:
        AdgridError: bad input; nothing was started.
        KeyboardInterrupt: stopped by hand; every finished row is saved.
    """
    plan = plan_run(space_path, options, console)
    for warning in plan.warnings:
        console.print(f"[yellow]{escape(warning)}[/]", soft_wrap=True)
    if plan.missing and not options.skip_missing:
        lines = [f"  {item.kind} {item.name}: {item.reason}" for item in plan.missing]
        raise AdgridError("missing on this machine:\n" + "\n".join(lines) + "\n--skip-missing runs the rest")
    if not plan.trials:
        raise AdgridError(f"{space_path}: nothing can run, everything it names is missing")
    store = Store(options.root)
    settings = RunSettings(
        root=store.root,
        places=options.places,
        run_id=plan.run_id,
        command=command,
        invocation=uuid.uuid4().hex,
        cache_gib=options.cache_gib,
        save_fitted=options.save_fitted,
        pictures=options.pictures,
    )
    try:
        store.publish(f"runs/{plan.run_id}/space.json", canonical_json(plan.space.model_dump(mode="json")).encode())
        store.publish(f"runs/{plan.run_id}/plan.json", canonical_json(_plan_record(plan, command)).encode())
    except OSError as error:
        raise AdgridError(
            f"--root {options.root}: cannot be written ({error}); name a writable folder or URI"
        ) from error
    known = store.load_rows(plan.cell_ids)
    open_trials = [
        trial
        for trial in plan.trials
        if any(cell.cell_id not in known or known[cell.cell_id].status != "ok" for cell in trial.cells)
    ]
    tracker = _Tracker(options, store, plan)
    computed: list[ResultRow] = []
    if open_trials:
        done = sum(row.status == "ok" for row in known.values())
        needed = {trial.trained.artifact_id for trial in open_trials if trial.trained is not None}
        pretrainings = [
            one for one in plan.pretrainings if one.trial_id in needed and not store.has_state(one.trial_id)
        ]
        computed = _run_open_trials(
            open_trials, pretrainings, settings, options, console, len(plan.cell_ids), done, tracker
        )
    store.fold_rows()
    rows = store.load_rows(plan.cell_ids)
    ordered = tuple(rows[cell_id] for cell_id in plan.cell_ids if cell_id in rows)
    files = remake_report(
        store, plan.run_id, ordered, title=plan.space.name, command=command, expected=len(plan.cell_ids)
    )
    tracker.finish(ordered, files)
    return Outcome(
        plan=plan,
        rows=ordered,
        num_computed=len(computed),
        run_folder=f"{store.root}/runs/{plan.run_id}",
        tracking_uri=tracker.uri,
        notes=tuple(tracker.notes),
    )


def _run_open_trials(
    trials: Sequence[Trial],
    pretrainings: Sequence[Pretraining],
    settings: RunSettings,
    options: RunOptions,
    console: Console,
    num_cells: int,
    num_done: int,
    tracker: _Tracker,
) -> list[ResultRow]:
    # Imported here: a run that finds everything done never starts Ray, nor pays for importing it.
    from harness.sweep import connect, list_nodes, run_trials

    with ExitStack() as stack:
        with console.status("starting Ray"):
            stack.enter_context(connect(options.address, options.num_cpus))
        nodes = list_nodes()
        check_placement([*pretrainings, *trials], nodes)
        board = stack.enter_context(ProgressBoard(console, num_cells, num_done, len(trials) + len(pretrainings)))
        known = nodes if options.address is None else None
        return run_trials(trials, settings, [board, tracker], known, pretrainings)


def remake_report(
    store: Store, run_id: str, rows: Sequence[ResultRow], title: str, command: str, expected: int
) -> list[Path]:
    """Writes tables and pictures of a run into its folder and returns them as local files."""
    # As seen from the report's folder, whether on a file system or under a URI.
    drawn = {f"sheets/{name}" for name in store.names("sheets")}
    keys = {row.cell_id: sheet_key(row.cell_id) for row in rows}
    sheets = {cell_id: f"../../../{key}" for cell_id, key in keys.items() if key in drawn}
    folder = store.local_path(f"runs/{run_id}/report")
    temporary = folder or Path(tempfile.mkdtemp(prefix="adgrid-report-"))
    files = write_report(temporary, rows, title=title, command=command, expected_cells=expected, contact_sheets=sheets)
    files += write_bundle(store, run_id, rows, temporary)
    for file in files if folder is None else ():
        store.publish(f"runs/{run_id}/report/{file.relative_to(temporary)}", file.read_bytes())
    return files


def run_space(space: str | Path, *, quiet: bool = False, **options: object) -> pd.DataFrame:
    """Runs a search space and returns one row per cell, as `adgrid run` does.

    Args:
        space: path of the YAML file.
        quiet: show no progress.
        options: fields of `RunOptions`.
    """
    chosen = RunOptions(**options)  # type: ignore[arg-type]
    outcome = execute(str(space), chosen, Console(quiet=quiet), f"run_space({str(space)!r})")
    return rows_frame(outcome.rows)


def _plan_record(plan: Plan, command: str) -> dict[str, object]:
    return {"name": plan.space.name, "run_id": plan.run_id, "command": command, "cell_ids": plan.cell_ids}


class _Tracker(Listener):
    """Mirrors rows to MLflow while trials end; an unreachable server costs one note, never a result."""

    def __init__(self, options: RunOptions, store: Store, plan: Plan) -> None:
        self.notes: list[str] = []
        self.uri = default_tracking_uri(options, store)
        self._plan = plan
        self._rows: dict[str, ResultRow] = {}
        self._mirror: Mirror | None = None
        if self.uri is not None:
            self._try(lambda: self._open(str(self.uri), options.experiment))
            self._sync([], [], finished=False)  # an unreachable server is told before anything runs

    def _open(self, uri: str, experiment: str) -> None:
        self._mirror = Mirror(uri, experiment)

    def finished(self, trial: Trial, row: ResultRow) -> None:
        self._rows[row.cell_id] = row

    def ended(self, trial: Job) -> None:
        if isinstance(trial, Pretraining):
            return
        rows = [self._rows[cell.cell_id] for cell in trial.cells if cell.cell_id in self._rows]
        self._sync(rows, [], finished=False)

    def finish(self, rows: Sequence[ResultRow], files: Sequence[Path]) -> None:
        self._sync(rows, files, finished=True)

    def _sync(self, rows: Sequence[ResultRow], files: Sequence[Path], finished: bool) -> None:
        mirror = self._mirror
        if mirror is not None:
            plan = self._plan
            params = {"space": plan.space.name, "cells": str(len(plan.cell_ids))}
            self._try(
                lambda: mirror.sync(plan.space.name, plan.run_id, rows, files, params, finished, planned=plan.trials)
            )

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except TrackingUnavailable as error:
            self._mirror = None
            self.notes.append(f"MLflow: {error}; the rows are saved, and the same command mirrors them later")


def default_tracking_uri(options: RunOptions, store: Store) -> str | None:
    """The URI to mirror to: as told, else a SQLite file in a local root, else none."""
    if options.tracking_uri == "off":
        return None
    if options.tracking_uri is not None:
        return options.tracking_uri
    database = store.local_path("mlflow.db")
    return None if database is None else f"sqlite:///{database}"
