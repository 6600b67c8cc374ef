"""The home of Ray Tune: decides where and when trials run, and survives the workers they run on.

A trial's own code saves its rows; what comes back here are those rows and notes of progress, never maps or features.
"""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import ray
from ray import tune

from harness.claims import LOOK_SECONDS, Claims
from harness.contracts import AdgridError, Job, Pretraining, Resources, ResultRow, RowStatus, RunSettings, Trial
from harness.notes import Notes, read_losses, read_row, row_message
from harness.placement import Amounts, max_in_flight, worker_bundle
from harness.progress import Listener
from harness.rows import unfinished_row
from harness.store import Store, StoreError
from harness.trial import find_left, find_open_cells, is_of_this_start, memory_key, most_failures, run_job
from harness.watch import Observer, Watch

MOST_OF_A_KIND = 1000
"""Nodes of one kind that are reckoned with, where an autoscaler has no limit."""


@contextmanager
def connect(address: str | None, num_cpus: int | None = None) -> Iterator[None]:
    """Joins a cluster, or starts a local Ray and stops it afterwards; a Ray that already runs here is used as it is.

    Args:
        address: `auto`, `HOST:PORT` or `ray://...`; None starts one on this machine.
        num_cpus: processor cores of a Ray started here; None for all.
    """
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address is not None and ":" in address and "//" not in address and address != here:
            raise AdgridError(f"--address {address}: this process has joined the Ray at {here}; leave that one first")
        yield
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
        yield
    finally:
        ray.shutdown()


def list_nodes() -> list[dict[str, float]]:
    """What each living node of the connected cluster has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def list_reported_limits() -> list[dict[str, float]]:
    """What each node has that an autoscaler may add at most, where it tells Ray; KubeRay's does."""
    from ray._private.state import state

    config = state.get_cluster_config()
    return [] if config is None else _expand_groups(config.node_group_configs)


def _expand_groups(groups: Iterable[Any]) -> list[dict[str, float]]:
    nodes: list[dict[str, float]] = []
    for group in groups:
        most = group.max_count if group.max_count >= 0 else MOST_OF_A_KIND
        nodes += [{name: float(amount) for name, amount in group.resources.items()}] * min(most, MOST_OF_A_KIND)
    return nodes


def run_trials(
    trials: Sequence[Trial],
    settings: RunSettings,
    listeners: Sequence[Listener],
    nodes: Sequence[Amounts] | None = None,
    pretrainings: Sequence[Pretraining] = (),
) -> list[ResultRow]:
    """Runs trials through Ray Tune and returns the rows of this start, one per cell that was not finished before.

    Pretrainings come first; the cells of trials that need one that failed become rows of status `skipped`.

    A trial whose worker is killed is started again and goes on with what is missing; a cell whose worker dies every
    time becomes a failed row. Trials of one process run first, then those of several workers, so that neither kind
    holds places that the other waits for. Ray must be connected.

    Args:
        trials: what to run, each with its own resources.
        settings: where things lie.
        listeners: told what happens.
        nodes: what each node has, for the number of trials at once; None leaves single processes to Tune, whose waiting
            trials are what an autoscaler goes by.
        pretrainings: representations that trials need and the store has not.
    """
    quieten_tune()
    store = Store(settings.root)
    _run_phase(pretrainings, settings, listeners, nodes, store)
    rows = _skip_without_artifact(trials, pretrainings, settings, listeners, store)
    ready = [trial for trial in trials if not any(cell.cell_id in rows for cell in trial.cells)]
    rows |= _run_phase(ready, settings, listeners, nodes, store)
    return keep_rows(rows, store, settings)


