"""From swept grid points to studies: what is tuned on, what is reported, and that the two share no image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from harness.contracts import AdgridError, Trial, Tuned
from harness.identity import canonical_json, content_id
from harness.metrics import METRICS
from harness.registry import load_method
from harness.resolve import CategoryData
from harness.search import SearchEntry, draw_params
from harness.space import DatasetEntry, GridPoint, Space
from harness.study import Sample, Study

MAX_REDRAWS = 50
"""Draws per sample at most; a search space with fewer configurations than samples is exhausted earlier."""


class Reader(Protocol):
    """What planning knows of datasets and trials; see `harness.plan`."""

    def trial(self, point: GridPoint) -> Trial:
        """The trial of a point without distributions."""

    def categories(self, entry: DatasetEntry) -> tuple[str, ...]:
        """The categories of a dataset that the space picks."""

    def data(self, point: GridPoint, category: str) -> CategoryData:
        """The images of a category as a point reads them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyPoints:
    """The grid points that share one study."""

    tuning: GridPoint
    """With the tuning dataset and its tuning categories, at the first seed."""
    reported: tuple[GridPoint, ...]
    """One per reported dataset and seed."""


def group_points(points: Sequence[GridPoint], space: Space) -> list[StudyPoints]:
    """The swept grid points by study: seeds, and datasets that are tuned elsewhere, share one.

    Raises:
        AdgridError: it is not clear which dataset a reported one is tuned on.
    """
    search = space.search
    if search is None:
        return []
    groups: dict[str, list[GridPoint]] = {}
    tuning: dict[str, GridPoint] = {}
    for point in points:
        entry = _tuning_entry(point.dataset, search, space)
        tuned = dataclasses.replace(point, dataset=entry, seed=0)
        key = repr(tuned)
        groups.setdefault(key, []).append(point)
        tuning.setdefault(key, dataclasses.replace(point, dataset=entry))
    return [StudyPoints(tuning=tuning[key], reported=tuple(members)) for key, members in groups.items()]


def _tuning_entry(entry: DatasetEntry, search: SearchEntry, space: Space) -> DatasetEntry:
    if isinstance(search.tune_on, str):
        return entry.model_copy(update={"held_out": True})
    name = entry.name
    if name not in search.tune_on:
        if len(search.tune_on) > 1:
            raise AdgridError(
                f"search.tune_on names nothing of dataset {name!r} and several others ({', '.join(search.tune_on)}), "
                f"so nothing says which of them it is tuned on; add categories of {name!r}, or keep one dataset"
            )
        (name,) = search.tune_on
    entries = [*space.datasets, *(entry for grid in space.include for entry in grid.datasets or ())]
    known = next((entry for entry in entries if entry.name == name), DatasetEntry(name=name))
    names = search.tune_on[name]
    return known.model_copy(update={"categories": None if names == "all" else tuple(names), "shots": None})


def plan_study(points: StudyPoints, space: Space, tuner: Reader, reader: Reader, taken: set[str]) -> Study:
    """One study.

    Args:
        points: its grid points.
        space: the search space.
        tuner: reads tuning points; does not narrow them to the space's `categories`.
        reader: reads reported points.
        taken: names of the studies before it; the new one is added.

    Raises:
        AdgridError: a reported cell is tuned on, or nothing is left to report, or the objective is not available.
    """
    search, tuning = space.search, points.tuning
    assert search is not None
    distributions = tuning.distributions
    reported = [
        kept
        for point in points.reported
        if (kept := _leave_out_tuned(point, tuning, search, space, reader, tuner)) is not None
    ]
    if not reported:
        raise AdgridError(
            f"search.tune_on leaves no category of {', '.join(sorted({p.dataset.name for p in points.reported}))} to "
            f"report; tune on fewer categories or on another dataset"
        )
    _check_objective(tuning, search, tuner)
    if not search.allow_test_tuning and not tuning.dataset.held_out:
        _refuse_shared_images(tuning, reported, tuner, reader)
    template = tuner.trial(_at(tuning, {name: item.probes[0] for name, item in distributions.items()}))
    how = search.model_dump(mode="json", include={"searcher", "scheduler", "objective", "seed"})
    swept = {name: [item.kind, list(item.values)] for name, item in distributions.items()}
    study_id = content_id([[cell.cell_id for cell in template.cells], swept, how])
    tuned = Tuned(
        study_id=study_id,
        fields=tuple(distributions),
        cells=tuple(f"{template.dataset.name}/{category}" for category in template.categories),
        on_test=search.allow_test_tuning,
    )

    def make_trial(params: Mapping[str, Any]) -> Trial:
        return _tag(tuner.trial(_at(tuning, params)), dataclasses.replace(tuned, is_sample=True))

    def make_reported(params: Mapping[str, Any]) -> tuple[Trial, ...]:
        return tuple(_tag(reader.trial(_at(point, params)), tuned) for point in reported)

    method = load_method(template.method)
    by_epochs = hasattr(method, "stages") and (method.scope == "dataset" or len(template.categories) == 1)
    steps = search.scheduler.grace_period
    if search.scheduler.name != "none" and not by_epochs and len(template.categories) <= steps:
        raise AdgridError(
            f"search.scheduler: {search.scheduler.name} compares trials of {template.method!r} after {steps} or more "
            f"of their categories, and {', '.join(tuned.cells)} leaves nothing to save after that; tune on more "
            f"categories, lower scheduler.grace_period, or write `scheduler: none`"
        )
    cells = [(point.dataset.name, category) for point in reported for category in point.dataset.categories or ()]
    study = Study(
        study_id=study_id,
        name=_unused_name(template, taken),
        search=search,
        distributions=distributions,
        fixed=tuning.params,
        template=_tag(template, dataclasses.replace(tuned, is_sample=True)),
        by_epochs=by_epochs,
        num_reported=len(cells),
        reported=tuple(dict.fromkeys(f"{dataset}/{category}" for dataset, category in cells)),
        make_trial=make_trial,
        make_reported=make_reported,
    )
    return study if search.searcher != "random" else dataclasses.replace(study, samples=draw_samples(study))


