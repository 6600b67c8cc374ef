"""Names become classes, and plain values become configurations, here and nowhere else.

A plug-in is a file in `methods/` or `harness/datasets/`, or an entry point of any installed package in one of the
groups below. The file name (or the entry point's name) is the plug-in's name everywhere. A plug-in of ours and an
entry point of the same name is an error, never a silent replacement.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from harness.contracts import AdgridError, Dataset, DatasetRef, Places

METHOD_GROUP = "adgrid.methods"
REPRESENTATION_GROUP = "adgrid.representations"
DATASET_GROUP = "adgrid.datasets"
BACKBONE_GROUP = "adgrid.backbones"


def did_you_mean(name: str, known: Iterable[str], num: int = 2) -> str:
    """`; did you mean 'x'?` with the nearest known names, or nothing where none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=num, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(other) for other in near)}?" if near else ""


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the nearest known name, then the whole list if it is short enough to read."""
    names = sorted(known)
    hint = did_you_mean(name, names)
    listing = ", ".join(names) if len(names) <= 40 else ", ".join(names[:40]) + ", ..."
    return f"{hint} known: {listing}" if hint else f"; known: {listing}"


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}


@cache
def _modules(package: str, attribute: str) -> dict[str, str]:
    """Plug-in files of one of our packages: name -> module. Helper modules do not carry the attribute."""
    home = importlib.import_module(package)
    found = {}
    for info in pkgutil.iter_modules(home.__path__):
        module = f"{package}.{info.name}"
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            continue
        with open(spec.origin, encoding="utf-8") as file:
            # Reading the last line instead of importing keeps `adgrid plan` free of every method's imports.
            if file.read().rstrip().rsplit("\n", 1)[-1].startswith(f"{attribute} = "):
                found[info.name] = module
    return found


def _names(package: str, attribute: str, group: str) -> tuple[str, ...]:
    ours, theirs = _modules(package, attribute), _entry_points(group)
    for name in ours.keys() & theirs.keys():
        raise AdgridError(
            f"the installed package behind entry point {theirs[name].value!r} (group {group}) takes the name {name!r}, "
            f"which adgrid already has; rename it in that package"
        )
    return tuple(sorted({*ours, *theirs}))


def _load(kind: str, name: str, package: str, attribute: str, group: str) -> Any:
    names = _names(package, attribute, group)
    if name not in names:
        raise AdgridError(f"unknown {kind} {name!r}{suggest(name, names)}")
    ours = _modules(package, attribute)
    if name in ours:
        return getattr(importlib.import_module(ours[name]), attribute)
    point = _entry_points(group)[name]
    try:
        return point.load()
    except Exception as error:
        raise AdgridError(
            f"{kind} {name!r} comes from the entry point {point.value!r}, which cannot be loaded: "
            f"{type(error).__name__}: {error}; repair or uninstall that package"
        ) from error


def method_names() -> tuple[str, ...]:
    """Every known method, sorted."""
    return _names("methods", "METHOD", METHOD_GROUP)


def load_method(name: str) -> Any:
    """The class of a method. Raises AdgridError with the nearest names if it is unknown."""
    return _load("method", name, "methods", "METHOD", METHOD_GROUP)


def method_version(name: str) -> int:
    """`METHOD_VERSION` of the method's module; it enters every prediction id."""
    return _version("method", name, load_method(name), "METHOD_VERSION")


def _version(kind: str, name: str, owner: Any, constant: str) -> int:
    version = getattr(importlib.import_module(owner.__module__), constant, None)
    if not isinstance(version, int):
        raise AdgridError(f"{kind} {name!r}: its module {owner.__module__} has no integer {constant}; add one")
    return version


def representation_kinds() -> tuple[str, ...]:
    """Every known trained representation, sorted."""
    return _names("methods", "REPRESENTATION", REPRESENTATION_GROUP)


def load_representation(kind: str) -> Any:
    """The class of a representation. Raises AdgridError with the nearest names if it is unknown."""
    return _load("representation", kind, "methods", "REPRESENTATION", REPRESENTATION_GROUP)


def representation_version(kind: str) -> int:
    """`REPRESENTATION_VERSION` of the representation's module; it enters the ids of all that is made with it."""
    return _version("representation", kind, load_representation(kind), "REPRESENTATION_VERSION")


def scope_of_method(name: str) -> str | None:
    """What a method fits one model for, `category` or `dataset`; None for a method that is not known here."""
    return load_method(name).scope if name in method_names() else None


def dataset_layouts() -> tuple[str, ...]:
    """Every known dataset layout, sorted."""
    return _names("harness.datasets", "DATASET", DATASET_GROUP)


def load_dataset_class(layout: str) -> Any:
    """The class that reads a layout. Raises AdgridError with the nearest names if it is unknown."""
    return _load("dataset layout", layout, "harness.datasets", "DATASET", DATASET_GROUP)


def build_dataset(ref: DatasetRef, places: Places) -> Dataset:
    """The dataset behind a reference; touches no file. Raises AdgridError on an unknown layout or variant."""
    if ref.held_out:
        name = ref.name.removesuffix("-held-out")
        source = build_dataset(dataclasses.replace(ref, name=name, held_out=False), places)
        return importlib.import_module("harness.datasets.held_out").HeldOut(ref.name, source, places)
    layout = load_dataset_class(ref.layout)
    if ref.variant is None:
        return layout(ref.name, ref.root, places)
    variants = getattr(layout, "variants", {})
    if ref.variant not in variants:
        hint = suggest(ref.variant, variants) if variants else "; it has none, leave the field out"
        raise AdgridError(f"dataset {ref.name!r}: layout {ref.layout!r} has no variant {ref.variant!r}{hint}")
    return layout(ref.name, ref.root, places, ref.variant)


def plugin_backbones() -> dict[str, EntryPoint]:
    """Backbones that installed packages add: name -> entry point of a `BackboneRow`."""
    return dict(_entry_points(BACKBONE_GROUP))


# --- configurations --------------------------------------------------------------------------------------------


def method_fields(method: Any) -> dict[str, Any]:
    """Name and type of every configuration field of a method."""
    hints = get_type_hints(method.Config)
    return {field.name: hints[field.name] for field in dataclasses.fields(method.Config)}


@cache
def _adapter(config: type) -> TypeAdapter[Any]:
    # Building one costs more than using it, and a plan checks every grid point.
    return TypeAdapter(config)


def build_config(method: Any, params: Mapping[str, Any]) -> Any:
    """The method's `Config` from plain values. Raises pydantic's ValidationError (a ValueError) on a wrong one."""
    return _adapter(method.Config).validate_python(dict(params))


def check_params(name: str, params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The resolved configuration of a method, every field, as plain JSON values.

    Raises:
        AdgridError: an unknown field or a value the method refuses; the message begins with `where`.
    """
    return _check_params("method", name, load_method(name), params, where)


def check_representation_params(kind: str, params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same for the training of a representation."""
    return _check_params("representation", kind, load_representation(kind), params, where)


def _check_params(kind: str, name: str, method: Any, params: Mapping[str, Any], where: str) -> dict[str, Any]:
    fields = method_fields(method)
    for key in params:
        if key not in fields:
            raise AdgridError(f"{where}.{key}: {kind} {name!r} has no parameter {key!r}{suggest(key, fields)}")
    try:
        return _adapter(method.Config).dump_python(build_config(method, params), mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part in fields)
        message = first["msg"].removeprefix("Value error, ")
        raise AdgridError(f"{where}{'.' + field if field else ''}: {message}; correct the value") from None