def quieten_tune() -> None:
    """Tune writes no logs of its own and leaves Ctrl-C alone; it reads this from the environment only."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the newer output prints its settings even when told to be silent
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C reaches the caller; every finished row is saved already
    logging.getLogger("ray.tune").setLevel(logging.ERROR)


def keep_rows(rows: Mapping[str, ResultRow], store: Store, settings: RunSettings) -> list[ResultRow]:
    """The rows of a start, by cell id, each of which is in the driver's store from now on."""
    store.forget_attempts(settings.invocation)
    saved = store.load_rows(rows)
    for cell_id, row in rows.items():
        if cell_id not in saved:  # a node wrote to a root of its own: the driver's copy counts
            store.publish_row(row)
    return list(rows.values())


def _run_phase(
    jobs: Sequence[Job],
    settings: RunSettings,
    listeners: Sequence[Listener],
    nodes: Sequence[Amounts] | None,
    store: Store,
) -> dict[str, ResultRow]:
    """Rows by cell id of jobs that need none of each other: single processes first, then groups of workers.

    What other runs work on is left to them until it is done or given up.
    """
    rows: dict[str, ResultRow] = {}
    left: dict[str, dict[str, str]] = {}
    todo = list(jobs)
    while todo:
        for grouped in (False, True):
            alike = [job for job in todo if (job.resources.workers > 1) == grouped]
            if alike:
                known = list_nodes() if grouped and nodes is None else nodes
                room = max_in_flight(alike, known) if known else 0
                relay = _run_alike(alike, settings, listeners, store, room, rows.keys())
                rows |= relay.all_rows
                left |= relay.left
        todo = _await_others(jobs, left, listeners, store, settings)
    return rows


def _await_others(
    jobs: Sequence[Job],
    left: dict[str, dict[str, str]],
    listeners: Sequence[Listener],
    store: Store,
    settings: RunSettings,
) -> list[Job]:
    """Waits until other runs have done some of what is left to them, or given it up; the jobs to be run again.

    Args:
        jobs: all of the phase.
        left: what is left to others, by the id of a job, as `harness.trial.Leave` has it; loses what is settled.
        listeners: told of the rows that others have made.
        store: where rows and claims are.
        settings: of this run.
    """
    claims = Claims(store, settings.invocation, settings.claim_seconds)
    while left:
        held = claims.held_by_others(key for cells in left.values() for key in cells.values())
        freed = {cell_id for cells in left.values() for cell_id, key in cells.items() if key not in held}
        rows = {cell_id: row for cell_id, row in store.load_rows(freed).items() if row.status == "ok"} if freed else {}
        again = []
        for job in jobs:
            cells = left.get(job.trial_id, {})
            if not freed & cells.keys():
                continue
            if isinstance(job, Trial):
                for cell_id in rows.keys() & cells.keys():
                    del cells[cell_id]
                    for listener in listeners:
                        listener.finished(job, rows[cell_id])
            elif store.has_state(job.trial_id):
                cells.clear()
            if freed & cells.keys():
                again.append(job)
            if freed & cells.keys() or not cells:
                del left[job.trial_id]
        if again:
            return again
        if left:
            time.sleep(LOOK_SECONDS)
    return []


def _skip_without_artifact(
    trials: Sequence[Trial],
    pretrainings: Sequence[Pretraining],
    settings: RunSettings,
    listeners: Sequence[Listener],
    store: Store,
) -> dict[str, ResultRow]:
    """Rows of status `skipped` for the open cells of trials whose representation could not be trained."""
    reasons = {}
    for pretraining in pretrainings:
        if not store.has_state(pretraining.trial_id):
            failure = store.load_failure(pretraining.trial_id)
            told = failure is not None and failure[0] == settings.invocation
            reasons[pretraining.trial_id] = failure[1] if failure and told else "its workers were lost"
    rows = {}
    for trial in trials:
        reason = None if trial.trained is None else reasons.get(trial.trained.artifact_id)
        if reason is None:
            continue
        for cell in find_open_cells(trial, store, settings):
            text = f"representation {trial.representation!r} could not be trained: {reason}"
            row = rows[cell.cell_id] = unfinished_row(trial, cell, "skipped", text, settings)
            store.publish_row(row)
            for listener in listeners:
                listener.finished(trial, row)
    return rows


