"""Studies through Ray Tune: one Tune run has room for all of them, each has a searcher and a scheduler of its own.

Tune's searchers (Optuna) and schedulers (ASHA, median stopping) are used as they are. What is ours hands each the
samples of its own study alone, and tells them on a new start what was found before.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.trainable.function_trainable import FunctionTrainable, wrap_function

from harness.claims import LOOK_SECONDS, Claims
from harness.contracts import ResultRow, RowStatus, RunSettings
from harness.notes import read_row
from harness.placement import Amounts, max_in_flight
from harness.progress import Listener
from harness.store import Store
from harness.study import FINAL, Study, read_result, running_means
from harness.study_track import Run, Track
from harness.sweep import (
    Halt,
    Relay,
    execute_job,
    keep_rows,
    list_nodes,
    quieten_tune,
    settle_trial,
    trial_bundle,
)
from harness.trial import most_failures
from harness.watch import Watch

WIND_UP_SECONDS = 300
"""How long a sample that was stopped may take to let its workers go."""


def run_studies(
    studies: Sequence[Study],
    settings: RunSettings,
    listeners: Sequence[Listener],
    nodes: Sequence[Amounts] | None = None,
) -> list[ResultRow]:
    """Runs what is missing of some studies and returns the rows of this start.

    Samples of one process run first, then those of several workers, as with other trials. Ray must be connected.

    Args:
        studies: what to search.
        settings: where things lie.
        listeners: told what happens.
        nodes: what each node has; None leaves single processes to Tune.
    """
    quieten_tune()
    store = Store(settings.root)
    claims = Claims(store, settings.invocation, settings.claim_seconds)
    rows: dict[str, ResultRow] = {}
    todo = list(studies)
    while todo:
        # A searcher must hear of all samples of its study, so another run's studies are left to it as a whole.
        held = {study.study_id: claim for study in todo if (claim := claims.take(study.study_id)) is not None}
        with ExitStack() as stack:
            for claim in held.values():
                stack.enter_context(claim)
            mine = [study for study in todo if study.study_id in held]
            rows |= _run_studies(mine, settings, listeners, nodes, store)
        todo = [study for study in todo if study.study_id not in held]
        if todo and not held:
            time.sleep(LOOK_SECONDS)
    return keep_rows(rows, store, settings)


def _run_studies(
    studies: Sequence[Study],
    settings: RunSettings,
    listeners: Sequence[Listener],
    nodes: Sequence[Amounts] | None,
    store: Store,
) -> dict[str, ResultRow]:
    """Rows by cell id of studies that no other run works on."""
    rows: dict[str, ResultRow] = {}
    for grouped in (False, True):
        tracks = [Track(study, store) for study in studies if (study.template.resources.workers > 1) == grouped]
        tracks = [track for track in tracks if track.has_more]
        if tracks:
            known = list_nodes() if grouped and nodes is None else nodes
            room = max_in_flight([track.study.template for track in tracks], known) if known else None
            rows |= _run_alike(tracks, settings, listeners, store, room, grouped)
    return rows


def _run_alike(
    tracks: Sequence[Track],
    settings: RunSettings,
    listeners: Sequence[Listener],
    store: Store,
    room: int | None,
    grouped: bool,
) -> dict[str, ResultRow]:
    """Rows by cell id of studies whose samples are all single processes or all groups of workers."""
    studies = _Studies(tracks, room)
    relay = _SampleRelay(listeners, studies, store, settings)
    with tempfile.TemporaryDirectory(prefix="adgrid-tune-") as folder:
        tune.Tuner(
            tune.with_resources(
                _wound_up(tune.with_parameters(_run_sample, settings=settings)),
                lambda config: tune.PlacementGroupFactory([trial_bundle(config["sample"].trial.resources)]),
            ),
            tune_config=tune.TuneConfig(
                search_alg=_StudySearcher(studies),
                scheduler=_StudyScheduler(studies),
                num_samples=-1,
                # A process that ended early may still be winding up its workers.
                reuse_actors=not grouped,
                trial_dirname_creator=lambda trial: trial.trial_id,
                max_concurrent_trials=room,
            ),
            run_config=tune.RunConfig(
                name="studies",
                storage_path=folder,
                verbose=0,
                callbacks=[relay],
                stop=Halt(relay),
                failure_config=tune.FailureConfig(
                    max_failures=max(most_failures(track.study.template) for track in tracks)
                ),
            ),
        ).fit()
    relay.check_storage()
    return relay.all_rows


def _run_sample(config: dict[str, Any], settings: RunSettings) -> None:
    """What a Tune worker executes: one sample, with its score so far beside each report that moves it."""
    sample, watch = config["sample"], config["watch"]
    trial, objective = sample.trial, watch.objective
    by_epochs = watch.by_epochs
    saved = Store(settings.root).load_rows(cell.cell_id for cell in trial.cells)
    rows = dict(read_result(sample, objective, saved).rows)

    def scores() -> list[float]:
        means = running_means(rows, trial.categories, objective)
        if by_epochs:  # all categories come at once, and only then
            return means[-1:] if len(means) == len(trial.categories) else []
        return means

    def time_of(place: int) -> int:
        return FINAL if by_epochs else place + 1

    told = 0
    for told, score in enumerate(scores(), start=1):
        tune.report({"time": time_of(told - 1), "score": score})

    def report(message: dict[str, Any]) -> None:
        nonlocal told
        message = dict(message)
        if "look" in message:
            message["time"], message["score"] = message.pop("look")
        elif "row" in message:
            row = read_row(message)
            rows[row.category] = row
            known = scores()
            if len(known) > told:
                told = len(known)
                message["time"], message["score"] = time_of(told - 1), known[-1]
        tune.report(message)

    execute_job(trial, settings, report, watch)
    tune.report({"ended": True})


def _wound_up(function: Callable[[dict[str, Any]], None]) -> type[FunctionTrainable]:
    """A function for Tune whose end is waited for when its sample is stopped early.

    Tune would end the process at once. A group of workers would then keep its places, and be counted by Ray Train for
    three more minutes, while the next sample waits for them.
    """

    class WoundUp(wrap_function(function)):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            self._running = threading.Lock()
            super().setup(config)

        def _trainable_func(self, config: dict[str, Any]) -> Any:
            with self._running:
                return super()._trainable_func(config)

        def cleanup(self) -> None:
            super().cleanup()  # tells the function to stop when it reports
            self._running.acquire(timeout=WIND_UP_SECONDS)

    return WoundUp


# --- all of them in one Tune run -----------------------------------------------------------------------------------


class _Studies:
    """The studies of one Tune run, and which run of Tune is which sample."""

    def __init__(self, tracks: Sequence[Track], room: int | None) -> None:
        self._tracks = deque(tracks)
        self._room = room
        self.runs: dict[str, Run] = {}
        """By Tune's trial id."""

    def propose(self, tune_id: str) -> Run | None:
        """The next sample of any study that may run another, in turn."""
        for _ in range(len(self._tracks)):
            self._tracks.rotate(-1)
            track = self._tracks[0]
            # A searcher that is to learn is not asked for what would only wait for a place.
            at_once = min(track.study.search.concurrency, self._room or track.study.search.concurrency)
            run = track.propose() if track.has_more and track.num_live < at_once else None
            if run is not None:
                self.runs[tune_id] = run
                return run
        return None

    @property
    def has_more(self) -> bool:
        """Whether any study has."""
        return any(track.has_more for track in self._tracks)


