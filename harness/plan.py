"""From a search space to trials and cells: what is done, what is missing, what it will take. Computes no feature."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.auxiliary import LabelledCategory, read_labelled
from harness.backbones import check_layers, choose_layers, level_shapes, resolve_backbone
from harness.contracts import AdgridError, Dataset, DatasetRef, Places, Pretraining, Resources, ResultRow, Trial
from harness.datasets.checks import Counts, compare_counts
from harness.footprint import predict_footprint
from harness.identity import content_id
from harness.plan_representations import RepresentationPlanner
from harness.registry import build_config, build_dataset, check_params, load_method, suggest
from harness.resolve import CategoryData, identify_cells, read_category, resolve_trial
from harness.search import check_searcher
from harness.space import BackboneEntry, DatasetEntry, GridPoint, Space, grid_points
from harness.study import Study
from harness.study_plan import group_points, plan_study

OnProgress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Missing:
    """Something a space names that is not on this machine."""

    kind: str
    """`dataset`, `weights` or `checkpoint`."""
    name: str
    reason: str
    """Why, and how to get it."""
    num_trials: int
    """Trials that cannot run without it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run would do."""

    space: Space
    run_id: str
    trials: tuple[Trial, ...]
    """Of the configurations that the space names."""
    missing: tuple[Missing, ...]
    pretrainings: tuple[Pretraining, ...] = ()
    """Representations that are trained first, unless the store has them."""
    warnings: tuple[str, ...] = ()
    """Data that can be used but are not as published."""
    studies: tuple[Study, ...] = ()
    """What is searched; the best configuration of each is reported like a trial."""

    @property
    def cell_ids(self) -> list[str]:
        """Ids of all cells, in the order of the trials."""
        return [cell.cell_id for trial in self.trials for cell in trial.cells]

    @property
    def num_reported(self) -> int:
        """Cells that the report will be about: those of the trials, and those of each study's best configuration."""
        return len(self.cell_ids) + sum(study.num_reported for study in self.studies)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a plan is, by the rows in a store."""

    done: int
    rescore: int
    """Cells to do whose raw predictions are stored."""
    failed: int
    """Cells to do that failed before."""
    todo: int
    """Cells to do in all."""
    estimated_seconds: float | None
    """Seconds of work on one worker, from earlier rows of the same method and backbone; None without any."""


def make_plan(
    space: Space,
    places: Places,
    random_weights: bool = False,
    notify: OnProgress = lambda *_: None,
    download: bool = False,
) -> Plan:
    """Lists trials and cells of a space with their ids; reads file lists and hashes files, computes nothing.

    Args:
        space: the checked search space.
        places: where data lie and hashes are cached.
        random_weights: use random weights for every backbone; rows are stamped.
        notify: told about hashing progress.
        download: fetch weights that are not here from the hub.

    Raises:
        AdgridError: an unknown category or layer, a broken dataset layout, more shots than images.
    """
    points = grid_points(space)
    if not points:
        raise AdgridError(f"space {space.name!r}: `exclude` leaves nothing to run; remove a rule")
    reader = _Reader(space, places, notify, download, random_weights)
    missing: dict[tuple[str, str], list[str]] = {}
    trials: dict[str, Trial] = {}
    for point in points:
        if point.distributions:
            continue
        lacks = reader.lacks(point)
        for key, reason in lacks.items():
            missing.setdefault(key, []).append(reason)
        if not lacks:
            trial = reader.trial(point)
            known = trials.get(trial.trial_id)
            trials[trial.trial_id] = trial if known is None else _join(known, trial)
    if space.search is not None:
        check_searcher(space.search)
    # What is tuned on is not narrowed by the space's `categories`, which are those that are reported.
    tuner = _Reader(space.model_copy(update={"categories": None}), places, notify, download, random_weights)
    studies: list[Study] = []
    names: set[str] = set()
    for group in group_points([point for point in points if point.distributions], space):
        lacks = tuner.lacks(group.tuning)
        for point in group.reported:
            lacks |= reader.lacks(point)
        for key, reason in lacks.items():
            missing.setdefault(key, []).append(reason)
        if not lacks:
            notify(f"study {len(studies) + 1}", len(studies), 0)
            studies.append(plan_study(group, space, tuner, reader, names))
    if not missing:
        reader.check_categories()
    reader.check_selection()
    described = space.model_dump(mode="json")
    if space.search is None:
        del described["search"]  # so that spaces without a sweep keep their run folders
    return Plan(
        space=space,
        run_id=f"{space.name}-{content_id([described, random_weights], 8)}",
        trials=tuple(_share_layers(_spread(list(trials.values())))),
        missing=tuple(
            Missing(kind=kind, name=name, reason=reasons[0], num_trials=len(reasons))
            for (kind, name), reasons in missing.items()
        ),
        pretrainings=tuple({**tuner.representations.pretrainings, **reader.representations.pretrainings}.values()),
        warnings=tuple({**reader.warnings, **tuner.warnings}),
        studies=tuple(studies),
    )


class _Reader:
    """Looks at each dataset, category and backbone once, however many trials share it."""

    def __init__(self, space: Space, places: Places, notify: OnProgress, download: bool, random_weights: bool) -> None:
        self._space, self._places, self._notify, self._download = space, places, notify, download
        self._random = random_weights
        self._labelled: dict[tuple[int, str], LabelledCategory] = {}
        self.representations = RepresentationPlanner(space, places, self._dataset, self._read_labelled)
        self._datasets: dict[DatasetRef, Dataset | str] = {}
        self._weights: dict[tuple[str, str], str | None] = {}
        self._data: dict[tuple[object, ...], CategoryData] = {}
        self._tested: dict[tuple[str, str], frozenset[str]] = {}
        """Hashes of the test images by (dataset, category)."""
        self._seen: set[str] = set()
        self.warnings: dict[str, None] = {}

    def check_categories(self) -> None:
        """Raises AdgridError for a name among the space's `categories` that no dataset has."""
        for name in self._space.categories or ():
            if name not in self._seen:
                raise AdgridError(f"categories: no dataset of the space has {name!r}{suggest(name, self._seen)}")

    def check_selection(self) -> None:
        """Raises AdgridError if a representation would be picked on images that the space reports on."""
        self.representations.check_selection(self._tested)

    def lacks(self, point: GridPoint) -> dict[tuple[str, str], str]:
        """What is not here for this point: (kind, name) -> reason."""
        lacks = {}
        dataset = self._dataset(point.dataset)
        if isinstance(dataset, str):
            lacks["dataset", point.dataset.name] = dataset
        else:
            for category in self._categories(point.dataset, dataset):
                try:
                    self._category(dataset, category, point)
                except AdgridError as error:
                    lacks["dataset", point.dataset.name] = str(error)
        if point.backbone is not None:
            reason = None if self._random else self._weights_reason(point.backbone)
            if reason:
                lacks["weights", point.backbone.name] = reason
            lacks |= self.representations.lacks(point.representation, point.backbone)
        return lacks

    def _dataset(self, entry: DatasetEntry) -> Dataset | str:
        key = entry.ref()
        if key not in self._datasets:
            dataset = build_dataset(entry.ref(), self._places)
            reason = dataset.missing()
            if not reason:
                dataset.prepare()
            self._datasets[key] = reason or dataset
        return self._datasets[key]

    def _weights_reason(self, entry: BackboneEntry) -> str | None:
        key = (entry.name, entry.weights)
        if key not in self._weights:
            # An unknown name is an error of the space; known but absent weights are listed as missing.
            resolve_backbone(entry.name, "random", self._places.cache_dir)
            try:
                resolve_backbone(entry.name, entry.weights, self._places.cache_dir, download=self._download)
                self._weights[key] = None
            except AdgridError as error:
                self._weights[key] = str(error)
        return self._weights[key]

    def trial(self, point: GridPoint) -> Trial:
        """The trial of a point, with the ids of its cells."""
        dataset = self._dataset(point.dataset)
        assert not isinstance(dataset, str)
        method = load_method(point.method.name)
        layers: tuple[str, ...] = ()
        weights, trained = "auto", None
        if point.backbone is not None:
            weights = "random" if self._random else _absolute(point.backbone.weights)
            backbone = resolve_backbone(point.backbone.name, weights, self._places.cache_dir)
            named = point.method.layers or point.backbone.layers
            layers = check_layers(backbone, named) if named else choose_layers(backbone, method.levels)
            level_shapes(backbone, layers, self._space.protocol.image_size)  # refuses a size that does not fit
            trained = self.representations.resolve(point.representation, point.backbone, layers, weights)
        where = f"methods.{point.method.name}.params"
        params = check_params(point.method.name, point.params, where)
        params |= {name: _absolute(params[name]) for name in getattr(method, "folders", ()) if params[name] is not None}
        try:
            content_id(params)
        except ValueError:
            raise AdgridError(f"{where}: NaN and infinity are no parameters, got {dict(point.params)}") from None
        ref = point.dataset.ref()
        trial = Trial(
            trial_id="",
            method=point.method.name,
            params=params,
            backbone=point.backbone.name if point.backbone else None,
            layers=layers,
            weights=weights,
            representation=point.representation.name,
            trained=trained,
            dataset=dataclasses.replace(ref, root=None if ref.root is None else _absolute(ref.root)),
            categories=self._categories(point.dataset, dataset),
            shots=point.shots,
            seed=point.seed,
            protocol=self._space.protocol.resolved(),
            resources=_resources_of(method, self._space.resources.resolved()),
            precision=self._space.precision if hasattr(method, "stages") else "float32",
        )
        resolved = resolve_trial(trial, dataset, self._places.cache_dir)
        data = {name: self._category(dataset, name, point) for name in trial.categories}
        if trained is not None:
            _check_encoding(trial)
            tests = (one.hashes[sample.path] for one in data.values() for sample in one.test)
            stamps = (*trained.stamps, *self.representations.stamps(trained, tests))
            trial = dataclasses.replace(trial, trained=dataclasses.replace(trained, stamps=stamps))
        footprint = predict_footprint(resolved, data)
        if not trial.resources.memory_gib:
            resources = dataclasses.replace(trial.resources, memory_gib=footprint.memory_gib)
            trial = dataclasses.replace(trial, resources=resources)
        trial = dataclasses.replace(trial, footprint=footprint)
        identity = [
            getattr(trial, field)
            for field in ("method", "params", "backbone", "layers", "representation", "shots", "seed", "protocol")
        ]
        identity += [] if trained is None else [trained]
        return dataclasses.replace(
            trial,
            trial_id=content_id([*identity, resolved.weights_id, trial.dataset.name]),
            cells=identify_cells(resolved, data),
        )

    def categories(self, entry: DatasetEntry) -> tuple[str, ...]:
        """The categories that the space picks of a dataset that is here."""
        return self._categories(entry, self._present(entry))

    def data(self, point: GridPoint, category: str) -> CategoryData:
        """The images of one of them, as a point reads them."""
        return self._category(self._present(point.dataset), category, point)

    def _present(self, entry: DatasetEntry) -> Dataset:
        dataset = self._dataset(entry)
        assert not isinstance(dataset, str)  # what lacks anything is not planned
        return dataset

    def _categories(self, entry: DatasetEntry, dataset: Dataset) -> tuple[str, ...]:
        known = dataset.category_names()
        for name in entry.categories or ():
            if name not in known:
                raise AdgridError(f"datasets, {entry.name!r}: unknown category {name!r}{suggest(name, known)}")
        chosen = tuple(name for name in known if name in (entry.categories or known))
        absent: tuple[str, ...] = () if entry.categories else getattr(dataset, "missing_categories", tuple)()
        if absent:
            self._warn(
                entry, f"{len(absent)} of {len(absent) + len(known)} categories are not there: {', '.join(absent)}"
            )
        self._seen.update(chosen)
        if self._space.categories is None:
            return chosen
        kept = tuple(name for name in chosen if name in self._space.categories)
        if not kept:
            raise AdgridError(
                f"categories {list(self._space.categories)} leave nothing of dataset {entry.name!r}, which has "
                f"{', '.join(chosen)}; name one of them, or leave the dataset out"
            )
        return kept

    def _category(self, dataset: Dataset, name: str, point: GridPoint) -> CategoryData:
        reference = point.representation.reference.resolved() if point.backbone is not None else None
        given = None if reference is None or reference.path is None else reference
        key = (point.dataset.ref(), name, point.shots, point.seed if point.shots is not None else 0, given)
        if key not in self._data:
            self._notify(f"hashing {dataset.name}/{name}", len(self._data), 0)
            self._data[key] = read_category(
                dataset, name, point.shots, point.seed, self._places.cache_dir, reference if given else None
            )
            data = self._data[key]
            self._tested[dataset.name, name] = frozenset(data.hashes[sample.path] for sample in data.test)
            published: Mapping[str, Counts] = getattr(dataset, "published_counts", dict)()
            for problem in compare_counts(dataset.category(name), published.get(name)):
                self._warn(point.dataset, f"category {name!r}, {problem.what}")
        return self._data[key]

    def _read_labelled(self, dataset: Dataset, name: str) -> LabelledCategory:
        key = (id(dataset), name)
        if key not in self._labelled:
            self._notify(f"hashing {dataset.name}/{name}", len(self._labelled), 0)
            self._labelled[key] = read_labelled(dataset, name, self._places.cache_dir)
        return self._labelled[key]

    def _warn(self, entry: DatasetEntry, what: str) -> None:
        check = f"adgrid datasets check {entry.name}" + (f" --layout {entry.layout}" if entry.layout else "")
        self.warnings[f"dataset {entry.name!r}: {what}; `{check}` says more"] = None


