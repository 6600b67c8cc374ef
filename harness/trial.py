"""The story of one trial, in a plain process: read the images, fit the method, score each category, save each row.

Ray only decides where and when this runs. What goes wrong in a category is a row with its reason; the trial goes on.
Several workers may run a trial together: all of them call `run_trial`, the first one writes the rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext

from harness.claims import Claim, Claims
from harness.contracts import Cell, Job, Pretraining, ResultRow, RunSettings, Trial
from harness.details import publish_details
from harness.evaluate import Evaluation, evaluate, score_columns
from harness.fitting import FittedMethod, is_being_extracted
from harness.measure import free_memory, is_out_of_memory
from harness.notes import Notify
from harness.pretraining import MAX_FAILURES, run_pretraining
from harness.registry import load_method
from harness.resolve import CategoryData, ResolvedTrial, identify_cells, open_dataset, read_category, resolve_trial
from harness.rows import finished_row, unfinished_row
from harness.sheets import publish_sheet
from harness.store import Store, StoredPrediction, StoreError
from harness.truth import load_truth
from harness.watch import Observer, Stopped
from harness.workers import ALONE, Workers, is_lost_worker

MAX_ATTEMPTS = 2
"""How often a cell is started in one run; a cell whose worker died each time is a failed row, not tried for ever."""


LESS_MEMORY = 4
"""By how much smaller batches are where memory ran out."""


class WorkerDied(RuntimeError):
    """The process died every time it ran this cell."""


Leave = Callable[[Mapping[str, str]], None]
"""Told what other runs work on: cell id, or id of a pretraining, to the claim on it."""


class PlanOutdated(RuntimeError):
    """Images, masks or weights on this node are not the ones that were planned."""


def run_job(
    job: Job,
    settings: RunSettings,
    notify: Notify = lambda *_: None,
    workers: Workers = ALONE,
    observer: Observer | None = None,
    leave: Leave = lambda _: None,
) -> Iterator[ResultRow]:
    """Runs a trial, or a pretraining, which has no rows; see `run_trial` and `run_pretraining`."""
    if isinstance(job, Pretraining):
        if not run_pretraining(job, settings, notify, workers):
            leave({job.trial_id: job.trial_id})
    else:
        yield from run_trial(job, settings, notify, workers, observer, leave)


def most_failures(job: Job) -> int:
    """How often the process of a job, or one of its workers, may be lost before it counts as failed."""
    return MAX_FAILURES if isinstance(job, Pretraining) else MAX_ATTEMPTS * len(job.cells)


def run_trial(
    trial: Trial,
    settings: RunSettings,
    notify: Notify = lambda *_: None,
    workers: Workers = ALONE,
    observer: Observer | None = None,
    leave: Leave = lambda _: None,
) -> Iterator[ResultRow]:
    """Runs what is missing of a trial and yields each row after it was saved; of several workers the leader does.

    What another run works on at this moment is left to it.

    Args:
        trial: what to run, with the ids of its cells.
        settings: where things lie.
        notify: told about progress inside a cell.
        workers: the processes that run the trial together.
        observer: a study that hears of the trial and may end it; nobody else works on the samples of a study.
        leave: told by the leader what is left to others.

    Raises:
        Stopped: at every worker, when the observer says so; what is finished is saved.
        StoreError: the storage cannot be written.
        Exception: with several workers, whatever went wrong at one of them, after its rows were saved: the others wait
            for it in vain, so the whole group must be started again, and goes on with the next cell.
    """
    store = Store(settings.root)
    segments = store.segments() if workers.leads else []
    todo = workers.agree(find_open_cells(trial, store, settings) if workers.leads else None)
    try:
        dataset = open_dataset(trial.dataset, settings.places)
        resolved = resolve_trial(trial, dataset, settings.places.cache_dir)
    except Exception as error:
        yield from _save_failed(store, trial, todo, error, settings, workers)
        return
    groups = fit_groups(resolved, todo)
    claims = Claims(store, f"{settings.invocation}/{trial.trial_id}", settings.claim_seconds)
    while groups:
        place, claim = 0, None
        if workers.leads and observer is None:  # a study compares its samples after the same categories, in their order
            place, claim = _take_next(resolved, groups, claims, settings)
        place = workers.agree(place)
        if place < 0:
            leave(claim_keys(trial, [cell for group in groups for cell in group]))
            return
        group = groups.pop(place)
        with claim or nullcontext():
            # Somebody else may have finished it before the claim on it was free.
            done = workers.agree(store.finished_since((c.cell_id for c in group), segments) if claim else set())
            group = [cell for cell in group if cell.cell_id not in done]
            if group:
                yield from run_group(resolved, group, store, settings, notify, workers, observer)
        if observer is not None and groups and not workers.agree(observer.goes_on() if workers.leads else None):
            raise Stopped


def _take_next(
    resolved: ResolvedTrial, groups: Sequence[Sequence[Cell]], claims: Claims, settings: RunSettings
) -> tuple[int, Claim | None]:
    """The place of the next group and the claim on it; -1 if others work on all of them.

    What another trial extracts right now is left for later; when all are taken, the first is done all the same.
    """
    places = range(len(groups))
    free = (n for n in places if not _is_taken(resolved, groups[n][0].category, settings))
    for place in itertools.chain(free, places):
        (key,) = claim_keys(resolved.trial, groups[place][:1]).values()
        claim = claims.take(key)
        if claim is not None:
            return place, claim
    return -1, None


def claim_keys(trial: Trial, cells: Sequence[Cell]) -> dict[str, str]:
    """Cell id to the claim on the fit that the cell needs, which is the same in every run."""
    one_fit = load_method(trial.method).scope == "dataset"
    return {cell.cell_id: (trial.cells[0] if one_fit else cell).prediction_id for cell in cells}


def find_left(job: Job, store: Store, settings: RunSettings) -> dict[str, str]:
    """What `run_job` would leave to others, if that is all there is to do; else nothing."""
    if isinstance(job, Pretraining):
        keys = {job.trial_id: job.trial_id}
    else:
        keys = claim_keys(job, find_open_cells(job, store, settings))
    claims = Claims(store, f"{settings.invocation}/{job.trial_id}", settings.claim_seconds)
    return keys if claims.held_by_others(keys.values()) == set(keys.values()) else {}


def find_open_cells(trial: Trial, store: Store, settings: RunSettings) -> list[Cell]:
    """The cells without a result; one that failed since the program was started has had its turn."""
    rows = store.load_rows(cell.cell_id for cell in trial.cells)
    settled = {cell_id for cell_id, row in rows.items() if row.status == "ok" or is_of_this_start(row, settings)}
    return [cell for cell in trial.cells if cell.cell_id not in settled]


def is_of_this_start(row: ResultRow, settings: RunSettings) -> bool:
    """Whether a row was made since the program was started, and not by an earlier run."""
    return row.provenance.get("invocation") == settings.invocation


def _is_taken(resolved: ResolvedTrial, category: str, settings: RunSettings) -> bool:
    try:
        return is_being_extracted(resolved, category, settings)
    except Exception:
        return False  # whatever is wrong here is told by the group itself, as the reason of its rows


def fit_groups(resolved: ResolvedTrial, cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that share one fit: each alone, or all of them for a dataset-wide method."""
    if resolved.method.scope == "dataset":
        return [list(cells)] if cells else []
    return [[cell] for cell in cells]


