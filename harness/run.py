"""The main job: a search space goes in; rows, matrices, pictures and MLflow runs come out."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from harness.claims import Claims
from harness.contracts import AdgridError, Job, Pretraining, ResultRow, RunSettings, Trial
from harness.identity import canonical_json
from harness.options import RunOptions
from harness.placement import check_placement, read_cluster_limits
from harness.plan import Plan, make_plan
from harness.progress import Listener, ProgressBoard, find_varied
from harness.report import rows_frame
from harness.run_folder import StudyOutcome, conclude_study, keep_plan, read_run
from harness.run_report import is_made, remake_report
from harness.space import load_space
from harness.store import Store, StoreError, join_root
from harness.study import Ledger, Study
from harness.tracker import Tracker

if TYPE_CHECKING:
    import pandas as pd


_TRIM_SECONDS = 30.0  # least time between two looks at what predictions take, which lists them all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run left behind."""

    plan: Plan
    rows: tuple[ResultRow, ...]
    """One row per reported cell: those of the plan in its order, then those of the best configurations."""
    studies: tuple[StudyOutcome, ...]
    """What was searched, in the order of the plan."""
    num_computed: int
    """Rows of this start; the others were there before."""
    run_folder: str
    """Path or URI of the run folder."""
    tracking_uri: str | None
    notes: tuple[str, ...]
    """What a person should be told beside the results."""

    @property
    def num_failed(self) -> int:
        """Reported cells without a number, and samples of studies that failed."""
        samples = [result.status for study in self.studies for result in study.results]
        missing = self.plan.num_reported - sum(row.status == "ok" for row in self.rows)
        return missing + samples.count("failed") + samples.count("open")

    @property
    def num_samples(self) -> int:
        """Configurations that studies have tried."""
        return sum(len(study.results) for study in self.studies)


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
    if not plan.trials and not plan.studies:
        raise AdgridError(f"{space_path}: nothing can run, everything it names is missing")
    store = Store(options.root)
    settings = RunSettings(
        root=store.root,
        places=options.places,
        run_id=plan.run_id,
        command=command,
        invocation=uuid.uuid4().hex,
        cache_gib=options.cache_gib,
        checkpoint_seconds=options.checkpoint_seconds,
        save_fitted=options.save_fitted,
        pictures=options.pictures,
    )
    try:
        store.publish(f"runs/{plan.run_id}/space.json", canonical_json(plan.space.model_dump(mode="json")).encode())
        keep_plan(store, plan, command, [conclude_study(study, store) for study in plan.studies])
    except StoreError as error:
        raise AdgridError(
            f"--root {options.root}: cannot be written ({error.__cause__}); name a writable folder or URI"
        ) from error
    keeper = _Keeper(store, options.prediction_gib)
    # Several runs of a space share its cells; one of them at a time mirrors them and writes the report.
    claims, key = Claims(store, settings.invocation, settings.claim_seconds), f"run-{plan.run_id}"
    with ExitStack() as stack:
        lead = claims.take(key)
        if lead is not None:
            stack.enter_context(lead)
        tracker = stack.enter_context(Tracker(options, store, plan))
        if lead is not None:
            tracker.start()
        with _Crew(store, settings, options, console, [tracker, keeper], plan.pretrainings) as crew:
            plain = [study for study in plan.studies if not study.search.is_adaptive]
            crew.run_trials([*plan.trials, *(sample.trial for study in plain for sample in study.samples)])
            crew.run_studies([study for study in plan.studies if study.search.is_adaptive])
            studies = [conclude_study(study, store) for study in plan.studies]
            crew.run_trials([trial for study in studies for trial in study.winners])
        if lead is None:
            with console.status("waiting for another run of this space to write the report"):
                stack.enter_context(claims.wait_for(key))
            tracker.start()
        store.fold_rows()
        keeper.trim()
        keep_plan(store, plan, command, studies)
        record = read_run(store, plan.run_id)
        # Of a run to which nothing has come since, everything is there already.
        if not (is_made(store, record) and tracker.holds(record)):
            with store.told("written"):
                files = remake_report(store, record)
            with console.status("mirroring to MLflow"):
                tracker.finish(record, files)
    without = [study.study.name for study in studies if not study.winners]
    notes = [f"{name}: no configuration finished, so there is none to report" for name in without]
    return Outcome(
        plan=plan,
        rows=record.rows,
        studies=tuple(studies),
        num_computed=crew.num_computed,
        run_folder=join_root(store.root, "runs", plan.run_id),
        tracking_uri=tracker.uri,
        notes=(*notes, *tracker.notes),
    )