def _join(trial: Trial, twin: Trial) -> Trial:
    """One trial for two grid points that mean the same but, perhaps, for their categories."""
    if trial.dataset != twin.dataset:
        raise AdgridError(
            f"datasets: {trial.dataset.name!r} stands for two places, {trial.dataset.root} and {twin.dataset.root}; "
            f"give each its own name"
        )
    if trial.cells != twin.cells and load_method(trial.method).scope == "dataset":
        raise AdgridError(
            f"datasets: {trial.dataset.name!r} is named with different categories, and {trial.method!r} is fitted to "
            f"all of them at once; name them once"
        )
    cells = {cell.category: cell for cell in (*trial.cells, *twin.cells)}
    categories = tuple(sorted(cells))
    return dataclasses.replace(trial, categories=categories, cells=tuple(cells[name] for name in categories))


def _check_encoding(trial: Trial) -> None:
    """A method for several categories at once that encodes images itself cannot know whose references to use."""
    method = load_method(trial.method)
    if method.backbone_use == "trained":
        raise AdgridError(
            f"method {trial.method!r} changes the backbone itself, and the representation {trial.representation!r} is "
            f"trained for the frozen one; name the method's `representations: [plain]`"
        )
    if method.scope == "dataset" and method.inputs(build_config(method, trial.params)) == "images":
        raise AdgridError(
            f"method {trial.method!r} encodes images of several categories itself, for which the representation "
            f"{trial.representation!r} has references of their own; name the method's `representations: [plain]`"
        )