def _run_alike(
    trials: Sequence[Job],
    settings: RunSettings,
    listeners: Sequence[Listener],
    store: Store,
    in_flight: int,
    told: Collection[str],
) -> Relay:
    """Runs trials that are all single processes or all groups of workers; what was heard of them.

    Cells in `told` have had their row earlier in this start.
    """
    relay = Relay(listeners, lambda config: trials[config["trial"]["number"]], store, settings)
    # Tune unpickles the function and what stands beside it for every trial anew, here and in the workers: none of them
    # may hold all trials, or the start of each grows with their number.
    pickled = [pickle.dumps(trial) for trial in trials]
    places = [{"number": number, "bundle": trial_bundle(trial.resources)} for number, trial in enumerate(trials)]
    with tempfile.TemporaryDirectory(prefix="adgrid-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_run_in_worker, trials=pickled, settings=settings),
                lambda config: tune.PlacementGroupFactory([config["trial"]["bundle"]]),
            ),
            param_space={"trial": tune.grid_search(places)},
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
                max_concurrent_trials=in_flight,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=folder,
                verbose=0,
                callbacks=[relay],
                stop=Halt(relay),
                failure_config=tune.FailureConfig(max_failures=max(map(most_failures, trials))),
            ),
        )
        results = tuner.fit()
    relay.check_storage()
    for number in range(len(results)):
        result = results[number]
        assert result.config is not None
        trial = trials[result.config["trial"]["number"]]
        if isinstance(trial, Trial):
            reason = f"the trial's worker was lost: {result.error or 'it ended without a row for this cell'}"
            settle_trial(trial, relay, store, settings, "failed", reason, told)
    return relay


def settle_trial(
    trial: Trial,
    relay: Relay,
    store: Store,
    settings: RunSettings,
    status: RowStatus,
    reason: str,
    told: Collection[str] = (),
) -> None:
    """Gives each cell of an ended trial that nothing was heard of its row: the saved one, or one with a reason."""
    known = {*told, *relay.rows[trial.trial_id], *relay.left.get(trial.trial_id, {})}
    lost = [cell for cell in trial.cells if cell.cell_id not in known]
    saved = store.load_rows(cell.cell_id for cell in lost)
    for cell in lost:
        row = saved.get(cell.cell_id)
        if row is not None and is_of_this_start(row, settings):
            relay.finished(trial, row)  # its worker saved it and was lost before it could tell
        elif row is None or row.status != "ok":
            row = unfinished_row(trial, cell, status, reason, settings)
            store.publish_row(row)
            relay.finished(trial, row)


def trial_bundle(resources: Resources) -> dict[str, float]:
    """What the process of a trial asks of Ray.

    One that only starts workers takes no core, so that it blocks nobody, and stays on the head, so that no lost node
    takes it along.
    """
    return worker_bundle(resources) if resources.workers == 1 else {"CPU": 0, "node:__internal_head__": 0.001}


def _run_in_worker(config: dict[str, Any], trials: list[bytes], settings: RunSettings) -> None:
    """What a Tune worker executes: one trial of those, a report per row and now and then one of progress."""
    execute_job(pickle.loads(trials[config["trial"]["number"]]), settings, tune.report)
    tune.report({"ended": True})


def execute_job(
    job: Job, settings: RunSettings, report: Callable[[dict[str, Any]], None], watch: Watch | None = None
) -> None:
    """Runs one trial or pretraining in this process, or in the group of workers that it asks for.

    Args:
        job: what to run.
        settings: where things lie.
        report: told the `row_message` of each cell, `{"note": ..., "losses": ...}` (see `Notes`), `{"left": ...}` (see
            `harness.trial.Leave`), `{"broken": ...}` where the storage fails and, if watched,
            `{"look": [epochs done, objective]}`.
        watch: how closely a study watches; what `report` raises then ends the trial.
    """
    try:
        left = {} if watch is not None else find_left(job, Store(settings.root), settings)
        if left:
            report({"left": left})
        elif job.resources.workers > 1:
            from harness.training import run_with_workers

            with closing(run_with_workers(job, settings, watch)) as messages:
                for message in messages:
                    report(message)
        else:
            _run_here(job, settings, report, watch)
    except StoreError as error:
        report({"broken": str(error)})


