"""What a run leaves in its folder besides the report: its plan, and what its studies found."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.contracts import AdgridError, ResultRow, Trial, Tuned
from harness.identity import canonical_json, content_id
from harness.plan import Plan
from harness.registry import did_you_mean
from harness.rows import show_row, software_facts
from harness.store import Store, split_run
from harness.study import Ledger, SampleResult, Study, describe_study, find_best


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyOutcome:
    """What came of one study."""

    study: Study
    results: tuple[SampleResult, ...]
    """Its samples in the order in which they were proposed."""
    winners: tuple[Trial, ...]
    """The best configuration on the reported cells; none where no sample has finished."""

    @property
    def record(self) -> dict[str, Any]:
        """The study as the run folder keeps it."""
        return describe_study(self.study, self.results)


def conclude_study(study: Study, store: Store) -> StudyOutcome:
    """What a study has found, by the rows in the store."""
    results = Ledger(study, store).results()
    best = find_best(results)
    winners = () if best is None else study.make_reported(best.params)
    return StudyOutcome(study=study, results=tuple(results), winners=winners)


def foresee_studies(studies: Sequence[Study], store: Store) -> tuple[list[Trial], list[Trial]]:
    """The trials of studies that are known by now, and a template for each cell that is not.

    Unknown is what a searcher has not proposed yet, and which configuration is the best while samples are open.
    """
    known: list[Trial] = []
    unknown: list[Trial] = []
    for study in studies:
        samples = Ledger(study, store).samples()
        outcome = conclude_study(study, store)
        known += [
            sample.trial for sample, result in zip(samples, outcome.results, strict=True) if result.status != "stopped"
        ]
        missing = 0 if study.samples else study.search.num_samples - len(samples)
        unknown += [study.template] * (max(missing, 0) * len(study.categories))
        if missing > 0 or any(result.status in ("open", "failed") for result in outcome.results):
            unknown += [study.template] * study.num_reported
        else:
            known += outcome.winners
    return known, unknown


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its folder and the rows in the store tell it."""

    run_id: str
    name: str
    command: str
    num_expected: int
    """Cells that the report is to be about."""
    rows: tuple[ResultRow, ...]
    """Those that exist, as this run shows them."""
    studies: tuple[dict[str, Any], ...]
    """See `harness.study.describe_study`."""
    sample_rows: tuple[ResultRow, ...]
    """Of the studies' samples."""
    categories: Mapping[str, Sequence[str]]
    """What each trial is to score, by trial id; absent in run folders of earlier versions."""

    @functools.cached_property
    def digest(self) -> str:
        """Of all that the run's report and its mirror are made of, and of the software that makes them."""
        rows = [
            (row.cell_id, row.trial_id, row.status, row.provenance.get("finished_at", ""))
            for row in (*self.rows, *self.sample_rows)
        ]
        told = (self.run_id, self.name, self.command, self.num_expected, self.studies, dict(self.categories))
        software = software_facts()
        return content_id([told, rows, software["adgrid_version"], software["git_commit"]])


def keep_plan(store: Store, plan: Plan, command: str, studies: Sequence[StudyOutcome]) -> None:
    """Writes down what `read_run` reads."""
    trials = [*plan.trials, *(trial for study in studies for trial in study.winners)]
    samples = [(study, result) for study in studies for result in study.results]
    record = {
        "name": plan.space.name,
        "run_id": plan.run_id,
        "command": command,
        "num_expected": plan.num_reported,
        "trials": [_trial_record(trial) for trial in trials],
        "samples": [_trial_record(study.study.make_trial(result.params)) for study, result in samples],
        "studies": [study.record for study in studies],
    }
    store.publish(f"runs/{plan.run_id}/plan.json", canonical_json(record).encode())


def _trial_record(trial: Trial) -> dict[str, Any]:
    tuned = None if trial.tuned is None else dataclasses.asdict(trial.tuned)
    return {
        "trial_id": trial.trial_id,
        "tuned": tuned,
        "cell_ids": [cell.cell_id for cell in trial.cells],
        "categories": list(trial.categories),
    }


def find_run(word: str, root: str) -> tuple[Store, RunRecord]:
    """A run by its id under a storage root, or by its folder: `results/runs/NAME` and `NAME` mean the same run.

    Raises:
        AdgridError: there is none.
    """
    base, run_id = split_run(word)
    store = open_store(root if base is None else base)
    try:
        return store, read_run(store, run_id)
    except FileNotFoundError as error:
        known = store.folders("runs")
        hint = did_you_mean(run_id, known) or (f"; there are {', '.join(known[:12])}" if known else "")
        raise AdgridError(f"{word}: no such run under {store.root}/runs{hint}") from error


def open_store(root: str) -> Store:
    """A storage root that is there already. Raises AdgridError if it is not."""
    if "://" not in root and not Path(root).expanduser().is_dir():
        raise AdgridError(f"--root {root}: no such folder; name the storage root that `adgrid run` wrote to")
    return Store(root)


def read_run(store: Store, run_id: str) -> RunRecord:
    """A run by its id. Raises FileNotFoundError if the store has none of that name."""
    record = json.loads(store.read(f"runs/{run_id}/plan.json"))
    listed = [*record["trials"], *record["samples"]]
    rows = store.load_rows({cell_id for trial in listed for cell_id in trial["cell_ids"]})

    def shown(trials: Sequence[Mapping[str, Any]]) -> tuple[ResultRow, ...]:
        return tuple(
            show_row(rows[cell_id], trial["trial_id"], trial["tuned"] and Tuned(**trial["tuned"]))
            for trial in trials
            for cell_id in trial["cell_ids"]
            if cell_id in rows
        )

    return RunRecord(
        run_id=run_id,
        name=record["name"],
        command=record["command"],
        num_expected=record["num_expected"],
        rows=shown(record["trials"]),
        studies=tuple(record["studies"]),
        sample_rows=shown(record["samples"]),
        categories={trial["trial_id"]: trial["categories"] for trial in listed if "categories" in trial},
    )