def _resources_of(method: Any, resources: Resources) -> Resources:
    """What a trial of a method asks for: one process, unless it has stages to train."""
    if hasattr(method, "stages"):
        return resources
    return dataclasses.replace(resources, workers=1, min_workers=None)


def _absolute(path: str) -> str:
    """A path of the space as workers need it, whose folder is another one; relative to where the command was given."""
    if path in ("auto", "random") or "://" in path:
        return path
    return str(Path(path).expanduser().absolute())


def _spread(trials: Sequence[Trial]) -> list[Trial]:
    """Trials in an order in which those that share features do not start side by side."""
    groups: dict[tuple[object, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.dataset, trial.backbone, trial.weights, trial.protocol), []).append(trial)
    order: list[Trial] = []
    for position in range(max(len(group) for group in groups.values())) if groups else ():
        order += [group[position] for group in groups.values() if position < len(group)]
    return order


def _share_layers(trials: Sequence[Trial]) -> list[Trial]:
    """Tells each trial which further layers of its backbone the run needs, so that one forward pass gives all."""
    wanted: dict[tuple[str | None, str], dict[str, None]] = {}
    for trial in trials:
        wanted.setdefault((trial.backbone, trial.weights), {}).update(dict.fromkeys(trial.layers))
    shared = []
    for trial in trials:
        also = tuple(layer for layer in wanted[trial.backbone, trial.weights] if layer not in trial.layers)
        shared.append(dataclasses.replace(trial, also_layers=also))
    return shared


