"""Mirrors a run to MLflow while it goes on, beside the thread that feeds the workers.

A server that is slow, or slower than many fast workers, delays nothing: what it has not yet got waits, the rows are on
disk anyway, and the end of the run brings it up to date. One that cannot be reached costs one note, never a result.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from harness.contracts import Job, Pretraining, ResultRow, Trial
from harness.notes import Loss
from harness.options import RunOptions
from harness.plan import Plan
from harness.progress import Listener
from harness.rows import show_row
from harness.run_folder import RunRecord
from harness.store import Store
from harness.study import find_best, read_study
from harness.tracking import Mirror, TrackingUnavailable

LOSSES_SECONDS, ROWS_SECONDS = 5.0, 15.0
"""Least time between two portions of losses, and of rows of trials that go on; a twentieth of the time at most."""
TRIALS_AT_ONCE = 20
"""Trials that one call mirrors at most; between two calls the parent's counts are brought up to date."""


class Tracker(Listener):
    """Hears of rows and losses, and hands them to MLflow in a thread of its own."""

    def __init__(self, options: RunOptions, store: Store, plan: Plan) -> None:
        """Nothing is opened before `start`."""
        self.notes: list[str] = []
        """What a person should be told."""
        self.uri = default_tracking_uri(options.tracking_uri, store)
        self._experiment, self._plan = options.experiment, plan
        self._categories: dict[str, Sequence[str]] = {trial.trial_id: trial.categories for trial in plan.trials}
        self._rows: dict[tuple[str, str], ResultRow] = {}
        """Of trials that have not ended, or are not mirrored since."""
        self._mirror: Mirror | None = None
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._changed = threading.Condition()
        """Guards everything below, and `_rows` and `_categories`."""
        self._due: dict[str, Trial] = {}
        """Trials that have ended and are not mirrored yet, by id."""
        self._fresh: dict[tuple[str, str], ResultRow] = {}
        """Rows that are not mirrored yet, of trials that go on."""
        self._rows_due = 0.0
        self._must_watch = False
        """Whether something has started and nobody looks at the machine yet."""
        self._losses: dict[str, tuple[Trial, list[Loss]]] = {}
        self._losses_due = 0.0
        self._closing = self._is_watching = False

    def start(self) -> None:
        """Mirrors from now on; a server that cannot be reached is told of before anything runs."""
        if self.uri is None:
            return
        self._try(lambda: self._open(str(self.uri)))
        self._rows_due = time.monotonic() + ROWS_SECONDS
        self._thread.start()

    def _open(self, uri: str) -> None:
        mirror, plan = Mirror(uri, self._experiment), self._plan
        mirror.start(plan.space.name, plan.run_id, _parent_params(plan.space.name, plan.num_reported))
        self._mirror = mirror

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread; what waits is left to the next run where this one was broken off."""
        with self._changed:
            self._due.clear()
            self._fresh.clear()
        self._close()

    def _close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        if self._mirror is not None:
            self._mirror.close()

    # --- what is heard, in the driver's own thread ---

    def started(self, trial: Job) -> None:
        with self._changed:
            self._must_watch = not self._is_watching
            self._changed.notify()

    def finished(self, trial: Trial, row: ResultRow) -> None:
        key, shown = (trial.trial_id, row.cell_id), show_row(row, trial.trial_id, trial.tuned)
        with self._changed:
            self._categories[trial.trial_id] = trial.categories
            self._rows[key] = self._fresh[key] = shown
            self._changed.notify()

    def trained(self, trial: Job, losses: Sequence[Loss]) -> None:
        if isinstance(trial, Pretraining):
            return
        with self._changed:
            self._losses.setdefault(trial.trial_id, (trial, []))[1].extend(losses)
            self._changed.notify()

    def ended(self, trial: Job) -> None:
        if isinstance(trial, Pretraining):
            return
        with self._changed:
            self._losses.pop(trial.trial_id, None)  # its rows have the whole curves
            self._due[trial.trial_id] = trial
            for cell in trial.cells:
                self._fresh.pop((trial.trial_id, cell.cell_id), None)
            self._changed.notify()

    # --- what is written, in the other one ---

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._due or self._closing or self._must_watch):
                    times = [self._losses_due] * bool(self._losses) + [self._rows_due] * bool(self._fresh)
                    wait = min(times) - time.monotonic() if times else None
                    if wait is not None and wait <= 0:
                        break
                    self._changed.wait(wait)
                if self._closing and not self._due:
                    return
                must_watch, self._must_watch = self._must_watch, False
                trials = [self._due.pop(key) for key in list(self._due)[:TRIALS_AT_ONCE]]
                keys = [(trial.trial_id, cell.cell_id) for trial in trials for cell in trial.cells]
                rows = [self._rows.pop(key) for key in keys if key in self._rows]
                losses, fresh = {}, {}
                if self._losses and time.monotonic() >= self._losses_due:
                    losses, self._losses = self._losses, {}
                if self._fresh and time.monotonic() >= self._rows_due:
                    fresh, self._fresh = self._fresh, {}
            if must_watch:
                self._watch()
            if trials or fresh:
                start = time.monotonic()
                self._sync([*rows, *fresh.values()])
                self._rows_due = _next_time(start, ROWS_SECONDS)
            if losses:
                self._log(losses)

    def _watch(self) -> None:
        mirror, self._is_watching = self._mirror, True
        if mirror is not None:
            self._try(lambda: mirror.watch_machine(self._plan.space.name, self._plan.run_id))

    def _log(self, losses: Mapping[str, tuple[Trial, Sequence[Loss]]]) -> None:
        start, mirror = time.monotonic(), self._mirror
        if mirror is not None:
            self._try(lambda: mirror.log_losses(self._plan.space.name, self._plan.run_id, losses))
        self._losses_due = _next_time(start, LOSSES_SECONDS)

    def holds(self, record: RunRecord) -> bool:
        """Waits for the thread; whether a finished run is mirrored whole, or cannot be mirrored."""
        self._close()
        mirror, found = self._mirror, list[bool]()
        if mirror is not None:
            self._try(lambda: found.append(mirror.holds(record.name, record.run_id, record.digest)))
        return found != [False]

    def finish(self, record: RunRecord, files: Sequence[Path]) -> None:
        """Waits for the thread, then mirrors the whole run."""
        self._close()
        mirror = self._mirror
        if mirror is not None:
            self._try(lambda: mirror_record(mirror, record, files))

    def _sync(self, rows: Sequence[ResultRow]) -> None:
        mirror, space, run_id = self._mirror, self._plan.space, self._plan.run_id
        if mirror is None:
            return
        with self._changed:
            categories = dict(self._categories)
        params = _parent_params(space.name, self._plan.num_reported)
        self._try(lambda: mirror.sync(space.name, run_id, rows, params=params, planned=categories))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except TrackingUnavailable as error:
            if self._mirror is not None:
                self._mirror.close()
            self._mirror = None
            self.notes.append(
                f"MLflow: {error}; the rows are saved, and the same command or `adgrid mlflow sync` mirrors them later"
            )


def _next_time(start: float, pause: float) -> float:
    now = time.monotonic()
    return now + max(pause, 20 * (now - start))


def mirror_record(mirror: Mirror, record: RunRecord, files: Sequence[Path]) -> None:
    """Mirrors a run as its folder and the rows in the store tell it; writes nothing that is there already.

    Args:
        mirror: where to.
        record: the run.
        files: of its report.

    Raises:
        TrackingUnavailable: MLflow cannot be reached or refuses.
    """
    best = {}
    samples = {row.cell_id: row for row in record.sample_rows}
    for study in record.studies:
        found = find_best(read_study(study, samples))
        if found is not None and found.score is not None:
            best[f"tuned/{study['name']}/{study['search']['objective']}"] = found.score
    # Those of studies first, since the parent is about the others alone.
    if record.sample_rows:
        mirror.sync(record.name, record.run_id, record.sample_rows, planned=record.categories)
    mirror.sync(
        record.name,
        record.run_id,
        record.rows,
        files,
        _parent_params(record.name, record.num_expected),
        finished=True,
        planned=record.categories,
        metrics=best,
        digest=record.digest,
    )


def _parent_params(name: str, num_cells: int) -> dict[str, object]:
    return {"space": name, "cells": str(num_cells)}


def default_tracking_uri(told: str | None, store: Store) -> str | None:
    """The URI to mirror to: as told, `off` for none, else a SQLite file in a local root."""
    if told is not None:
        return None if told == "off" else told
    database = store.local_path("mlflow.db")
    return None if database is None else f"sqlite:///{database}"
