"""Numbers that papers and their repositories report, as data: one YAML file per source, and the user's own as CSV.

    title, arxiv      what was published
    source            where the number was read, and `evidence`: how sure it is
    protocol          the fields of `EvaluationProtocol` as far as they are known; one that is not told is not known
    scope             one model per `category`, or one for all categories of a `dataset`
    tolerance         how far a reproduction may be off, a rate in [0, 1]
    caveats           metric (or `all`) -> why that number cannot be compared here
    numbers           one row per method, backbone and dataset with one or more metrics, rates in [0, 1]

A row may set any of `source`, `evidence`, `scope`, `tolerance`, `caveat` and the protocol fields for itself. A row with
`against` is a gain: what its `representation` adds to the one named there. `backbone: none` is a method without
backbone; one that is not told is not known.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.contracts import AdgridError, EvaluationProtocol
from harness.metrics import METRICS
from harness.registry import suggest

EVIDENCE = ("paper", "code", "re-run", "second-hand", "derived")
"""Read in the paper, in the authors' repository, in somebody's re-run; told by others; computed from other numbers."""

NUM_CATEGORIES = {"mvtec_ad": 15, "visa": 12, "btad": 3, "mvtec_3d_ad": 10, "mpdd": 6, "real_iad": 30}
"""Categories behind a published mean."""

PROTOCOL_FIELDS = tuple(each.name for each in dataclasses.fields(EvaluationProtocol))
_AXES = ("method", "backbone", "dataset", "category", "representation", "against", "shots", "params")
_FACTS = ("scope", "tolerance", "source", "evidence", "caveat", "note")
_ROW_KEYS = (*_AXES, *_FACTS, *PROTOCOL_FIELDS)
_TABLE_KEYS = (
    "title", "arxiv", "source", "evidence", "tolerance", "scope", "protocol", "caveats", "notes", "numbers"
)  # fmt: skip
_DEFAULT_TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class PublishedNumber:
    """One number somebody reports."""

    table: str
    metric: str
    value: float
    """Rate in [0, 1]; a gain may be negative."""
    method: str
    backbone: str | None
    """None: not told. `none`: the method uses no backbone."""
    dataset: str
    category: str | None
    """None: the mean over all categories."""
    representation: str
    against: str | None
    """A representation: the number is the gain over it. None: the number is absolute."""
    shots: int | None
    params: Mapping[str, Any]
    """Parameters as far as they are known."""
    protocol: Mapping[str, Any]
    """Fields of the evaluation as far as they are known."""
    scope: str | None
    tolerance: float
    source: str
    evidence: str
    caveat: str
    """Why the number cannot be compared here; empty where it can."""
    note: str


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """All numbers of one source."""

    name: str
    title: str
    numbers: tuple[PublishedNumber, ...]
    arxiv: str = ""
    notes: tuple[str, ...] = field(default=())


def published_names() -> tuple[str, ...]:
    """Tables that come with adgrid, sorted."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.yaml")))


def load_published(word: str) -> PublishedTable:
    """A table that comes with adgrid, by its name, or one in a file (`.csv`, `.yaml`).

    A CSV file has a header and one line per row of numbers. `method`, `dataset` and at least one metric are needed;
    other columns are those a row may have (see above), `params.<field>` for parameters. An empty field is not known.

    Raises:
        AdgridError: an unknown name, or a file that is not as it should be: file, line, column and remedy.
    """
    path = Path(word)
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix in (".yaml", ".yml"):
        return _read_yaml(path)
    if word not in published_names():
        hint = suggest(word, published_names())
        raise AdgridError(f"--published {word}: no such table{hint}; or name a .csv or .yaml file")
    return _read_yaml(Path(__file__).parent / f"{word}.yaml")


# --- files -----------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AdgridError(f"{path}: cannot be read ({error}); name a CSV or YAML file in UTF-8") from error


def _read_yaml(path: Path) -> PublishedTable:
    try:
        data = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        raise AdgridError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or not isinstance(data.get("numbers"), list):
        raise AdgridError(f"{path}: a table is a mapping with `title` and a list `numbers`")
    for key in data:
        if key not in _TABLE_KEYS:
            raise AdgridError(f"{path}: unknown key {key!r}{suggest(str(key), _TABLE_KEYS)}")
    shared = {name: data[name] for name in ("source", "evidence", "tolerance", "scope") if name in data}
    shared |= data.get("protocol", {})
    numbers: list[PublishedNumber] = []
    for place, row in enumerate(data["numbers"]):
        where = f"{path}, numbers[{place}]"
        if not isinstance(row, dict):
            raise AdgridError(f"{where}: a row is a mapping such as {{method: padim, dataset: mvtec_ad, ...}}")
        numbers += _numbers({**shared, **row}, where, path.stem, data.get("caveats", {}))
    notes = tuple(str(note) for note in data.get("notes", ()))
    return PublishedTable(
        name=path.stem, title=str(data.get("title", path.stem)), arxiv=str(data.get("arxiv", "")), notes=notes,
        numbers=tuple(numbers),
    )  # fmt: skip