def find_encoding_methods(trials: Sequence[Trial]) -> list[str]:
    """Methods whose training sends changed images through the frozen backbone in every epoch, which takes its time."""
    methods = {trial.method: (load_method(trial.method), trial.params) for trial in trials}
    return sorted(
        name
        for name, (method, params) in methods.items()
        if hasattr(method, "stages")
        and method.backbone_use == "frozen"
        and method.inputs(build_config(method, params)) == "images"
    )


def measure_progress(
    plan: Plan,
    rows: Mapping[str, ResultRow],
    predictions: set[str],
    searched: Sequence[Trial] = (),
    unknown: Sequence[Trial] = (),
) -> Progress:
    """Compares a plan with what a store holds.

    Args:
        plan: the plan.
        rows: rows by cell id.
        predictions: ids of stored raw predictions.
        searched: trials of studies that are known besides.
        unknown: for each cell of a study that only its run will know, a trial like the one that it will belong to.
    """
    cells = [(trial, cell) for trial in (*plan.trials, *searched) for cell in trial.cells]
    open_cells = [(trial, cell) for trial, cell in cells if not _is_ok(rows.get(cell.cell_id))]
    expected = _seconds_per_cell(rows)
    seconds = [
        expected.get((trial.method, trial.backbone))
        for trial, cell in open_cells
        if cell.prediction_id not in predictions
    ]
    seconds += [expected.get((trial.method, trial.backbone)) for trial in unknown]
    known = [value for value in seconds if value is not None]
    return Progress(
        done=len(cells) - len(open_cells),
        rescore=sum(cell.prediction_id in predictions for _, cell in open_cells),
        failed=sum(cell.cell_id in rows for _, cell in open_cells),
        todo=len(open_cells) + len(unknown),
        estimated_seconds=statistics.fmean(known) * len(seconds) if known else None if seconds else 0.0,
    )


def _is_ok(row: ResultRow | None) -> bool:
    return row is not None and row.status == "ok"


def _seconds_per_cell(rows: Mapping[str, ResultRow]) -> dict[tuple[str, str | None], float]:
    """Median seconds that a finished cell took, per method and backbone."""
    alike: dict[tuple[str, str | None], list[float]] = {}
    for row in rows.values():
        if _is_ok(row):
            seconds = sum(value for name, value in row.costs.items() if name.endswith("_seconds"))
            alike.setdefault((row.method, row.backbone), []).append(seconds)
    return {key: statistics.median(values) for key, values in alike.items()}