def run_group(
    resolved: ResolvedTrial,
    cells: list[Cell],
    store: Store,
    settings: RunSettings,
    notify: Notify,
    workers: Workers = ALONE,
    observer: Observer | None = None,
) -> Iterator[ResultRow]:
    """Fits once and scores each cell; a cell whose raw predictions are stored is only scored again."""
    stored: dict[Cell, StoredPrediction | None] = {}
    try:
        if workers.leads:
            _count_attempt(cells, store, settings)
            stored = {cell: store.load_prediction(cell.prediction_id) for cell in cells}
        notify(cells[0].category, "reading images", 0, 1)
        data = read_group(resolved, cells, settings)
        fresh = workers.agree([cell for cell, prediction in stored.items() if prediction is None])
        was_killed = workers.size == 1 and store.exists(memory_key(resolved.trial, settings))
        if fresh:
            fitted, frugal = _fit(resolved, data, store, settings, notify, workers, observer, was_killed)
    except Exception as error:
        yield from _save_failed(store, resolved.trial, cells, error, settings, workers)
        return
    for cell in cells:
        prediction = stored.get(cell)
        try:
            if cell in fresh:
                try:
                    prediction = fitted.predict(cell)
                except Exception as error:
                    if frugal or workers.size > 1 or not is_out_of_memory(error):
                        raise
                    fitted, frugal = _fit(resolved, data, store, settings, notify, workers, observer, True)
                    prediction = fitted.predict(cell)
        except Exception as error:
            yield from _save_failed(store, resolved.trial, [cell], error, settings, workers)
        else:
            if workers.leads:
                assert prediction is not None
                rescored = cell not in fresh
                yield _finish(resolved, cell, data[cell.category], prediction, rescored, store, settings, notify)