class _Live:
    """Stays the one object it is: Tune copies and pickles what it is given, to restore experiments that we never do."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a new start resumes from rows and the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class _StudySearcher(_Live, Searcher):
    """Hands Tune the samples of all studies in turn."""

    def __init__(self, studies: _Studies) -> None:
        super().__init__()
        self._studies = studies

    def suggest(self, trial_id: str) -> Any:
        run = self._studies.propose(trial_id)
        if run is None:
            return None if self._studies.has_more else Searcher.FINISHED
        return {"sample": run.sample, "watch": _watch(run.track.study)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        run = self._studies.runs[trial_id]
        run.track.end(run)


def _watch(study: Study) -> Watch:
    entry = study.search.scheduler
    looks = study.by_epochs and entry.name != "none"
    return Watch(
        objective=study.search.objective,
        by_epochs=study.by_epochs,
        first_look=entry.grace_period if looks else None,
        factor=entry.reduction_factor,
    )


class _StudyScheduler(_Live, FIFOScheduler):
    """Lets each study's own scheduler decide about its samples."""

    def __init__(self, studies: _Studies) -> None:
        super().__init__()
        self._studies = studies

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        scheduler = self._studies.runs[trial.trial_id].track.scheduler
        if scheduler is not None:
            scheduler.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        run = self._studies.runs[trial.trial_id]
        if "score" not in result or run.ended:
            return TrialScheduler.CONTINUE
        time, score, track = int(result["time"]), float(result["score"]), run.track
        if run.reports and time <= run.reports[-1][0]:
            return TrialScheduler.CONTINUE  # told again by a worker that was started anew
        track.hear(run, time, score)
        if track.scheduler is None or time >= track.last_time:
            return TrialScheduler.CONTINUE
        decision = track.scheduler.on_trial_result(tune_controller, trial, {"time": time, "score": score})
        if decision == TrialScheduler.STOP:
            done = f"epoch {time}" if track.study.by_epochs else f"{time} of {track.last_time} categories"
            objective, name = track.study.search.objective, track.study.search.scheduler.name
            run.stopped = f"stopped by {name} after {done}: {objective} {score:.1%}"
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        run = self._studies.runs[trial.trial_id]
        if run.track.scheduler is not None and run.reports:
            time, score = run.reports[-1]
            run.track.scheduler.on_trial_complete(tune_controller, trial, {"time": time, "score": score})


class _SampleRelay(Relay):
    """Gives the cells of a sample that ended early their rows, before the listeners hear that it has ended."""

    def __init__(self, listeners: Sequence[Listener], studies: _Studies, store: Store, settings: RunSettings) -> None:
        super().__init__(listeners, lambda config: config["sample"].trial, store, settings)
        self._studies = studies

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._settle(trial, "it ended without a row for this cell")
        super().on_trial_complete(iteration, trials, trial, **info)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._settle(trial, str(trial.get_error() or "it ended without a row for this cell"))
        super().on_trial_complete(iteration, trials, trial, **info)

    def _settle(self, trial: Any, error: str) -> None:
        run = self._studies.runs[trial.trial_id]
        status: RowStatus = "stopped" if run.stopped else "failed"
        reason = run.stopped or f"the trial's worker was lost: {error}"
        settle_trial(run.sample.trial, self, self._store, self._settings, status, reason)