def _run_here(trial: Job, settings: RunSettings, report: Callable[[dict[str, Any]], None], watch: Watch | None) -> None:
    import torch

    # Ray sets OMP_NUM_THREADS, but torch has read it long before a reused worker gets its next trial.
    torch.set_num_threads(max(1, int(trial.resources.cpu)))
    observer = None
    if watch is not None:
        observer = Observer(watch=watch, tell=lambda done, value: report({"look": [done, value]}))
    for row in run_job(trial, settings, Notes(report), observer=observer, leave=lambda left: report({"left": left})):
        report(row_message(row))


class Relay(tune.Callback):
    """Hands what Tune hears to the listeners, as our own types."""

    def __init__(
        self,
        listeners: Sequence[Listener],
        find_job: Callable[[dict[str, Any]], Job],
        store: Store,
        settings: RunSettings,
    ) -> None:
        """Args: whom to tell; our job behind the configuration of a trial of Tune; where the run keeps its notes."""
        self._listeners, self._find_job = listeners, find_job
        self._store, self._settings = store, settings
        self.rows: dict[str, dict[str, ResultRow]] = defaultdict(dict)
        """By trial id and cell id."""
        self.left: dict[str, dict[str, str]] = {}
        """What other runs work on, by the id of a job, as `harness.trial.Leave` has it."""
        self.broken: str | None = None
        """What is wrong with the storage."""

    def check_storage(self) -> None:
        """Raises StoreError if a worker could not write."""
        if self.broken is not None:
            raise StoreError(self.broken)

    @property
    def all_rows(self) -> dict[str, ResultRow]:
        """By cell id."""
        return {cell_id: row for told in self.rows.values() for cell_id, row in told.items()}

    def __getstate__(self) -> dict[str, Any]:
        # Tune writes its callbacks to disk to restore an experiment; ours resumes from rows and restores nothing.
        return {}

    def finished(self, trial: Trial, row: ResultRow) -> None:
        """A row came, by whatever way."""
        self.rows[trial.trial_id][row.cell_id] = row
        for listener in self._listeners:
            listener.finished(trial, row)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        for listener in self._listeners:
            listener.started(self._ours(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "broken" in result:
            self.broken = result["broken"]
        elif "left" in result:
            self.left[self._ours(trial).trial_id] = dict(result["left"])
        elif "row" in result:
            ours = self._ours(trial)
            assert isinstance(ours, Trial), "a pretraining has no rows"
            self.finished(ours, read_row(result))
        elif "note" in result:
            for listener in self._listeners:
                listener.noted(self._ours(trial), *result["note"])
                if result["losses"]:
                    listener.trained(self._ours(trial), read_losses(result["losses"]))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        for listener in self._listeners:
            listener.ended(self._ours(trial))

    on_trial_error = on_trial_complete

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = self._ours(trial)
        if isinstance(ours, Trial) and ray.exceptions.OutOfMemoryError.__name__ in (trial.get_error() or ""):
            self._store.publish(memory_key(ours, self._settings), b"", lasting=False)

    def _ours(self, trial: Any) -> Job:
        return self._find_job(trial.config)


class Halt(tune.Stopper):
    """Ends all trials when the storage fails: none could save what it computes."""

    def __init__(self, relay: Relay) -> None:
        """Args: who hears of it."""
        self._relay = relay

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Whether a worker could not write."""
        return self._relay.broken is not None