class _Crew(ExitStack):
    """Runs what is open of trials and studies; Ray is started when there is something to run, and serves all phases."""

    def __init__(
        self,
        store: Store,
        settings: RunSettings,
        options: RunOptions,
        console: Console,
        listeners: Sequence[Listener],
        pretrainings: Sequence[Pretraining],
    ) -> None:
        super().__init__()
        self._store, self._settings, self._options, self._console = store, settings, options, console
        self._listeners, self._pretrainings = listeners, pretrainings
        self._nodes: list[dict[str, float]] | None = None
        self.num_computed = 0

    def run_trials(self, trials: Sequence[Trial]) -> None:
        """Runs the trials that have a cell without a number."""
        cells = [cell.cell_id for trial in trials for cell in trial.cells]
        rows = self._store.load_rows(cells)
        done = {cell_id for cell_id in cells if cell_id in rows and rows[cell_id].status == "ok"}
        still_open = [trial for trial in trials if any(cell.cell_id not in done for cell in trial.cells)]
        if still_open:
            from harness.sweep import run_trials

            missing = self._missing_for(still_open)
            nodes = self._connect([*missing, *still_open])
            jobs, varied = len(still_open) + len(missing), find_varied(trials)
            with ProgressBoard(self._console, len(cells), len(done), jobs, varied) as board:
                computed = run_trials(still_open, self._settings, [board, *self._listeners], nodes, missing)
            self.num_computed += len(computed)

    def _missing_for(self, trials: Sequence[Trial]) -> list[Pretraining]:
        """The representations that trials need and the store has not."""
        needed = {trial.trained.artifact_id for trial in trials if trial.trained is not None}
        return [one for one in self._pretrainings if one.trial_id in needed and not self._store.has_state(one.trial_id)]

    def run_studies(self, studies: Sequence[Study]) -> None:
        """Runs the studies that have a sample to run or to propose."""
        results = [result for study in studies for result in Ledger(study, self._store).results()]
        wanted = sum(len(study.samples) or study.search.num_samples for study in studies)
        if sum(result.status in ("finished", "stopped") for result in results) < wanted:
            from harness.studies import run_studies
            from harness.sweep import run_trials

            templates = [study.template for study in studies]
            missing = self._missing_for(templates)
            nodes = self._connect([*missing, *templates])
            if missing:
                with ProgressBoard(self._console, 0, 0, len(missing)) as board:
                    run_trials([], self._settings, [board, *self._listeners], nodes, missing)
                failed = {one.trial_id for one in self._missing_for(templates)}
                studies = [
                    study
                    for study in studies
                    if study.template.trained is None or study.template.trained.artifact_id not in failed
                ]
            cells = sum(study.search.num_samples * len(study.categories) for study in studies)
            done = sum(row.status in ("ok", "stopped") for result in results for row in result.rows.values())
            with ProgressBoard(self._console, cells, done, wanted) as board:
                computed = run_studies(studies, self._settings, [board, *self._listeners], nodes)
            self.num_computed += len(computed)

    def _connect(self, jobs: Sequence[Job]) -> list[dict[str, float]] | None:
        """Starts or joins Ray once; what each node has, or None where an autoscaler may add some."""
        # Imported here: a run that finds everything done never starts Ray, nor pays for importing it.
        from harness.sweep import connect, list_nodes, list_reported_limits

        if self._nodes is None:
            with self._console.status("starting Ray"):
                self.enter_context(connect(self._options.address, self._options.num_cpus))
        self._nodes = list_nodes()
        if self._options.address is None:
            check_placement(jobs, self._nodes)
        elif self._options.cluster_config is not None:
            limits = read_cluster_limits(self._options.cluster_config)
            check_placement(jobs, [*self._nodes, *limits], "raise the limits of the autoscaler")
        else:
            more = "add nodes, or name the file of an autoscaler that may add some with --cluster-config"
            check_placement(jobs, [*self._nodes, *list_reported_limits()], more)
        return self._nodes if self._options.address is None else None


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


class _Keeper(Listener):
    """Keeps the stored predictions within their bound while trials end."""

    def __init__(self, store: Store, most_gib: float) -> None:
        self._store, self._most_bytes = store, most_gib * 2**30
        self._next = 0.0

    def ended(self, trial: Job) -> None:
        if time.monotonic() >= self._next:
            self.trim()
            self._next = time.monotonic() + _TRIM_SECONDS

    def trim(self) -> None:
        self._store.trim_predictions(self._most_bytes)
