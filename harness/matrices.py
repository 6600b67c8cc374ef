"""Matrices of results: one metric under one protocol, methods with their backbones against datasets or categories.

A matrix shows holes: where one row behind a number is missing there is no number, because a mean over what happens to
be there compares nothing.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from harness.metrics import METRICS

NO_BACKBONE = "–"
"""Shown as the backbone of a method that uses none."""

Rank = Literal["", "best", "second"]

_MARKS = "†‡§¶"


@dataclass(frozen=True, kw_only=True)
class MatrixCell:
    """One number of a matrix, or what stands in its place."""

    state: Literal["value", "hole", "unavailable"]
    """`hole`: a row behind the number is missing or not ok. `unavailable`: the metric does not exist."""
    value: float | None = None
    """Mean over the categories, then over the seeds; a rate in [0, 1]. None unless `state` is `value`."""
    std: float | None = None
    """Sample standard deviation (divisor n - 1) of the seeds' means; None for a single seed."""
    note: str = ""
    """Why there is no number, in a few words: `1 of 2 failed`."""
    reason: str = ""
    """The first reason that a row behind a hole gives, with its category."""
    stamps: tuple[str, ...] = ()
    """What must be told beside the number; the union over its rows."""


@dataclass(frozen=True, kw_only=True)
class MatrixRow:
    """One line of a matrix."""

    labels: tuple[str, ...]
    """One text per entry of the matrix's `header`."""
    cells: tuple[MatrixCell, ...]
    """One per entry of the matrix's `columns`."""
    variant: Variant | None = None
    """What the line stands for."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One metric under one evaluation protocol; rows are methods with their backbones."""

    metric: str
    """Name in `METRICS`."""
    title: str
    """Name as people read it, such as `Image AUROC`."""
    dataset: str | None = None
    """The dataset whose categories are the columns; None where the columns are datasets."""
    protocol_id: str
    protocol: str
    """The evaluation protocol in words."""
    common: tuple[str, ...] = ()
    """Settings that all rows share and that differ from the usual, such as a representation."""
    header: tuple[str, ...]
    """Names of the label columns: method, backbone and whatever else varies."""
    columns: tuple[str, ...]
    rows: tuple[MatrixRow, ...]
    cells_done: int
    """Result rows with a number."""
    cells_expected: int
    """Result rows that a complete matrix would have: every category and seed that any row of a method asks for."""

    @property
    def subject(self) -> str:
        """What one number is about: `mean over categories`, or the dataset's name."""
        return "mean over categories" if self.dataset is None else self.dataset

    @cached_property
    def stamps(self) -> tuple[str, ...]:
        """Every stamp of every cell, each once, in order of appearance."""
        return tuple(dict.fromkeys(stamp for row in self.rows for cell in row.cells for stamp in cell.stamps))

    @cached_property
    def shared_stamps(self) -> tuple[str, ...]:
        """Stamps that every number carries."""
        numbers = [cell for row in self.rows for cell in row.cells if cell.state == "value"]
        return tuple(stamp for stamp in self.stamps if numbers and all(stamp in cell.stamps for cell in numbers))

    @cached_property
    def marks(self) -> dict[str, str]:
        """Footnote mark of each stamp that only some numbers carry."""
        some = [stamp for stamp in self.stamps if stamp not in self.shared_stamps]
        return {stamp: _MARKS[number % 4] * (number // 4 + 1) for number, stamp in enumerate(some)}

    @property
    def holes(self) -> list[tuple[MatrixRow, str, MatrixCell]]:
        """Every hole with its row and the name of its column."""
        return [
            (row, column, cell)
            for row in self.rows
            for column, cell in zip(self.columns, row.cells, strict=True)
            if cell.state == "hole"
        ]

    @property
    def numbers(self) -> list[float]:
        """All numbers of the matrix, row by row."""
        return [cell.value for row in self.rows for cell in row.cells if cell.value is not None]

    def ranks(self) -> list[list[Rank]]:
        """Best and second best of each column, compared as printed so that ties share a rank; none in a lone row."""
        ranks: list[list[Rank]] = [[""] * len(self.columns) for _ in self.rows]
        for column in range(len(self.columns)):
            printed = [_rounded(row.cells[column].value) for row in self.rows]
            order = sorted({value for value in printed if value is not None}, reverse=True)
            if sum(value is not None for value in printed) < 2:
                continue
            names: dict[int, Rank] = dict(zip(order, ("best", "second"), strict=False))
            for number, value in enumerate(printed):
                if value is not None:
                    ranks[number][column] = names.get(value, "")
        return ranks

    def colour_range(self) -> tuple[float, float]:
        """Rates at the two ends of the colour scale: the numbers' range, widened to multiples of 0.05."""
        if not self.numbers:
            return 0.0, 1.0
        low = math.floor(min(self.numbers) * 20 + 1e-9) / 20
        high = math.ceil(max(self.numbers) * 20 - 1e-9) / 20
        return (low, high) if high > low else (max(low - 0.05, 0.0), min(high + 0.05, 1.0))


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value * 1000)


# --- from records to a matrix ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a line of a matrix stands for: the axes but dataset, category and seed."""

    method: str
    backbone: str | None
    representation: str
    layers: str
    """Joined by `+`."""
    shots: int | None
    """None for all, or where the number of shots belongs to the dataset."""
    params: str
    """JSON."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a matrix needs of a row."""

    variant: Variant
    dataset: str
    category: str
    seed: int
    status: str
    prediction_id: str
    reason: str
    stamps: tuple[str, ...]
    rates: Mapping[str, float]
    """By metric, in [0, 1]; a metric that is not available has no key."""


def build_matrix(
    records: Sequence[Record], metric: str, dataset: str | None, protocol_id: str, protocol: str
) -> Matrix:
    """The matrix of one metric.

    A number needs every category that its dataset has in the records and every seed that its line has; else it is a
    hole. Of two records for the same thing a finished one counts before others, then the later; two finished ones with
    different predictions make a hole too, since nothing says which is meant.

    Args:
        records: rows of one protocol; at least one.
        metric: name in `METRICS`.
        dataset: None for datasets as columns; else the records are of this dataset, its categories are the columns and
            their mean is the last one.
        protocol_id: short hash of the protocol.
        protocol: the protocol in words.
    """
    header, labels, common = _label_lines(records)
    found: dict[tuple[Variant, str, str, int], list[Record]] = {}
    categories: dict[str, dict[str, None]] = {}
    seeds: dict[Variant, dict[int, None]] = {}
    for record in records:
        found.setdefault((record.variant, record.dataset, record.category, record.seed), []).append(record)
        categories.setdefault(record.dataset, {})[record.category] = None
        seeds.setdefault(record.variant, {})[record.seed] = None
    ran = {(record.variant, record.dataset) for record in records}
    absent = _absent(records, metric)
    columns = [(name, name, tuple(categories[name])) for name in categories]
    if dataset is not None:
        columns = [(name, dataset, (name,)) for name in categories[dataset]]
        columns += [("mean", dataset, tuple(categories[dataset]))] if len(columns) > 1 else []
    lines = []
    for variant, texts in labels.items():
        cells = []
        for _, name, members in columns:
            without = absent & {(name, category) for category in members}
            if (variant, name) in ran:
                chosen = {
                    (category, seed): _choose(found.get((variant, name, category, seed), []))
                    for category in members
                    for seed in seeds[variant]
                }
                cells.append(_make_cell(chosen, metric, sorted(category for _, category in without)))
            elif len(without) == len(members):
                cells.append(MatrixCell(state="unavailable"))
            else:
                cells.append(MatrixCell(state="hole", note="not run"))
        lines.append(MatrixRow(labels=texts, cells=tuple(cells), variant=variant))
    return Matrix(
        metric=metric,
        title=METRICS[metric].title,
        dataset=dataset,
        protocol_id=protocol_id,
        protocol=protocol,
        common=common,
        header=header,
        columns=tuple(name for name, _, _ in columns),
        rows=tuple(lines),
        cells_done=sum(_choose(members)[0] == "ok" for members in found.values()),
        cells_expected=sum(len(categories[name]) * len(seeds[variant]) for variant, name in ran),
    )


def _absent(records: Sequence[Record], metric: str) -> set[tuple[str, str]]:
    """Categories in which finished rows show that the metric does not exist."""
    finished = {(record.dataset, record.category) for record in records if record.status == "ok"}
    return finished - {(record.dataset, record.category) for record in records if metric in record.rates}


def _choose(records: Sequence[Record]) -> tuple[str, Record | None]:
    """The row that counts of those for one thing, with its status; `missing` and `ambiguous` where there is none."""
    finished = [record for record in records if record.status == "ok"]
    if len({record.prediction_id for record in finished}) > 1:
        return "ambiguous", finished[-1]
    if not records:
        return "missing", None
    record = (finished or list(records))[-1]
    return record.status, record


def _make_cell(
    chosen: Mapping[tuple[str, int], tuple[str, Record | None]], metric: str, without: list[str]
) -> MatrixCell:
    if len(without) == len({category for category, _ in chosen}):
        return MatrixCell(state="unavailable")
    counts = Counter(status for status, _ in chosen.values() if status != "ok")
    if counts:
        note = ", ".join(f"{number} {status}" for status, number in counts.items()) + f" of {len(chosen)}"
        if len(counts) == 1:
            ((status, number),) = counts.items()
            note = f"{number} of {len(chosen)} {status}"
        return MatrixCell(state="hole", note=note, reason=_first_reason(chosen))
    records = [record for _, record in chosen.values() if record is not None]
    lacking = sorted({record.category for record in records if metric not in record.rates})
    if lacking:
        return MatrixCell(state="unavailable", note=f"not available for {', '.join(lacking)}")
    per_seed: dict[int, list[float]] = {}
    for record in records:
        per_seed.setdefault(record.seed, []).append(record.rates[metric])
    means = [statistics.fmean(values) for values in per_seed.values()]
    return MatrixCell(
        state="value",
        value=statistics.fmean(means),
        std=statistics.stdev(means) if len(means) > 1 else None,
        stamps=tuple(dict.fromkeys(stamp for record in records for stamp in record.stamps)),
    )


def _first_reason(chosen: Mapping[tuple[str, int], tuple[str, Record | None]]) -> str:
    for (category, seed), (status, record) in chosen.items():
        if status == "ambiguous":
            return f"{category}, seed {seed}: two finished rows with different predictions; report them apart"
        if status not in ("ok", "missing") and record is not None:
            return f"{category}, seed {seed}: {record.reason or 'no reason given'}"
    return "no row"


# --- lines and their labels ------------------------------------------------------------------------------------


def _label_lines(records: Sequence[Record]) -> tuple[tuple[str, ...], dict[Variant, tuple[str, ...]], tuple[str, ...]]:
    """Names of the label columns, the texts of each line in order, and what all lines share."""
    variants = list(dict.fromkeys(record.variant for record in records))
    with_backbone = [variant for variant in variants if variant.backbone is not None]
    representations = list(dict.fromkeys(variant.representation for variant in with_backbone))
    shots = list(dict.fromkeys(variant.shots for variant in variants))
    settings = _settings(variants)
    header = ["method", "backbone"]
    header += ["representation"] * (len(representations) > 1)
    header += ["shots"] * (len(shots) > 1)
    header += ["settings"] * any(settings.values())
    common = [f"representation {name}" for name in representations if name != "plain" and len(representations) == 1]

    labels = {}
    for variant in _in_order(variants, settings):
        texts = {
            "method": variant.method,
            "backbone": variant.backbone or NO_BACKBONE,
            "representation": NO_BACKBONE if variant.backbone is None else variant.representation,
            "shots": "all" if variant.shots is None else str(variant.shots),
            "settings": ", ".join(f"{name}={show_value(value)}" for name, value in settings[variant].items()),
        }
        labels[variant] = tuple(texts[name] for name in header)
    return tuple(header), labels, tuple(common)


def _settings(variants: Sequence[Variant]) -> dict[Variant, dict[str, Any]]:
    """Per line the layers and parameters that tell it from its like: varying within the backbone or the method."""
    layers: dict[tuple[str, str | None], set[str]] = {}
    params: dict[tuple[str, str], set[str]] = {}
    parsed = {variant: json.loads(variant.params) for variant in variants}
    for variant in variants:
        layers.setdefault((variant.method, variant.backbone), set()).add(variant.layers)
        for name, value in parsed[variant].items():
            params.setdefault((variant.method, name), set()).add(json.dumps(value, sort_keys=True))
    return {
        variant: {
            **({"layers": variant.layers} if len(layers[variant.method, variant.backbone]) > 1 else {}),
            **{name: value for name, value in parsed[variant].items() if len(params[variant.method, name]) > 1},
        }
        for variant in variants
    }


def _in_order(variants: Sequence[Variant], settings: Mapping[Variant, Mapping[str, Any]]) -> list[Variant]:
    """Lines of a method together, methods and backbones as they first appear, then by shots and settings."""

    def places(values: Iterable[Any]) -> dict[Any, int]:
        return {value: place for place, value in enumerate(dict.fromkeys(values))}

    methods = places(variant.method for variant in variants)
    backbones = places(variant.backbone for variant in variants)
    representations = places(variant.representation for variant in variants)

    def key(variant: Variant) -> tuple[Any, ...]:
        return (
            methods[variant.method],
            backbones[variant.backbone],
            representations[variant.representation],
            (variant.shots is None, variant.shots or 0),
            [_natural(value) for value in settings[variant].values()],
        )

    return sorted(variants, key=key)


def _natural(value: Any) -> tuple[bool, float, str]:
    is_text = not isinstance(value, (int, float))
    return (is_text, 0.0 if is_text else float(value), show_value(value) if is_text else "")


def varied_params(configurations: Iterable[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, str]]:
    """(method, parameter) of the parameters with several values within one method, in order of first appearance; that
    two methods differ says nothing.

    Args:
        configurations: methods with their parameters.
    """
    seen: dict[tuple[str, str], set[str]] = {}
    for method, params in configurations:
        for name, value in params.items():
            seen.setdefault((method, name), set()).add(json.dumps(value, sort_keys=True))
    return [key for key, values in seen.items() if len(values) > 1]


def show_value(value: Any) -> str:
    """A parameter as people write it: six significant digits, text without quotes, anything else as JSON."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