def _read_csv(path: Path) -> PublishedTable:
    reader = csv.reader(_read_text(path).splitlines())
    header = [name.strip() for name in next(reader, [])]
    for name in header:
        if name not in (*_ROW_KEYS, *METRICS) and not name.startswith("params."):
            hint = suggest(name, (*_ROW_KEYS, *METRICS, "params.<field>"))
            raise AdgridError(f"{path}, line 1: unknown column {name!r}{hint}")
        if header.count(name) > 1:
            raise AdgridError(f"{path}, line 1: the column {name!r} stands there twice; keep one")
    for name in ("method", "dataset"):
        if name not in header:
            raise AdgridError(f"{path}, line 1: there is no column {name!r}; add it")
    if not set(header) & set(METRICS):
        raise AdgridError(f"{path}, line 1: there is no metric; name at least one of {', '.join(METRICS)}")
    numbers: list[PublishedNumber] = []
    for fields in reader:
        if not any(text.strip() for text in fields):
            continue
        where = f"{path}, line {reader.line_num}"
        if len(fields) != len(header):
            raise AdgridError(f"{where}: {len(fields)} fields, the header has {len(header)}; quote fields with commas")
        row: dict[str, Any] = {}
        params: dict[str, Any] = {}
        for name, text in zip(header, fields, strict=True):
            if text.strip():
                target = params if name.startswith("params.") else row
                target[name.removeprefix("params.")] = _plain_value(name, text.strip(), where)
        numbers += _numbers({**row, "params": params}, where, path.stem, {})
    if not numbers:
        raise AdgridError(f"{path}: no line has a number; add one below the header")
    return PublishedTable(name=path.stem, title=path.name, numbers=tuple(numbers))


_TEXT_COLUMNS = ("method", "backbone", "dataset", "category", "representation", "against", "source", "caveat", "note")


def _plain_value(name: str, text: str, where: str) -> Any:
    """A field of a CSV file: text, or a value as YAML writes it (`224`, `[256, 320]`, `null`)."""
    if name in _TEXT_COLUMNS:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise AdgridError(f"{where}, column {name!r}: {text!r} is no value; write a number or a word") from error


# --- rows ------------------------------------------------------------------------------------------------------


def _numbers(row: Mapping[str, Any], where: str, table: str, caveats: Mapping[str, str]) -> Iterator[PublishedNumber]:
    """The numbers of one row, one per metric."""
    for key in row:
        if key not in (*_ROW_KEYS, *METRICS):
            raise AdgridError(f"{where}: unknown key {str(key)!r}{suggest(str(key), (*_ROW_KEYS, *METRICS))}")
    for key in ("method", "dataset"):
        if not isinstance(row.get(key), str) or not row[key]:
            raise AdgridError(f"{where}: {key!r} is missing; name the {key} as adgrid does, such as padim or mvtec_ad")
    evidence, scope = row.get("evidence", "paper"), row.get("scope")
    if evidence not in EVIDENCE:
        raise AdgridError(f"{where}, evidence: unknown value {evidence!r}{suggest(str(evidence), EVIDENCE)}")
    if scope not in (None, "category", "dataset"):
        raise AdgridError(f"{where}, scope: {scope!r} is neither category nor dataset")
    shots = row.get("shots")
    if shots is not None and (not isinstance(shots, int) or shots < 1):
        raise AdgridError(f"{where}, shots: {shots!r} is no number of images; leave it empty for all")
    is_gain = row.get("against") is not None
    metrics = [name for name in METRICS if row.get(name) is not None]
    if not metrics:
        raise AdgridError(f"{where}: no number; give at least one of {', '.join(METRICS)}")
    tolerance = _rate(row.get("tolerance", _DEFAULT_TOLERANCE), f"{where}, tolerance", 0.0)
    for metric in metrics:
        yield PublishedNumber(
            table=table,
            metric=metric,
            value=_rate(row[metric], f"{where}, {metric}", -1.0 if is_gain else 0.0),
            method=row["method"],
            backbone=row.get("backbone"),
            dataset=row["dataset"],
            category=None if row.get("category") is None else str(row["category"]),
            representation=row.get("representation", "plain"),
            against=row.get("against"),
            shots=shots,
            params=dict(row.get("params") or {}),
            protocol=_protocol(row, where),
            scope=scope,
            tolerance=tolerance,
            source=str(row.get("source", table)),
            evidence=evidence,
            caveat=str(row.get("caveat") or caveats.get(metric) or caveats.get("all") or ""),
            note=str(row.get("note", "")),
        )


def _rate(value: Any, where: str, low: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AdgridError(f"{where}: {value!r} is no number; write a rate such as 0.985")
    if not low <= value <= 1:
        hint = "; divide percent by 100" if 1 < abs(value) <= 100 else ""
        raise AdgridError(f"{where}: {value:g} is no rate in [{low:g}, 1]{hint}")
    return float(value)


def _protocol(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    protocol = {name: row[name] for name in PROTOCOL_FIELDS if name in row}
    size = protocol.get("image_size")
    if isinstance(size, int):
        protocol["image_size"] = [size, size]
    elif size is not None and not (isinstance(size, list) and len(size) == 2):
        raise AdgridError(f"{where}, image_size: {size!r} is no size; write 224, or [256, 320] for height and width")
    return protocol
