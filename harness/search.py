"""What a sweep searches: distributions of parameters, named draws from them, and the `search:` block of a space.

Everything here is plain arithmetic on values of a search space; `harness/studies.py` runs what it describes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from harness.contracts import AdgridError, derive_seed
from harness.metrics import METRICS
from harness.registry import suggest

Kind = Literal["uniform", "loguniform", "quniform", "randint", "choice"]
KINDS: dict[str, str] = {
    "uniform": "[low, high]",
    "loguniform": "[low, high], 0 < low",
    "quniform": "[low, high, step]",
    "randint": "[low, high], whole numbers, high left out",
    "choice": "[value, ...]",
}
"""The distributions, by Ray Tune's names, with the form of what follows."""
DIGITS = 4
"""Significant digits of a drawn number: enough for any search, few enough to be written down and to keep ids stable."""


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Where the values of one parameter come from."""

    kind: Kind
    values: tuple[Any, ...]
    """Bounds (with the step of `quniform`), or what may be chosen."""

    def at(self, share: float) -> Any:
        """The value below which this share of all draws lies; `share` in [0, 1)."""
        low, high = self.encoded_bounds
        if self.kind == "uniform":
            return self.decode(low + share * (high - low))
        if self.kind == "loguniform":
            return self.decode(low * math.exp(share * math.log(high / low)))
        return self.decode(low + int(share * (high - low + 1)))

    def encode(self, value: Any) -> float | int:
        """A value as a number on an even scale, as a searcher likes it: choices and steps are counted."""
        if self.kind == "choice":
            return self.values.index(value)
        return round(value / self.values[2]) if self.kind == "quniform" else value

    def decode(self, number: float) -> Any:
        """The value behind a number that a searcher proposes, as `at` would give it."""
        if self.kind == "choice":
            return self.values[int(number)]
        if self.kind == "randint":
            return int(number)
        if self.kind == "quniform":
            return _round(int(number) * self.values[2], 12)
        return min(max(_round(float(number), DIGITS), self.values[0]), self.values[1])

    @property
    def encoded_bounds(self) -> tuple[float, float]:
        """The least and the largest `encode` gives; whole numbers but for the two continuous kinds."""
        if self.kind == "choice":
            return 0, len(self.values) - 1
        low, high = self.values[:2]
        if self.kind == "randint":
            return low, high - 1
        if self.kind == "quniform":
            return math.ceil(low / self.values[2] - 1e-9), math.floor(high / self.values[2] + 1e-9)
        return low, high

    @property
    def probes(self) -> list[Any]:
        """Values that stand for all: every choice, or both ends and what lies between."""
        if self.kind == "choice":
            return list(self.values)
        return list(dict.fromkeys(self.at(share) for share in (0.0, 0.3, 0.6, math.nextafter(1.0, 0.0))))

    def place(self, value: Any) -> float:
        """Where a value lies on the axis of a picture, in [0, 1]; the inverse of `at` for a continuous one."""
        if self.kind == "choice":
            return self.values.index(value) / max(len(self.values) - 1, 1)
        low, high = float(self.at(0.0)), float(self.at(math.nextafter(1.0, 0.0)))
        if high <= low:
            return 0.5
        if self.kind == "loguniform":
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    def __str__(self) -> str:
        return f"{self.kind} [{', '.join(map(_show, self.values))}]"


def _round(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse_distribution(value: Mapping[str, Any]) -> Distribution:
    """A distribution as a space writes it: `{loguniform: [0.01, 0.25]}`. Raises ValueError with the remedy."""
    forms = ", ".join(f"{{{kind}: {form}}}" for kind, form in KINDS.items())
    if len(value) != 1:
        raise ValueError(f"a parameter is a value, a list of values, or one distribution ({forms}), got {dict(value)}")
    ((kind, given),) = value.items()
    if kind not in KINDS:
        raise ValueError(f"unknown distribution {kind!r}{suggest(str(kind), KINDS)}; write one of {forms}")
    form = f"{{{kind}: {KINDS[kind]}}}"
    if not isinstance(given, list) or (kind != "choice" and len(given) != KINDS[kind].split("]")[0].count(",") + 1):
        raise ValueError(f"write {form}, got {given!r}")
    if kind == "choice":
        if not given:
            raise ValueError(f"{form} needs at least one value")
        if any(item in given[:place] for place, item in enumerate(given)):
            raise ValueError(f"{form} names a value twice: {given!r}")
        return Distribution("choice", tuple(given))
    whole = kind == "randint"
    for number in given:
        if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)):
            raise ValueError(f"{form} takes {'whole ' if whole else ''}numbers, got {number!r}")
        if not math.isfinite(number):
            raise ValueError(f"{form} takes finite numbers, got {number!r}")
    low, high = given[:2]
    if not low < high:
        raise ValueError(f"{form} needs low < high, got {given!r}")
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"{form} needs 0 < low, got {given!r}")
    if kind == "quniform" and not 0 < given[2] <= high - low:
        raise ValueError(f"{form} needs 0 < step <= high - low, got {given!r}")
    return Distribution(kind, tuple(given if whole else map(float, given)))  # type: ignore[arg-type]


def draw_params(distributions: Mapping[str, Distribution], method: str, seed: int, number: int) -> dict[str, Any]:
    """The values of one draw.

    A draw depends on the method, the field, the seed of the search and the draw's number: studies of one method on
    other backbones or datasets try the same configurations, and another swept field leaves the values of this one
    alone.

    Args:
        distributions: field to distribution.
        method: name of the method.
        seed: of the search.
        number: of the draw, from 0.
    """
    values = {}
    for field, distribution in distributions.items():
        rng = np.random.default_rng(derive_seed("search", method, field, seed, number))
        values[field] = distribution.at(rng.random())
    return values


def check_searcher(search: SearchEntry) -> None:
    """Raises AdgridError if a search needs Optuna and it is not installed."""
    if search.searcher == "optuna" and importlib.util.find_spec("optuna") is None:
        raise AdgridError(
            "search.searcher: optuna is not installed; `pip install 'adgrid[search]'`, or write `searcher: random`"
        )


# --- the block of a space --------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SchedulerEntry(_Strict):
    """Which trials of a study are ended early."""

    name: Literal["none", "asha", "median"] = "none"
    """`asha`: asynchronous successive halving (Li et al., arXiv 1810.05934). `median`: a trial worse than the median of
    the others at the same point ends (Golovin et al., KDD 2017)."""
    grace_period: Annotated[int, Field(ge=1)] = 1
    """Categories before a trial may end; epochs of the last stage where one training covers all its categories."""
    reduction_factor: Annotated[float, Field(gt=1, le=64)] = 2.0
    """Of `asha`: the best 1 / reduction_factor of the trials pass each rung, and rungs are this factor apart."""


def _scheduler_alone(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


TuneOn = Literal["synthetic"] | dict[str, Literal["all"] | tuple[str, ...]]


class SearchEntry(_Strict):
    """How the distributions of a space are searched: `search:`."""

    num_samples: Annotated[int, Field(ge=1)] = 10
    """Configurations per study."""
    searcher: Literal["random", "optuna"] = "random"
    """`random` is known when the run is planned; `optuna` (TPE) learns from finished trials."""
    scheduler: Annotated[SchedulerEntry, BeforeValidator(_scheduler_alone)] = SchedulerEntry()
    objective: str = "image_auroc"
    """The metric whose mean over the tuning categories is maximised."""
    tune_on: TuneOn
    """`{dataset: [category, ...]}` or `{dataset: all}`: what is tuned on and therefore not reported. `synthetic`:
    held-out training images of the reported categories, half of them with painted defects."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws; independent of the seeds of the trials."""
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    """Trials of one study at once; None for as many as there is room for, but for a quarter of `num_samples` where
    `optuna` is to learn from those that are done."""
    allow_test_tuning: bool = False
    """Tune on reported cells all the same; every row of the sweep then says so."""

    @field_validator("objective")
    @classmethod
    def _known_metric(cls, value: str) -> str:
        if value not in METRICS:
            raise ValueError(f"unknown metric {value!r}{suggest(value, METRICS)}")
        return value

    @field_validator("tune_on", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "synthetic":
            raise ValueError("write {dataset: [category, ...]}, {dataset: all} or synthetic")
        if isinstance(value, dict):
            if not value or any(names in (None, []) for names in value.values()):
                raise ValueError("name at least one dataset with at least one category")
            return {
                name: [names] if isinstance(names, str) and names != "all" else names for name, names in value.items()
            }
        return value

    @property
    def concurrency(self) -> int:
        """Trials of one study at once, as far as the search minds."""
        if self.max_concurrent is not None:
            return self.max_concurrent
        return max(1, self.num_samples // 4) if self.searcher == "optuna" else self.num_samples

    @property
    def is_adaptive(self) -> bool:
        """Whether what runs next depends on results."""
        return self.searcher != "random" or self.scheduler.name != "none"