def draw_samples(study: Study) -> tuple[Sample, ...]:
    """The samples of a random search: `num_samples` different ones, or all there are if those are fewer."""
    samples: dict[str, Sample] = {}
    for number in range(study.search.num_samples * MAX_REDRAWS):
        params = draw_params(study.distributions, study.template.method, study.search.seed, number)
        key = canonical_json(params)
        if key not in samples:
            samples[key] = study.sample(len(samples), params)
        if len(samples) == study.search.num_samples:
            break
    return tuple(samples.values())


def _at(point: GridPoint, params: Mapping[str, Any]) -> GridPoint:
    return dataclasses.replace(point, params={**point.params, **params}, distributions={})


def _tag(trial: Trial, tuned: Tuned) -> Trial:
    # A trial of its own: what else the same configuration is part of has other categories, and so other means. Cells
    # keep their ids, and with them their rows.
    trial_id = content_id([trial.trial_id, tuned.study_id, tuned.is_sample])
    return dataclasses.replace(trial, trial_id=trial_id, tuned=tuned)


def _leave_out_tuned(
    point: GridPoint, tuning: GridPoint, search: SearchEntry, space: Space, reader: Reader, tuner: Reader
) -> GridPoint | None:
    """A point with the categories that are reported, or None where none is left."""
    categories = reader.categories(point.dataset)
    if point.dataset.name == tuning.dataset.name and not tuning.dataset.held_out and not search.allow_test_tuning:
        tuned = set(tuner.categories(tuning.dataset))
        named = set(point.dataset.categories or ()) | set(space.categories or ())
        if both := sorted(tuned & set(categories) & named):
            raise AdgridError(
                f"search.tune_on: {point.dataset.name}/{both[0]} is tuned on and reported, and a number of a cell that "
                f"chose its own configuration says nothing about new images; take {', '.join(both)} out of `tune_on` "
                f"or out of the reported categories, or stamp every row with `search.allow_test_tuning: true`"
            )
        categories = tuple(name for name in categories if name not in tuned)
    if not categories:
        return None
    return dataclasses.replace(point, dataset=point.dataset.model_copy(update={"categories": categories}))


def _check_objective(tuning: GridPoint, search: SearchEntry, tuner: Reader) -> None:
    if METRICS[search.objective].kind != "pixel":
        return
    for category in tuner.categories(tuning.dataset):
        if not tuner.data(tuning, category).has_masks:
            raise AdgridError(
                f"search.objective: {search.objective} needs masks, and {tuning.dataset.name}/{category} has none; "
                f"tune on other categories, or by image_auroc"
            )


def _refuse_shared_images(tuning: GridPoint, reported: Sequence[GridPoint], tuner: Reader, reader: Reader) -> None:
    """Names do not tell everything: one folder may go by two names. A few equal images are no sign of that."""
    seen: dict[str, str] = {}
    for category in tuner.categories(tuning.dataset):
        data = tuner.data(tuning, category)
        seen |= {data.hashes[sample.path]: f"{tuning.dataset.name}/{category}" for sample in data.test}
    for point in reported:
        for category in point.dataset.categories or ():
            data = reader.data(point, category)
            shared = [seen[digest] for sample in data.test if (digest := data.hashes[sample.path]) in seen]
            if 2 * len(shared) > len(data.test):
                raise AdgridError(
                    f"search.tune_on: {len(shared)} of the {len(data.test)} test images of {point.dataset.name}/"
                    f"{category}, which is reported, are test images of {shared[0]}, which is tuned on; leave one of "
                    f"them out, or stamp every row with `search.allow_test_tuning: true`"
                )


def _unused_name(template: Trial, taken: set[str]) -> str:
    parts = [template.method, template.backbone or "", template.dataset.name]
    parts += [template.representation] * (template.representation != "plain")
    parts += [f"{template.shots}-shots"] * (template.shots is not None)
    stem = "-".join("".join(c if c.isalnum() or c in "._-" else "_" for c in part) for part in parts if part)
    name = next(name for n in range(len(taken) + 1) if (name := f"{stem}-{n + 1}" if n else stem) not in taken)
    taken.add(name)
    return name
