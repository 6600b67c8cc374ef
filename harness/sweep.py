"""The home of Ray Tune: decides where and when trials run, and survives the workers they run on.

A trial's own code saves its rows; what comes back here are those rows and notes of progress, never maps or features.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray import tune

from harness.contracts import AdgridError, Resources, ResultRow, RunSettings, Trial
from harness.progress import Listener
from harness.rows import unfinished_row
from harness.store import Store
from harness.trial import MAX_ATTEMPTS, run_trial

NOTE_SECONDS = 1.0
"""Least time between two notes of progress from one trial."""


@contextmanager
def connect(address: str | None, num_cpus: int | None = None) -> Iterator[Mapping[str, float]]:
    """Joins a cluster, or starts a local Ray and stops it afterwards; a Ray that already runs here is used as it is.

    Args:
        address: `auto`, `HOST:PORT` or `ray://...`; None starts one on this machine.
        num_cpus: processor cores of a Ray started here; None for all.

    Yields:
        The resources of the cluster.
    """
    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    # One OpenMP thread per worker spins away the other workers' time at barriers unless it is told to sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DISABLE_DOCKER_CPU_WARNING", "1")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        # RAY_AUTH_MODE stays as the user has it: Ray makes and uses a token of its own where none is set, but not
        # where the mode is set after it was imported.
        options |= {"address": "local", "num_cpus": num_cpus, "include_dashboard": False}
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise AdgridError(
            f"--address {address}: no Ray cluster answers ({error}); start one or leave it out"
        ) from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def check_resources(trials: Sequence[Trial], available: Mapping[str, float]) -> None:
    """Raises AdgridError if a trial asks for more than the whole cluster has, which would wait for ever."""
    for trial in trials:
        for name, wanted in _bundle(trial.resources).items():
            if wanted > available.get(name, 0.0):
                field = {"CPU": "cpu", "GPU": "gpu", "memory": "memory_gib"}[name]
                raise AdgridError(
                    f"resources.{field}: a trial of {trial.method!r} asks for {wanted:g} {name}, the cluster has "
                    f"{available.get(name, 0.0):g}; lower resources.{field} or add nodes"
                )


def max_in_flight(trials: Sequence[Trial], available: Mapping[str, float]) -> int:
    """How many trials the resources can hold at once, if all were as small as the smallest."""
    bundles = [_bundle(trial.resources) for trial in trials]
    smallest = {name: min(bundle[name] for bundle in bundles) for name in bundles[0] if all(name in b for b in bundles)}
    return max(1, min((int(available.get(name, 0) / amount) for name, amount in smallest.items()), default=len(trials)))


def run_trials(
    trials: Sequence[Trial], settings: RunSettings, listeners: Sequence[Listener], in_flight: int | None = None
) -> list[ResultRow]:
    """Runs trials through Ray Tune and returns the rows of this start, one per cell that was not finished before.

    A trial whose worker is killed is started again and goes on with what is missing; a cell whose worker dies every
    time becomes a failed row. Ray must be connected.

    Args:
        trials: what to run, each with its own bundle of resources.
        settings: where things lie.
        listeners: told what happens.
        in_flight: trials that Tune holds at once, waiting ones included; None leaves it to Tune, whose waiting trials
            are what an autoscaler goes by.
    """
    if not trials:
        return []
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the newer output prints its settings even when told to be silent
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C reaches the caller; every finished row is saved already
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    relay = _Relay(trials, listeners)
    with tempfile.TemporaryDirectory(prefix="adgrid-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_run_in_worker, trials=list(trials), settings=settings),
                lambda config: tune.PlacementGroupFactory([_bundle(trials[config["trial"]].resources)]),
            ),
            param_space={"trial": tune.grid_search(list(range(len(trials))))},
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
                max_concurrent_trials=in_flight or 0,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=folder,
                verbose=0,
                callbacks=[relay],
                failure_config=tune.FailureConfig(
                    max_failures=MAX_ATTEMPTS * max(len(trial.cells) for trial in trials)
                ),
            ),
        )
        results = tuner.fit()
    store = Store(settings.root)
    for number in range(len(results)):
        result = results[number]
        assert result.config is not None
        trial = trials[result.config["trial"]]
        lost = [cell for cell in trial.cells if cell.cell_id not in relay.rows[trial.trial_id]]
        saved = store.load_rows(cell.cell_id for cell in lost)
        for cell in lost:
            if cell.cell_id not in saved or saved[cell.cell_id].status != "ok":
                reason = f"the trial's worker was lost: {result.error or 'it ended without a row for this cell'}"
                row = unfinished_row(trial, cell, "failed", reason, settings)
                store.publish_row(row)
                relay.finished(trial, row)
    store.forget_attempts(settings.invocation)
    told = {cell_id: row for rows in relay.rows.values() for cell_id, row in rows.items()}
    saved = store.load_rows(told)
    for cell_id, row in told.items():
        if cell_id not in saved:  # a node wrote to a root of its own: the driver's copy counts
            store.publish_row(row)
    return list(told.values())


def _bundle(resources: Resources) -> dict[str, float]:
    bundle = {"CPU": resources.cpu, "GPU": resources.gpu, "memory": resources.memory_gib * 2**30}
    return {name: amount for name, amount in bundle.items() if amount}


def _run_in_worker(config: dict[str, Any], trials: list[Trial], settings: RunSettings) -> None:
    """What a Tune worker executes: one trial, a report per row and now and then one of progress."""
    import torch

    trial = trials[config["trial"]]
    # Ray sets OMP_NUM_THREADS, but torch has read it long before a reused worker gets its next trial.
    torch.set_num_threads(max(1, int(trial.resources.cpu)))
    last = 0.0

    def notify(category: str, stage: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= NOTE_SECONDS:
            last = time.monotonic()
            tune.report({"note": [category, stage, done, total]})

    for row in run_trial(trial, settings, notify):
        tune.report({"row": dataclasses.asdict(row)})
    tune.report({"ended": True})


class _Relay(tune.Callback):
    """Hands what Tune hears to the listeners, as our own types."""

    def __init__(self, trials: Sequence[Trial], listeners: Sequence[Listener]) -> None:
        self._trials, self._listeners = trials, listeners
        self.rows: dict[str, dict[str, ResultRow]] = {trial.trial_id: {} for trial in trials}

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its callbacks to disk to restore an experiment; ours resumes from rows and restores nothing.
        return {}

    def finished(self, trial: Trial, row: ResultRow) -> None:
        self.rows[trial.trial_id][row.cell_id] = row
        for listener in self._listeners:
            listener.finished(trial, row)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        for listener in self._listeners:
            listener.started(self._ours(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "row" in result:
            self.finished(self._ours(trial), ResultRow(**result["row"]))
        elif "note" in result:
            for listener in self._listeners:
                listener.noted(self._ours(trial), *result["note"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        for listener in self._listeners:
            listener.ended(self._ours(trial))

    on_trial_error = on_trial_complete

    def _ours(self, trial: Any) -> Trial:
        return self._trials[trial.config["trial"]]
