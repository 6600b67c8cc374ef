"""A search space: one YAML file, checked whole before anything runs.

Every axis is a list. Names may stand alone (`- padim`) or open a mapping (`- {name: patchcore, params: {...}}`). A
parameter's value may be a list, which is a grid axis, or a distribution (`{loguniform: [0.01, 0.25]}`), which `search`
draws from.
Whatever is wrong is one `AdgridError` with the file, the line, the field, what is known and what to do.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from harness.contracts import AdgridError, DatasetRef, EvaluationProtocol, ReferenceChoice, Resources, ScoreReduction
from harness.registry import (
    check_params,
    check_representation_params,
    dataset_layouts,
    load_method,
    method_fields,
    method_names,
    representation_kinds,
    suggest,
)
from harness.search import Distribution, SchedulerEntry, SearchEntry, parse_distribution

Layer = str | int
Name = Annotated[str, Field(min_length=1)]
PLAIN = "plain"
"""The representation that leaves features as they are."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


def _name_alone(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class MethodEntry(_Strict):
    """A method with its parameters; a list as a parameter's value is a grid axis, a distribution is searched."""

    name: Name
    preset: str | None = None
    """A named configuration of the method, such as that of another paper; `params` stand above it."""
    params: dict[str, Any] = {}
    layers: tuple[Layer, ...] | None = None
    """Layers that this method reads, for every backbone; None leaves it to the backbone entry, then the paper."""
    representations: tuple[Name, ...] | None = None
    """Only with these of the space's representations, where settings differ between them; None for all."""


class BackboneEntry(_Strict):
    """A backbone: a named one, or any model of timm."""

    name: Name
    layers: tuple[Layer, ...] | None = None
    weights: str = "auto"
    """`auto` (installed package, then the hub's cache), or a file or folder."""


class DatasetEntry(_Strict):
    """A dataset: its name in rows, the layout on disk (default: the layout called like it) and where it lies."""

    name: Name
    layout: str | None = None
    root: str | None = None
    variant: str | None = None
    """Which of the layout's published splits, where it has several."""
    categories: tuple[Name, ...] | None = None
    shots: tuple[int | None, ...] | None = None
    """Overrides the space's `shots` for this dataset."""
    held_out: bool = False
    """Instead of the test images: held-out training images, half of them with painted defects."""

    @field_validator("shots", mode="before")
    @classmethod
    def _shots(cls, value: Any) -> Any:
        return None if value is None else _as_list(value)

    @property
    def layout_name(self) -> str:
        return self.layout or self.name

    def ref(self) -> DatasetRef:
        """The dataset without what the space picks of it."""
        name = f"{self.name}-held-out" if self.held_out else self.name
        return DatasetRef(
            name=name, layout=self.layout_name, root=self.root, variant=self.variant, held_out=self.held_out
        )


Datasets = Annotated[tuple[Annotated[DatasetEntry, BeforeValidator(_name_alone)], ...], BeforeValidator(_as_list)]


class ReferenceEntry(_Strict):
    """Normal images that features are compared with; see `harness.contracts.ReferenceChoice`."""

    mode: Literal["shots", "files", "aligned"] = "shots"
    shots: Annotated[int, Field(ge=1)] = 8
    seed: Annotated[int, Field(ge=0)] = 0
    k: Annotated[int, Field(ge=1)] = 10
    path: str | None = None
    exclude_from_fit: bool = False

    @model_validator(mode="after")
    def _files_have_a_folder(self) -> ReferenceEntry:
        if self.mode == "files" and self.path is None:
            raise ValueError("`mode: files` needs the folder of the images as `path`")
        if self.mode == "shots" and self.path is not None:
            raise ValueError(
                "`mode: shots` draws its images and has no `path`; say `mode: files` for a folder of images, or "
                "`mode: aligned` for lists"
            )
        if self.exclude_from_fit and self.mode != "shots":
            raise ValueError("`exclude_from_fit` is for drawn references, `mode: shots`; leave it out")
        return self

    def resolved(self) -> ReferenceChoice:
        """The same as the dataclass that trials carry."""
        return ReferenceChoice(**self.model_dump())


CPUS_PER_GPU = 4
"""Cores that decode images beside a GPU where a space does not say how many."""


class ResourcesEntry(_Strict):
    """What one trial asks of the cluster."""

    cpu: Annotated[float, Field(ge=0)] = 1.0
    """Of each worker. Where it is left out one, or `CPUS_PER_GPU` times the GPUs if that is more."""
    gpu: Annotated[float, Field(ge=0)] = 0.0
    memory_gib: Annotated[float, Field(ge=0)] = 0.0
    workers: Annotated[int, Field(ge=1)] = 1
    """Processes that train one trial together, each with so much; methods without training use one."""
    min_workers: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _feed_gpus(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "cpu" in given:
            return given
        gpu = given.get("gpu")
        if isinstance(gpu, bool) or not isinstance(gpu, int | float):  # none, or one that is refused below
            return given
        return {**given, "cpu": max(1.0, CPUS_PER_GPU * gpu)}

    def resolved(self) -> Resources:
        """The same as the dataclass that trials carry."""
        if self.cpu == 0 and self.gpu == 0:
            raise ValueError("a trial needs cpu or gpu; set resources.cpu to 1")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"resources.min_workers is {self.min_workers}, more than resources.workers ({self.workers}); lower it"
            )
        return Resources(**self.model_dump())


class RepresentationEntry(_Strict):
    """A change of the features between backbone and method: its name in rows, and how it is trained or where it is."""

    name: Name
    kind: str | None = None
    """The plug-in; None for the one called like the entry."""
    params: dict[str, Any] = {}
    """Of its training, single values."""
    checkpoint: str | None = None
    """A trained one, to be used instead of training; `{backbone}` in the path stands for the backbone's name."""
    data: Datasets = (DatasetEntry(name="real_iad", variant="folders"),)
    """Labelled auxiliary images that it is trained on, training and test images alike."""
    select_on: Datasets = ()
    """Datasets by whose image AUROC the best epoch is picked."""
    selection: Literal["last", "heldout_categories", "test_best"] = "last"
    """State that is used: of the last epoch, or of the best one on `select_on`, which must hold nothing that the space
    reports on; `test_best` allows even that, and every row says so."""
    layers: tuple[Layer, ...] | None = None
    """Layers it is trained on, for every backbone; None for the paper's."""
    image_size: tuple[int, int] | None = None
    """Of its training; None for that of the protocol."""
    resize: int | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["float32", "bfloat16"] | None = None
    """Of the forward passes of its training; None for that of the space."""
    resources: ResourcesEntry | None = None
    """What its training asks for; None for what trials ask for."""
    reference: ReferenceEntry = ReferenceEntry()
    """Normal images of the categories that are scored."""
    reference_source: Literal["auto", "store", "encode"] = "auto"
    """Where its training has features of normal images from: the store, the backbone at every use, or what the plan
    finds faster. The numbers are the same."""
    pool: Annotated[int, Field(ge=1)] | None = None
    """References of each category and view that its training keeps in memory; None has all, as in the paper."""

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _selection_has_data(self) -> RepresentationEntry:
        if (self.selection == "last") != (not self.select_on):
            raise ValueError(
                "`selection: last` needs no `select_on`, and any other selection names the datasets it picks by there"
            )
        if self.checkpoint is not None and (self.params.keys() - {"features"} or self.select_on):
            raise ValueError("a given `checkpoint` is not trained; leave `params`, `select_on` and `selection` out")
        return self

    @property
    def kind_name(self) -> str:
        return self.kind or self.name


class ProtocolEntry(_Strict):
    """The evaluation protocol; see `harness.contracts.EvaluationProtocol` for what each field means."""

    image_size: tuple[int, int] = (224, 224)
    resize: int | None = None
    interpolation: Literal["backbone", "bilinear", "bicubic", "nearest"] = "backbone"
    mask_rule: Literal["nearest"] = "nearest"
    cropped_anomaly: Literal["keep", "normal"] = "keep"
    smoothing: Literal["method"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = "method"
    score_reduction: Literal["method"] | ScoreReduction = "method"
    aupro_limit: Annotated[float, Field(gt=0, le=1)] = 0.3
    selection: Literal["last", "lowest_loss", "test_best"] = "last"

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @field_validator("image_size")
    @classmethod
    def _at_least_one_patch(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 16:
            raise ValueError(f"must be at least 16 pixels a side, got {value[0]} x {value[1]}")
        return value

    def resolved(self) -> EvaluationProtocol:
        """The same as the dataclass that trials carry."""
        if self.resize is not None and self.resize < max(self.image_size):
            raise ValueError(
                f"resize {self.resize} is smaller than image_size {self.image_size}; crops need resize >= it"
            )
        return EvaluationProtocol(**self.model_dump())


Methods = Annotated[tuple[Annotated[MethodEntry, BeforeValidator(_name_alone)], ...], BeforeValidator(_as_list)]
Backbones = Annotated[tuple[Annotated[BackboneEntry, BeforeValidator(_name_alone)], ...], BeforeValidator(_as_list)]
Representations = Annotated[
    tuple[Annotated[RepresentationEntry, BeforeValidator(_name_alone)], ...],
    Field(min_length=1),
    BeforeValidator(_as_list),
]
Shots = Annotated[tuple[Annotated[int, Field(ge=1)] | None, ...], Field(min_length=1), BeforeValidator(_as_list)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), BeforeValidator(_as_list)]
Names = Annotated[tuple[Name, ...], Field(min_length=1), BeforeValidator(_as_list)]


class Grid(_Strict):
    """A smaller grid that `include` adds; an axis left out is the space's own."""

    methods: Methods | None = None
    backbones: Backbones | None = None
    datasets: Datasets | None = None
    representations: Representations | None = None
    shots: Shots | None = None
    seeds: Seeds | None = None


class Space(_Strict):
    """A search space, checked."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    description: str = ""
    methods: Annotated[Methods, Field(min_length=1)]
    backbones: Backbones = ()
    datasets: Annotated[Datasets, Field(min_length=1)]
    representations: Representations = (RepresentationEntry(name=PLAIN),)
    shots: Shots = (None,)
    seeds: Seeds = (0,)
    categories: Names | None = None
    """Keep only these categories, in whichever dataset they occur."""
    include: tuple[Grid, ...] = ()
    exclude: tuple[dict[str, Any], ...] = ()
    """Grid points to leave out: each mapping of axis to value (or list of values) removes what matches all of it."""
    protocol: ProtocolEntry = ProtocolEntry()
    resources: ResourcesEntry = ResourcesEntry()
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward passes of trained methods."""
    search: SearchEntry | None = None
    """How distributions among the parameters are searched."""


EXCLUDE_AXES = ("method", "backbone", "dataset", "representation", "shots", "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridPoint:
    """One combination of the axes, before anything on disk was looked at."""

    method: MethodEntry
    params: Mapping[str, Any]
    """Single values, the grid of `MethodEntry.params` expanded; only the fields that the space names."""
    distributions: Mapping[str, Distribution] = dataclasses.field(default_factory=dict)
    """The fields that are searched."""
    backbone: BackboneEntry | None
    dataset: DatasetEntry
    representation: RepresentationEntry
    shots: int | None
    seed: int


# --- reading ---------------------------------------------------------------------------------------------------


def load_space(path: str | Path, overrides: Sequence[str] = ()) -> Space:
    """Reads and checks a search space.

    Args:
        path: the YAML file.
        overrides: `axis=value` texts; see `apply_override`.

    Raises:
        AdgridError: the file cannot be read, or something in it is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdgridError(
            f"{path}: cannot be read ({error}); name a search space such as search_spaces/quickstart.yaml"
        ) from error
    return parse_space(text, str(path), overrides)


def parse_space(text: str, source: str = "<space>", overrides: Sequence[str] = ()) -> Space:
    """Checks the text of a search space; `source` names it in errors."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AdgridError(
            f"{source}: not valid YAML: {' '.join(str(error).split())}; check indentation and brackets"
        ) from error
    if not isinstance(data, dict):
        raise AdgridError(
            f"{source}: a search space is a mapping with `name`, `methods`, `datasets`; got {type(data).__name__}"
        )
    _refuse_doubled_keys(tree, source)
    places = _Places(source, tree)
    whole = data.get("representations", ())
    for override in overrides:
        data = apply_override(data, override)
        places.overridden(override)
    try:
        space = Space.model_validate(data)
        space.protocol.resolved()
        space.resources.resolved()
        for entry in space.representations:
            if entry.resources is not None:
                entry.resources.resolved()
    except ValidationError as error:
        raise AdgridError(_explain(error, places)) from None
    except ValueError as error:
        raise AdgridError(f"{source}: {error}") from None
    # A narrowed space may leave out what a method names, so that counts as known.
    _check_names(space, places, {str(_entry_name(entry)) for entry in _as_list(whole)})
    return space


def _refuse_doubled_keys(node: yaml.Node | None, source: str) -> None:
    """YAML's loader would let the last of two equal keys win in silence."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise AdgridError(
                    f"{source}, line {line}: the key {key.value!r} stands on line {seen[key.value]} too; keep one"
                )
            seen[key.value] = line
            _refuse_doubled_keys(value, source)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_doubled_keys(item, source)


def apply_override(data: dict[str, Any], override: str) -> dict[str, Any]:
    """`--set axis=value`: narrows a named axis to the entries called so (keeping their settings), or sets any field.

    The value is YAML; commas make a list: `methods=padim,patchcore`, `seeds=0,1`, `protocol.aupro_limit=0.05`,
    `methods.patchcore.params.coreset_ratio=0.01`.
    """
    field, sign, text = override.partition("=")
    if not sign or not field:
        raise AdgridError(f"--set {override}: write axis=value, such as methods=padim or protocol.aupro_limit=0.05")
    try:
        value = yaml.safe_load(f"[{text}]" if "," in text and not text.lstrip().startswith(("[", "{")) else text)
    except (yaml.YAMLError, ValueError) as error:
        raise AdgridError(f"--set {override}: the value is not valid YAML ({' '.join(str(error).split())})") from error
    keys = field.split(".")
    if len(keys) == 1 and field in ("methods", "backbones", "datasets", "representations"):
        entries = _as_list(data.get(field, []))
        chosen = []
        for item in value if isinstance(value, list) else [value]:
            chosen += [entry for entry in entries if isinstance(item, str) and _entry_name(entry) == item] or [item]
        return {**data, field: chosen}
    return _set_in(data, keys, value, override)


def _entry_name(entry: Any) -> Any:
    return entry.get("name") if isinstance(entry, dict) else entry


def _set_in(node: Any, keys: list[str], value: Any, override: str) -> Any:
    if not keys:
        return value
    head, *rest = keys
    if isinstance(node, list):
        if head not in [_entry_name(entry) for entry in node]:
            known = [str(_entry_name(entry)) for entry in node]
            raise AdgridError(f"--set {override}: no entry {head!r} there{suggest(head, known)}")
        return [
            _set_in(_name_alone(entry), rest, value, override) if _entry_name(entry) == head else entry
            for entry in node
        ]
    if node is not None and not isinstance(node, dict):
        raise AdgridError(f"--set {override}: {head!r} lies below a single value; set the field above it")
    node = node or {}
    return {**node, head: _set_in(node.get(head), rest, value, override)}


# --- errors that name their place ------------------------------------------------------------------------------


class _Places:
    """Finds the line of a field in the YAML text."""

    def __init__(self, source: str, tree: yaml.Node | None) -> None:
        self._source = source
        self._tree = tree
        self._overrides: dict[str, str] = {}

    def overridden(self, override: str) -> None:
        self._overrides[override.split("=", 1)[0].split(".", 1)[0]] = override

    def __call__(self, *loc: str | int) -> str:
        """`file.yaml, line 7, methods[1].params`."""
        field = ""
        for part in loc:
            field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else part
        if loc and str(loc[0]) in self._overrides:
            return f"--set {self._overrides[str(loc[0])]}, {field}"
        node, line = self._tree, None
        for part in loc:
            node, line = self._step(node, part, line)
        return f"{self._source}, line {line}, {field}" if line else f"{self._source}, {field}"

    @staticmethod
    def _step(node: yaml.Node | None, part: str | int, line: int | None) -> tuple[yaml.Node | None, int | None]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    return value, key.start_mark.line + 1
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            return node.value[part], node.value[part].start_mark.line + 1
        return None, line


def _explain(error: ValidationError, places: _Places) -> str:
    lines = []
    for problem in error.errors():
        # pydantic names the branch of a union inside the place; those are no fields of ours.
        loc = tuple(
            p for p in problem["loc"] if isinstance(p, int) or ("[" not in p and "-" not in p and p not in _BRANCHES)
        )
        if problem["type"] == "extra_forbidden":
            key = str(loc[-1])
            text = f"unknown key {key!r}{suggest(key, _fields_at(loc[:-1]))}"
        elif problem["type"] == "missing":
            text = f"the key {str(loc[-1])!r} is missing; add it"
            loc = loc[:-1] or loc
        else:
            text = f"{problem['msg']}, got {problem['input']!r}"
        line = f"{places(*loc)}: {text}"
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


_BRANCHES = frozenset({"float", "int", "str", "none", "BackboneEntry", "MethodEntry", "RepresentationEntry"})
_MODELS: dict[str, type[BaseModel]] = {
    "methods": MethodEntry,
    "backbones": BackboneEntry,
    "datasets": DatasetEntry,
    "representations": RepresentationEntry,
    "data": DatasetEntry,
    "select_on": DatasetEntry,
    "reference": ReferenceEntry,
    "protocol": ProtocolEntry,
    "resources": ResourcesEntry,
    "include": Grid,
    "search": SearchEntry,
    "scheduler": SchedulerEntry,
}


def _fields_at(loc: tuple[str | int, ...]) -> tuple[str, ...]:
    names = [part for part in loc if isinstance(part, str) and part in _MODELS]
    return tuple((_MODELS[names[-1]] if names else Space).model_fields)


# --- names -----------------------------------------------------------------------------------------------------


def _check_names(space: Space, places: _Places, left_out: set[str]) -> None:
    """Methods, parameters, layouts, representations and the axes of `exclude` are known before anything is planned."""
    for axis, known in (("methods", method_names()), ("datasets", dataset_layouts())):
        for loc, entry in _entries(space, axis):
            name = entry.name if axis == "methods" else entry.layout_name
            if name not in known:
                what = "method" if axis == "methods" else "dataset layout"
                remedy = (
                    "" if axis == "methods" else "; data in MVTec AD's folder layout are read with `layout: folder`"
                )
                raise AdgridError(f"{places(*loc)}: unknown {what} {name!r}{suggest(name, known)}{remedy}")
    swept = False
    for loc, entry in _entries(space, "methods"):
        for params, distributions in expand_params(entry, places(*loc, "params")):
            where = places(*loc, "params")
            check_params(entry.name, params, where)
            for field, distribution in distributions.items():
                for value in distribution.probes:
                    check_params(entry.name, {**params, field: value}, where)
            swept |= bool(distributions)
    _check_search(space, swept, places)
    for loc, entry in _entries(space, "representations"):
        _check_representation(entry, loc, places)
    named = {entry.name for _, entry in _entries(space, "representations")}
    for loc, entry in _entries(space, "methods"):
        for name in entry.representations or ():
            if name not in named | left_out:
                where = places(*loc, "representations")
                raise AdgridError(f"{where}: the space has no representation {name!r}{suggest(name, named)}")
    for axis in ("methods", "backbones", "datasets", "representations"):
        for double in _doubles([entry.name for entry in getattr(space, axis)] if axis != "methods" else []):
            raise AdgridError(f"{places(axis)}: {double!r} stands there twice; give each entry its own name")
    for index, rule in enumerate(space.exclude):
        for axis in rule:
            if axis not in EXCLUDE_AXES and not axis.startswith("params."):
                known_axes = (*EXCLUDE_AXES, "params.<field>")
                raise AdgridError(f"{places('exclude', index, axis)}: unknown axis {axis!r}{suggest(axis, known_axes)}")
        for name in _as_list(rule.get("method", [])):
            if name not in method_names():
                where = places("exclude", index, "method")
                raise AdgridError(f"{where}: unknown method {name!r}{suggest(str(name), method_names())}")


def _check_search(space: Space, swept: bool, places: _Places) -> None:
    """Distributions and `search` come together, and what is tuned on can be found."""
    search = space.search
    if swept and search is None:
        raise AdgridError(
            f"{places('methods')}: a parameter is a distribution and nothing says how to search it; add `search: "
            f"{{num_samples: 10, tune_on: {{DATASET: [CATEGORY]}}}}`, with categories that are not to be reported"
        )
    if search is None:
        return
    if not swept:
        raise AdgridError(
            f"{places('search')}: no method has a parameter to search; write one as a distribution, such as "
            f"{{loguniform: [0.01, 0.25]}}, or leave `search` out"
        )
    if isinstance(search.tune_on, dict):
        named = {entry.name for _, entry in _entries(space, "datasets")}
        known = {*named, *dataset_layouts()}
        for name in search.tune_on:
            if name not in known:
                raise AdgridError(
                    f"{places('search', 'tune_on', name)}: unknown dataset {name!r}{suggest(name, known)}"
                )


def _entries(space: Space, axis: str) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    for index, entry in enumerate(getattr(space, axis)):
        yield (axis, index), entry
    for number, grid in enumerate(space.include):
        for index, entry in enumerate(getattr(grid, axis) or ()):
            yield ("include", number, axis, index), entry


def _check_representation(entry: RepresentationEntry, loc: tuple[str | int, ...], places: _Places) -> None:
    if entry.name == PLAIN:
        if entry.model_fields_set - {"name"}:
            raise AdgridError(f"{places(*loc)}: {PLAIN!r} is the features as they are and has no settings; rename it")
        return
    kinds = representation_kinds()
    if entry.kind_name not in kinds:
        known = suggest(entry.kind_name, (PLAIN, *kinds))
        raise AdgridError(
            f"{places(*loc)}: unknown representation {entry.kind_name!r}{known}; `kind` names the plug-in"
        )
    check_representation_params(entry.kind_name, entry.params, places(*loc, "params"))
    for field in ("data", "select_on"):
        for index, dataset in enumerate(getattr(entry, field)):
            if dataset.layout_name not in dataset_layouts():
                where = places(*loc, field, index)
                known = suggest(dataset.layout_name, dataset_layouts())
                raise AdgridError(f"{where}: unknown dataset layout {dataset.layout_name!r}{known}")
            if dataset.shots is not None:
                raise AdgridError(f"{places(*loc, field, index)}: a pretraining reads all images; leave `shots` out")


def _doubles(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


# --- the grid --------------------------------------------------------------------------------------------------


def expand_params(entry: MethodEntry, where: str) -> list[tuple[dict[str, Any], dict[str, Distribution]]]:
    """The grid over an entry's parameters: a list is an axis, unless the field itself holds a list.

    Returns:
        For each grid point its single values, and the distributions of the fields that are searched there.
    """
    method = load_method(entry.name)
    fields = method_fields(method)
    presets = getattr(method, "presets", {})
    if entry.preset is not None and entry.preset not in presets:
        hint = suggest(entry.preset, presets) if presets else "; it has none, leave `preset` out"
        raise AdgridError(f"{where}: method {entry.name!r} has no preset {entry.preset!r}{hint}")
    preset = {} if entry.preset is None else presets[entry.preset]
    axes = []
    for key, value in {**preset, **entry.params}.items():
        is_axis = isinstance(value, list) and not (key in fields and _accepts(fields[key], value))
        if is_axis and not value:
            raise AdgridError(f"{where}.{key}: an empty list leaves nothing to run; name at least one value")
        if not is_axis and not isinstance(value, dict):
            axes.append([(key, value)])
            continue
        try:
            items = value if is_axis else [value]
            axes.append([(key, parse_distribution(item) if isinstance(item, dict) else item) for item in items])
        except ValueError as error:
            raise AdgridError(f"{where}.{key}: {error}") from None
    points = []
    for point in itertools.product(*axes):
        swept = {key: value for key, value in point if isinstance(value, Distribution)}
        points.append(({key: value for key, value in point if key not in swept}, swept))
    return points


def _accepts(annotation: Any, value: Any) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError:
        return False
    return True


def grid_points(space: Space) -> list[GridPoint]:
    """Every combination of the axes and of the included grids, less the excluded ones, each once, in file order."""
    points: dict[str, GridPoint] = {}
    for grid in (Grid(), *space.include):
        for point in _points_of(grid, space):
            if not any(_matches(rule, point) for rule in space.exclude):
                points.setdefault(repr(point), point)
    return list(points.values())


def _points_of(grid: Grid, space: Space) -> Iterator[GridPoint]:
    def axis(name: str) -> Any:
        own = getattr(grid, name)
        return getattr(space, name) if own is None else own

    for dataset in axis("datasets"):
        shots_axis = grid.shots or dataset.shots or axis("shots")
        for method in axis("methods"):
            needs_backbone = load_method(method.name).backbone_use != "none"
            if needs_backbone and not axis("backbones"):
                raise AdgridError(
                    f"method {method.name!r} needs a backbone and the space names none; add `backbones: [...]`"
                )
            # Without backbone there is nothing to vary: the axis collapses to one cell.
            backbones = axis("backbones") if needs_backbone else (None,)
            representations = axis("representations") if needs_backbone else (RepresentationEntry(name=PLAIN),)
            if needs_backbone and method.representations is not None:
                representations = [entry for entry in representations if entry.name in method.representations]
            for (params, distributions), representation, backbone, shots, seed in itertools.product(
                expand_params(method, "methods"), representations, backbones, shots_axis, axis("seeds")
            ):
                yield GridPoint(
                    method=method,
                    params=params,
                    distributions=distributions,
                    backbone=backbone,
                    dataset=dataset,
                    representation=representation,
                    shots=shots,
                    seed=seed,
                )


def _matches(rule: Mapping[str, Any], point: GridPoint) -> bool:
    values: dict[str, Any] = {
        "method": point.method.name,
        "backbone": point.backbone.name if point.backbone else None,
        "dataset": point.dataset.name,
        "representation": point.representation.name,
        "shots": point.shots,
        "seed": point.seed,
    }
    if any(axis.startswith("params.") for axis in rule):
        # A parameter that the space leaves out has its default.
        resolved = check_params(point.method.name, point.params, "methods")
        values |= {f"params.{key}": value for key, value in resolved.items() if key not in point.distributions}
    return all(values.get(axis) in _as_list(wanted) for axis, wanted in rule.items())
