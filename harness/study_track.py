"""A study under way: what was tried, what waits, and a searcher and a scheduler of Ray Tune that know nothing else."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from harness.contracts import derive_seed
from harness.search import Distribution
from harness.store import Store
from harness.study import FINAL, Ledger, Sample, Study
from harness.study_plan import MAX_REDRAWS

MEDIAN_NEEDS = 3
"""Samples that must have come as far before the median rule stops another."""


@dataclasses.dataclass(kw_only=True, eq=False)
class Run:
    """A sample that Tune has, or had."""

    track: Track
    sample: Sample
    suggestion: str | None
    """Under which Optuna waits to be told; None for a sample that it did not suggest now."""
    reports: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """(time, score) as they came."""
    stopped: str = ""
    """Why the scheduler ended it."""
    ended: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class _Replayed:
    """Stands for a trial of an earlier start, of which schedulers look at nothing but the id."""

    trial_id: str


class Track:
    """A study under way: what was tried, what waits, and the searcher and scheduler that know of nothing else."""

    def __init__(self, study: Study, store: Store) -> None:
        self.study = study
        self.num_live = 0
        self.scheduler = _make_scheduler(study)
        self._ledger = Ledger(study, store)
        self._waiting: deque[Sample] = deque()
        self._scores: dict[str, float | None] = {}
        """The last score of every sample known, by trial id; None while there is none."""
        samples = self._ledger.samples()
        self._optuna = _make_optuna(study, len(samples)) if study.search.searcher == "optuna" else None
        self._exhausted = self._optuna is None
        for sample, result in zip(samples, self._ledger.results(), strict=True):
            reports = self._ledger.reports(sample) or [(time, score) for time, score in enumerate(result.scores, 1)]
            self._scores[sample.trial.trial_id] = reports[-1][1] if reports else None
            if result.status in ("finished", "stopped"):
                self._replay(sample, reports)
            elif sample.number < study.search.num_samples:
                self._waiting.append(sample)

    @property
    def last_time(self) -> int:
        """The time of a sample's last score, after which there is nothing to decide."""
        return FINAL if self.study.by_epochs else len(self.study.categories)

    @property
    def has_more(self) -> bool:
        """Whether there is something to run, or to be suggested."""
        return bool(self._waiting) or not (self._exhausted or len(self._scores) >= self.study.search.num_samples)

    def _replay(self, sample: Sample, reports: Sequence[tuple[int, float]]) -> None:
        """Tells scheduler and searcher of a sample that an earlier start has done."""
        stand_in, controller = _as_any(_Replayed(sample.trial.trial_id)), _as_any(None)
        results = [{"time": time, "score": score} for time, score in reports]
        if self.scheduler is not None and results:
            self.scheduler.on_trial_add(controller, stand_in)
            for result in results:
                if result["time"] < self.last_time:
                    self.scheduler.on_trial_result(controller, stand_in, result)
            self.scheduler.on_trial_complete(controller, stand_in, results[-1])
        if results:
            self._tell(sample, reports[-1][1])

    def _tell(self, sample: Sample, score: float) -> None:
        if self._optuna is not None:
            numbers = {field: item.encode(sample.params[field]) for field, item in self.study.distributions.items()}
            self._optuna.add_evaluated_point(numbers, score)

    def propose(self) -> Run | None:
        """The next sample, noted in the store; None where there is none."""
        run = self._next()
        if run is not None:
            self._scores.setdefault(run.sample.trial.trial_id, None)
            self._ledger.write(run.sample)
            self.num_live += 1
        return run

    def _next(self) -> Run | None:
        if self._waiting:
            return Run(track=self, sample=self._waiting.popleft(), suggestion=None)
        if not self.has_more:
            return None
        assert self._optuna is not None
        number = len(self._scores)
        for attempt in range(MAX_REDRAWS):
            name = f"{number}-{attempt}"
            numbers = self._optuna.suggest(name)
            assert numbers is not None
            params = {field: item.decode(numbers[field]) for field, item in self.study.distributions.items()}
            sample = self.study.sample(number, params)
            trial_id = sample.trial.trial_id
            if trial_id not in self._scores:
                return Run(track=self, sample=sample, suggestion=name)
            # Known already, perhaps running: the same number again teaches the searcher to look elsewhere.
            self._finish_suggestion(name, self._scores[trial_id])
        self._exhausted = True
        return None

    def hear(self, run: Run, time: int, score: float) -> None:
        """Notes a score of a running sample."""
        run.reports.append((time, score))
        self._scores[run.sample.trial.trial_id] = score
        self._ledger.write(run.sample, run.reports)

    def end(self, run: Run) -> None:
        """Tells the searcher how a sample ended."""
        if run.ended:
            return
        run.ended = True
        self.num_live -= 1
        score = run.reports[-1][1] if run.reports else None
        if run.suggestion is not None:
            self._finish_suggestion(run.suggestion, score)
        elif score is not None:
            self._tell(run.sample, score)

    def _finish_suggestion(self, name: str, score: float | None) -> None:
        assert self._optuna is not None
        self._optuna.on_trial_complete(name, None if score is None else {"score": score}, error=score is None)


def _as_any(value: object) -> Any:
    return value


def _make_scheduler(study: Study) -> TrialScheduler | None:
    entry = study.search.scheduler
    if entry.name == "none":
        return None
    common: dict[str, Any] = {"time_attr": "time", "metric": "score", "mode": "max", "grace_period": entry.grace_period}
    if entry.name == "asha":
        most = FINAL if study.by_epochs else len(study.categories)
        return ASHAScheduler(**common, max_t=most, reduction_factor=entry.reduction_factor)
    # A trial that has nothing to be compared with goes on; it never gives its place to a waiting one.
    return MedianStoppingRule(**common, min_samples_required=MEDIAN_NEEDS, min_time_slice=_as_any(math.inf))


def _make_optuna(study: Study, num_known: int) -> Any:
    """Optuna's TPE with a seed that depends on how many samples are known, so that a new start repeats none."""
    from ray.tune.search.optuna import OptunaSearch

    logging.getLogger("optuna").setLevel(logging.WARNING)
    domains = {field: _domain(item) for field, item in study.distributions.items()}
    seed = derive_seed("optuna", study.study_id, study.search.seed, num_known) % 2**32
    return OptunaSearch(OptunaSearch.convert_search_space(domains), metric="score", mode="max", seed=seed)


def _domain(distribution: Distribution) -> Any:
    low, high = distribution.encoded_bounds
    match distribution.kind:
        case "choice":
            return tune.choice(list(range(int(high) + 1)))
        case "uniform":
            return tune.uniform(low, high)
        case "loguniform":
            return tune.loguniform(low, high)
    return tune.randint(int(low), int(high) + 1)
