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

LOSSES_SECONDS = 5.0
"""Least time between two portions of losses on their way to MLflow; at most a twentieth of the time goes there."""
TRIALS_AT_ONCE = 20
"""Trials that one call mirrors at most; between two calls the parent's counts are brought up to date."""


class Tracker(Listener):
    """Hears of rows and losses, and hands them to MLflow in a thread of its own."""

    def __init__(self, options: RunOptions, store: Store, plan: Plan) -> None:
        """Nothing is opened before `start`."""
        self.notes: list[str] = []
        """What a person should be told."""
        self.uri = default_tracking_uri(options, store)
        self._experiment, self._plan = options.experiment, plan
        self._planned = {trial.trial_id: trial for trial in plan.trials}
        self._rows: dict[tuple[str, str], ResultRow] = {}
        self._mirror: Mirror | None = None
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._changed = threading.Condition()
        """Guards everything below, and `_rows` and `_planned`."""
        self._due: dict[str, Trial] = {}
        """Trials that have ended and are not mirrored yet, by id."""
        self._losses: dict[str, tuple[Trial, list[Loss]]] = {}
        self._losses_due = 0.0
        self._closing = False

    def start(self) -> None:
        """Mirrors from now on; a server that cannot be reached is told of before anything runs."""
        if self.uri is None:
            return
        self._try(lambda: self._open(str(self.uri)))
        self._sync([], [], finished=False)
        self._thread.start()

    def _open(self, uri: str) -> None:
        self._mirror = Mirror(uri, self._experiment)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread; what waits is left to the next run where this one was broken off."""
        with self._changed:
            self._due.clear()
        self._close()

    def _close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    # --- what is heard, in the driver's own thread ---

    def finished(self, trial: Trial, row: ResultRow) -> None:
        with self._changed:
            self._planned[trial.trial_id] = trial
            self._rows[trial.trial_id, row.cell_id] = show_row(row, trial.trial_id, trial.tuned)

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
            self._changed.notify()

    # --- what is written, in the other one ---

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._due or self._closing):
                    wait = self._losses_due - time.monotonic() if self._losses else None
                    if wait is not None and wait <= 0:
                        break
                    self._changed.wait(wait)
                if self._closing and not self._due:
                    return
                trials = [self._due.pop(key) for key in list(self._due)[:TRIALS_AT_ONCE]]
                rows = [
                    self._rows[trial.trial_id, cell.cell_id]
                    for trial in trials
                    for cell in trial.cells
                    if (trial.trial_id, cell.cell_id) in self._rows
                ]
                losses = {}
                if self._losses and time.monotonic() >= self._losses_due:
                    losses, self._losses = self._losses, {}
            if trials:
                self._sync(rows, [], finished=False)
            if losses:
                self._log(losses)

    def _log(self, losses: Mapping[str, tuple[Trial, Sequence[Loss]]]) -> None:
        start, mirror = time.monotonic(), self._mirror
        if mirror is not None:
            self._try(lambda: mirror.log_losses(self._plan.space.name, self._plan.run_id, losses))
        now = time.monotonic()
        self._losses_due = now + max(LOSSES_SECONDS, 20 * (now - start))

    def finish(self, record: RunRecord, files: Sequence[Path]) -> None:
        """Waits for the thread, then mirrors all rows, those of studies first: the parent is about the others alone."""
        self._close()
        best = {}
        samples = {row.cell_id: row for row in record.sample_rows}
        for study in record.studies:
            found = find_best(read_study(study, samples))
            if found is not None and found.score is not None:
                best[f"tuned/{study['name']}/{study['search']['objective']}"] = found.score
        if record.sample_rows:
            self._sync(record.sample_rows, [], finished=False)
        self._sync(record.rows, files, finished=True, metrics=best)

    def _sync(
        self,
        rows: Sequence[ResultRow],
        files: Sequence[Path],
        finished: bool,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        mirror, space, run_id = self._mirror, self._plan.space, self._plan.run_id
        if mirror is None:
            return
        with self._changed:
            planned = list(self._planned.values())
        params = {"space": space.name, "cells": str(self._plan.num_reported)}
        self._try(
            lambda: mirror.sync(space.name, run_id, rows, files, params, finished, planned=planned, metrics=metrics)
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