def _fit(
    resolved: ResolvedTrial,
    data: Mapping[str, CategoryData],
    store: Store,
    settings: RunSettings,
    notify: Notify,
    workers: Workers,
    observer: Observer | None,
    frugal: bool,
) -> tuple[FittedMethod, bool]:
    """A fitted method, and whether it took less memory than usual: once more where it ran out of it.

    The workers of a group fit in step, so none of them tries again by itself.
    """
    if not frugal:
        try:
            return FittedMethod(resolved, data, store, settings, notify, workers, observer), False
        except Exception as error:
            if workers.size > 1 or not is_out_of_memory(error):
                raise
    free_memory()
    smaller = dataclasses.replace(settings, batch_size=max(1, settings.batch_size // LESS_MEMORY))
    fitted = FittedMethod(resolved, data, store, smaller, notify, workers, observer)
    fitted.warnings.append(f"run again in batches of {smaller.batch_size}, out of memory before")
    return fitted, True


def memory_key(trial: Trial, settings: RunSettings) -> str:
    """Where it is noted that the process of a trial was killed because its node ran out of memory."""
    return f"attempts/{settings.invocation}/{trial.trial_id}.memory"


def _finish(
    resolved: ResolvedTrial,
    cell: Cell,
    images: CategoryData,
    prediction: StoredPrediction,
    rescored: bool,
    store: Store,
    settings: RunSettings,
    notify: Notify,
) -> ResultRow:
    """The saved row of a predicted cell: its metrics, or why there are none."""
    try:
        row, result = score_cell(resolved, cell, images, prediction, rescored, store, settings)
        store.publish_row(row)
    except StoreError:
        raise
    except Exception as error:
        row = unfinished_row(resolved.trial, cell, "failed", error, settings)
        store.publish_row(row)
    else:
        _draw(store, row, prediction, images, result, resolved, settings, notify)
    return row


def read_group(resolved: ResolvedTrial, cells: Sequence[Cell], settings: RunSettings) -> dict[str, CategoryData]:
    """The images of a group, checked to be the planned ones. Raises PlanOutdated if they are not."""
    trial, cache = resolved.trial, settings.places.cache_dir
    names = trial.categories if resolved.method.scope == "dataset" else [cell.category for cell in cells]
    reference = None if trial.trained is None else trial.trained.reference
    data = {name: read_category(resolved.dataset, name, trial.shots, trial.seed, cache, reference) for name in names}
    here = identify_cells(resolved, data)
    for cell in cells:
        if cell not in here:
            raise PlanOutdated(
                f"dataset {trial.dataset.name!r}, category {cell.category!r}: images, masks or weights are not those "
                f"that were planned (changed since, or another copy on this node); run the same command again"
            )
    return data


def score_cell(
    resolved: ResolvedTrial,
    cell: Cell,
    data: CategoryData,
    prediction: StoredPrediction,
    rescored: bool,
    store: Store,
    settings: RunSettings,
) -> tuple[ResultRow, Evaluation]:
    """Metrics of one cell as a row, and the image scores behind them, which are saved for reports and comparisons."""
    start = time.perf_counter()
    own_score = resolved.trial.protocol.score_reduction == "method"
    truth = None
    if data.has_masks:
        truth = load_truth(data.test, data.truth_id, resolved.preprocessing, settings.places.cache_dir)
    labels, sample_ids = [sample.label for sample in data.test], [sample.sample_id for sample in data.test]
    result = evaluate(prediction, labels, truth, resolved.protocol, own_score, sample_ids)
    store.publish_scores(cell.cell_id, score_columns(data.test, result))
    costs = {**prediction.facts["costs"], "evaluate_seconds": round(time.perf_counter() - start, 4)}
    row = finished_row(resolved, cell, data, result, prediction.facts, costs, rescored, settings)
    return row, result


def _draw(
    store: Store,
    row: ResultRow,
    prediction: StoredPrediction,
    data: CategoryData,
    result: Evaluation,
    resolved: ResolvedTrial,
    settings: RunSettings,
    notify: Notify,
) -> None:
    """What reports show of a cell whose row is saved; a picture that fails costs no number, a report draws it again."""
    try:
        publish_details(store, row, prediction, data.test, result, settings.pictures)
        if settings.pictures:
            smoothing = float(resolved.protocol.smoothing)
            publish_sheet(store, row, prediction, data.test, result.image_scores, resolved.preprocessing, smoothing)
    except Exception as error:
        notify(row.category, f"no picture: {type(error).__name__}: {error}", 0, 1)


def _count_attempt(cells: Sequence[Cell], store: Store, settings: RunSettings) -> None:
    attempt = max(store.count_attempt(settings.invocation, cell.cell_id) for cell in cells)
    if attempt > MAX_ATTEMPTS:
        raise WorkerDied(f"the worker died {attempt - 1} times while it ran this cell (killed, or out of memory)")


def _save_failed(
    store: Store, trial: Trial, cells: Sequence[Cell], error: Exception, settings: RunSettings, workers: Workers
) -> Iterator[ResultRow]:
    if is_lost_worker(error) or isinstance(error, StoreError):
        raise error  # the group starts again, and attempts are counted; or no row can be saved
    for cell in cells:
        row = unfinished_row(trial, cell, "failed", error, settings)
        store.publish_row(row)
        yield row
    if workers.size > 1:
        raise error
