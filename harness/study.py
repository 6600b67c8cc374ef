"""A study: the distributions at one grid point, the configurations that were tried, and what came of them.

A study is about one method, backbone, representation and number of shots, tuned on some categories of one dataset. It
compares its own samples alone. What was tried is read from rows; what a searcher proposed and what a scheduler heard is
kept in the store under `studies/<study_id>/`, so that a run that goes on tells both the same story again.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from harness.contracts import ResultRow, Trial
from harness.search import Distribution, SearchEntry
from harness.store import Store

FINAL = 1_000_000
"""The point in time of a sample's last score, where time counts epochs."""

SampleStatus = Literal["open", "finished", "stopped", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One configuration of a study."""

    number: int
    """From 0, in the order in which they were proposed."""
    params: Mapping[str, Any]
    """Values of the searched fields."""
    trial: Trial
    """On the tuning categories, in the study's order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What is to be searched at one grid point."""

    study_id: str
    """Hash of the grid point, the tuning cells, the distributions and how they are searched; not of how often."""
    name: str
    """Unique in its plan, fit for a file name."""
    search: SearchEntry
    distributions: Mapping[str, Distribution]
    fixed: Mapping[str, Any]
    """Parameters that the space gives single values."""
    template: Trial
    """The tuning trial with some value for each searched field."""
    by_epochs: bool
    """Whether time is counted in epochs, since one training covers all tuning categories; else in categories."""
    samples: tuple[Sample, ...] = ()
    """What is known when the run is planned: all samples of a random search, none of another."""
    num_reported: int
    """Cells on which the best configuration is reported."""
    reported: tuple[str, ...]
    """`dataset/category` of each of them, seeds aside."""
    make_trial: Callable[[Mapping[str, Any]], Trial] = dataclasses.field(repr=False, compare=False)
    """The tuning trial of a configuration."""
    make_reported: Callable[[Mapping[str, Any]], tuple[Trial, ...]] = dataclasses.field(repr=False, compare=False)
    """The trials of a configuration on the reported cells, one per dataset and seed."""

    @property
    def categories(self) -> tuple[str, ...]:
        """The tuning categories in the order in which every sample sees them."""
        return self.template.categories

    @property
    def tuned_on(self) -> tuple[str, ...]:
        """`dataset/category` of the tuning cells."""
        return tuple(f"{self.template.dataset.name}/{category}" for category in self.categories)

    def sample(self, number: int, params: Mapping[str, Any]) -> Sample:
        """A configuration as a sample of this study."""
        return Sample(number=number, params=dict(params), trial=self.make_trial(params))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleResult:
    """A sample with its rows."""

    number: int
    params: Mapping[str, Any]
    objective: str
    cell_ids: Mapping[str, str]
    """Tuning category to cell, in the study's order."""
    rows: Mapping[str, ResultRow]
    """By category; those that exist."""

    @property
    def status(self) -> SampleStatus:
        """`stopped` by a scheduler and `finished` are final; `failed` and `open` are run (again) by the next run."""
        found = [row.status for row in self.rows.values()]
        if found.count("ok") == len(self.cell_ids):
            return "finished"
        if any(status in ("failed", "skipped") for status in found):
            return "failed"
        return "stopped" if "stopped" in found else "open"

    @property
    def scores(self) -> list[float]:
        """Mean objective over the first category, the first two, ..., as far as they are done without a gap."""
        return running_means(self.rows, tuple(self.cell_ids), self.objective)

    @property
    def score(self) -> float | None:
        """Mean objective over all tuning categories; None unless all are done and have it."""
        scores = self.scores
        return scores[-1] if len(scores) == len(self.cell_ids) else None


def running_means(rows: Mapping[str, ResultRow], categories: Sequence[str], objective: str) -> list[float]:
    """Mean objective over the first k categories for k = 1, 2, ..., up to the first that is not done.

    Args:
        rows: by category.
        categories: in the study's order.
        objective: name of a metric; a row without it ends the list.
    """
    values: list[float] = []
    means = []
    for category in categories:
        row = rows.get(category)
        if row is None or row.status != "ok" or objective not in row.metrics:
            break
        values.append(row.metrics[objective])
        means.append(statistics.fmean(values))
    return means


def find_best(results: Sequence[SampleResult]) -> SampleResult | None:
    """The finished sample with the highest score, the first of equals; None where none has finished."""
    scored = [result for result in results if result.score is not None]
    return max(scored, key=lambda result: (result.score, -result.number), default=None)


def read_result(sample: Sample, objective: str, rows: Mapping[str, ResultRow]) -> SampleResult:
    """A sample with its rows out of `rows`, which are by cell id."""
    cell_ids = {cell.category: cell.cell_id for cell in sample.trial.cells}
    return make_result(sample.number, sample.params, objective, cell_ids, rows)


def make_result(
    number: int,
    params: Mapping[str, Any],
    objective: str,
    cell_ids: Mapping[str, str],
    rows: Mapping[str, ResultRow],
) -> SampleResult:
    """The same from the parts of a sample that a run folder keeps."""
    found = {category: rows[cell_id] for category, cell_id in cell_ids.items() if cell_id in rows}
    return SampleResult(number=number, params=params, objective=objective, cell_ids=cell_ids, rows=found)


# --- what a searcher proposed and a scheduler heard ----------------------------------------------------------------


class Ledger:
    """The samples of one study in the store, each with what its scheduler has heard of it."""

    def __init__(self, study: Study, store: Store) -> None:
        self._study, self._store = study, store
        self._prefix = f"studies/{study.study_id}"

    def samples(self) -> list[Sample]:
        """Every sample known: those of the plan, and those that were proposed earlier, in order."""
        found = {sample.trial.trial_id: sample for sample in self._study.samples}
        if not self._study.samples:
            for name in self._store.names(self._prefix):
                record = json.loads(self._store.read(f"{self._prefix}/{name}"))
                sample = self._study.sample(record["number"], record["params"])
                found.setdefault(sample.trial.trial_id, sample)
        return sorted(found.values(), key=lambda sample: sample.number)

    def write(self, sample: Sample, reports: Sequence[tuple[int, float]] = ()) -> None:
        """Notes a sample and its (time, score) so far; called again as it goes on."""
        record = {"number": sample.number, "params": dict(sample.params), "reports": list(reports)}
        self._store.publish(self._key(sample), json.dumps(record, sort_keys=True).encode())

    def reports(self, sample: Sample) -> list[tuple[int, float]]:
        """What was heard of a sample."""
        try:
            record = json.loads(self._store.read(self._key(sample)))
        except FileNotFoundError:
            return []
        return [(time, score) for time, score in record["reports"]]

    def results(self) -> list[SampleResult]:
        """Every sample with its rows."""
        samples = self.samples()
        rows = self._store.load_rows(cell.cell_id for sample in samples for cell in sample.trial.cells)
        return [read_result(sample, self._study.search.objective, rows) for sample in samples]

    def _key(self, sample: Sample) -> str:
        return f"{self._prefix}/{sample.trial.trial_id}.json"


# --- what a run folder keeps of a study ----------------------------------------------------------------------------


def describe_study(study: Study, results: Sequence[SampleResult]) -> dict[str, Any]:
    """Plain values, enough to tell the study's story again from rows alone; the inverse is `read_study`."""
    template = study.template
    return {
        "study_id": study.study_id,
        "name": study.name,
        "method": template.method,
        "backbone": template.backbone,
        "representation": template.representation,
        "shots": template.shots,
        "search": study.search.model_dump(mode="json"),
        "distributions": {
            field: {distribution.kind: list(distribution.values)} for field, distribution in study.distributions.items()
        },
        "fixed": dict(study.fixed),
        "by_epochs": study.by_epochs,
        "tuned_on": list(study.tuned_on),
        "reported": list(study.reported),
        "samples": [
            {"number": result.number, "params": dict(result.params), "cell_ids": dict(result.cell_ids)}
            for result in results
        ],
    }


def read_study(record: Mapping[str, Any], rows: Mapping[str, ResultRow]) -> list[SampleResult]:
    """The samples of a study as `describe_study` kept it, with their rows by cell id."""
    objective = record["search"]["objective"]
    return [
        make_result(item["number"], item["params"], objective, item["cell_ids"], rows) for item in record["samples"]
    ]
