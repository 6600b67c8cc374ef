"""From rows to reports: the flat table of rows, matrices that never mix protocols, and the files of a report folder.

The one home of pandas. Matrices are built in `harness/matrices.py` and written down in `harness/tables.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness.contracts import AdgridError, ResultRow
from harness.figures import draw_matrix
from harness.matrices import NO_BACKBONE, Matrix, Record, Variant, build_matrix, show_value, varied_params
from harness.matrix_page import matrix_html
from harness.metrics import METRICS
from harness.tables import (
    FailureGroup,
    failures_table,
    group_failures,
    matrix_csv,
    matrix_json,
    matrix_latex,
    matrix_markdown,
    terminal_table,
)

__all__ = ["build_matrices", "describe_protocol", "failures_table", "rows_frame", "terminal_table", "write_report"]

_PROTOCOL_ORDER = ("image_size", "resize", "interpolation", "mask_rule", "cropped_anomaly", "smoothing")
_AXES = ("method", "backbone", "representation", "layers", "shots", "params")


# --- the flat table --------------------------------------------------------------------------------------------


def rows_frame(rows: Iterable[ResultRow]) -> pd.DataFrame:
    """One line per row of results, in the order given.

    Columns: ids, status, the axes, `param.<name>` for every parameter that varies within a method, all metrics of
    `METRICS` (rates in [0, 1], <NA> where not available), `<metric>_bound`, costs, stamps, reason, the protocol, all
    parameters as JSON, `provenance.<key>`, traceback.
    """
    listed = list(rows)
    extra = [name for name in _keys(row.metrics for row in listed) if name not in METRICS]
    columns: dict[str, Any] = {
        name: [getattr(row, name) for row in listed]
        for name in ("cell_id", "prediction_id", "trial_id", "status", "method", "backbone")
    }
    columns["layers"] = ["+".join(row.layers) for row in listed]
    columns |= {name: [getattr(row, name) for row in listed] for name in ("representation", "dataset", "category")}
    columns["shots"] = pd.array([row.shots for row in listed], dtype="Int64")
    columns["seed"] = pd.array([row.seed for row in listed], dtype="Int64")
    # Rows that were read from a store share parameters that are equal.
    configurations = {(row.method, id(row.params)): (row.method, row.params) for row in listed}
    for name in dict.fromkeys(name for _, name in varied_params(configurations.values())):
        columns[f"param.{name}"] = pd.Series([_scalar(row.params.get(name)) for row in listed]).convert_dtypes()
    for name in (*METRICS, *extra):
        columns[name] = _numbers(row.metrics.get(name) for row in listed)
    for name in _keys(row.metric_bounds for row in listed):
        columns[f"{name}_bound"] = _numbers(row.metric_bounds.get(name) for row in listed)
    for name in _keys(row.costs for row in listed):
        columns[name] = _numbers(row.costs.get(name) for row in listed)
    columns["tuned_fields"] = ["; ".join(row.tuned.get("fields", ())) for row in listed]
    columns["tuned_on"] = ["; ".join(row.tuned.get("cells", ())) for row in listed]
    columns["stamps"] = ["; ".join(row.stamps) for row in listed]
    columns["reason"] = [row.reason for row in listed]
    columns["protocol_id"] = [row.protocol_id for row in listed]
    written: dict[int, str] = {}
    for name in ("protocol", "resolved_protocol", "params"):
        columns[name] = [_write_once(getattr(row, name), written) for row in listed]
    for name in _keys(row.provenance for row in listed):
        columns[f"provenance.{name}"] = [row.provenance.get(name) for row in listed]
    columns["traceback"] = [row.traceback for row in listed]
    return pd.DataFrame(columns)


def _write_once(value: Mapping[str, Any], written: dict[int, str]) -> str:
    """A mapping as JSON; rows that were read from a store share those that are equal."""
    if id(value) not in written:
        written[id(value)] = json.dumps(dict(value), sort_keys=True)
    return written[id(value)]


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _numbers(values: Iterable[float | None]) -> Any:
    return pd.array([pd.NA if value is None else float(value) for value in values], dtype="Float64")


def _scalar(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


# --- matrices --------------------------------------------------------------------------------------------------


def build_matrices(
    frame: pd.DataFrame, metrics: Sequence[str] | None = None, dataset: str | None = None
) -> list[Matrix]:
    """One matrix per protocol and metric: means over categories, then over seeds.

    A line is a method with its backbone, and with representation, shots, layers and parameters where they vary; what
    makes a number or a hole is said in `build_matrix`. Where every dataset has its one number of shots, footnotes
    tell them.

    Args:
        frame: as `rows_frame` makes it.
        metrics: names in `METRICS`; None for all. Those without any value are left out, but where nothing finished the
            first stays to show the holes.
        dataset: None for datasets as columns; a dataset's name for its categories as columns, with their mean last.

    Raises:
        AdgridError: an unknown metric or dataset.
    """
    names = tuple(METRICS) if metrics is None else tuple(metrics)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise AdgridError(f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}")
    if dataset is not None and dataset not in set(frame["dataset"]):
        raise AdgridError(f"unknown dataset {dataset!r}; the rows have: {', '.join(dict.fromkeys(frame['dataset']))}")
    matrices = []
    for protocol_id in dict.fromkeys(frame["protocol_id"]):
        part = frame[frame["protocol_id"] == protocol_id]
        protocol = describe_protocol(json.loads(part["protocol"].iloc[0]))
        records = _records(part, names, dataset)
        finished = [record for record in records if record.status == "ok"]
        shown = [name for name in names if any(name in record.rates for record in finished)]
        if records and not finished:
            shown = list(names[:1])
        matrices += [build_matrix(records, name, dataset, protocol_id, protocol) for name in shown]
    return matrices


class Tabulated:
    """Some rows with their table and their matrices, so that several reports of them make each once."""

    def __init__(self, rows: Iterable[ResultRow]) -> None:
        """Args: at most one row per cell, in the order in which methods and datasets shall appear."""
        self.rows = list(rows)
        self.frame = rows_frame(self.rows)
        self.matrices = build_matrices(self.frame)
        """With datasets as columns."""
        self._of_datasets: dict[str, list[Matrix]] = {}

    def of_dataset(self, dataset: str) -> list[Matrix]:
        """The matrices of one dataset, with its categories as columns."""
        if dataset not in self._of_datasets:
            self._of_datasets[dataset] = build_matrices(self.frame, dataset=dataset)
        return self._of_datasets[dataset]


def find_variants(frame: pd.DataFrame) -> list[Variant]:
    """The line of a matrix that each row of a frame belongs to, in the order of the frame."""
    found: dict[int, Variant] = {}
    for protocol_id in dict.fromkeys(frame["protocol_id"]):
        part = frame[frame["protocol_id"] == protocol_id]
        places = [place for place, other in enumerate(frame["protocol_id"]) if other == protocol_id]
        found |= dict(zip(places, (record.variant for record in _records(part, (), None)), strict=True))
    return [found[place] for place in range(len(frame))]


def _records(frame: pd.DataFrame, metrics: Sequence[str], dataset: str | None) -> list[Record]:
    """What matrices need of the rows, or of those of one dataset."""
    # Where each dataset has its own number of shots, shots belong to the column and not to the line.
    is_axis = bool((frame[["dataset", "shots"]].drop_duplicates()["dataset"].value_counts() > 1).any())
    if dataset is not None:
        frame = frame[frame["dataset"] == dataset]
    others = ["dataset", "category", "seed", "status", "prediction_id", "reason", "stamps", "tuned_fields"]
    wanted = [*_AXES, *others, *metrics]
    rows: list[dict[str, Any]] = [
        {str(name): None if pd.isna(value) else value for name, value in row.items()}
        for row in frame[list(dict.fromkeys(wanted))].to_dict("records")
    ]
    for row in rows:
        # What was searched is one line, whatever came out of it for each backbone and dataset.
        searched = dict.fromkeys(row.pop("tuned_fields").split("; "), "tuned")
        if "" not in searched:
            row["params"] = json.dumps({**json.loads(row["params"]), **searched}, sort_keys=True)
    return [
        Record(
            variant=Variant(**{**{axis: row[axis] for axis in _AXES}, "shots": row["shots"] if is_axis else None}),
            stamps=_column_stamps(row, is_axis),
            rates={name: row[name] for name in metrics if row[name] is not None},
            **{name: row[name] for name in ("dataset", "category", "seed", "status", "prediction_id", "reason")},
        )
        for row in rows
    ]


def _column_stamps(row: Mapping[str, Any], shots_is_axis: bool) -> tuple[str, ...]:
    stamps = tuple(stamp for stamp in row["stamps"].split("; ") if stamp)
    if row["shots"] is None or shots_is_axis:
        return stamps
    return (*stamps, f"{row['shots']} shots")


# --- protocols in words ----------------------------------------------------------------------------------------


def describe_protocol(protocol: Mapping[str, Any]) -> str:
    """An evaluation protocol as a short sentence; a field that is not known here is told by name and value."""
    known = [name for name in _PROTOCOL_ORDER if name in protocol]
    names = [*known, *sorted(set(protocol) - set(known))]
    return ", ".join(_describe_field(name, protocol[name]) for name in names)


def _describe_field(name: str, value: Any) -> str:
    match name, value:
        case "image_size", (height, width):
            return f"{height}×{width} px"
        case "resize", None:
            return "resized straight to it"
        case "resize", _:
            return f"shorter side resized to {value}, centre crop"
        case "interpolation", "backbone":
            return "interpolation of the backbone"
        case "interpolation", _:
            return f"{value} interpolation"
        case "mask_rule", _:
            return f"masks {value}"
        case "cropped_anomaly", "keep":
            return "cropped-out defects stay anomalous"
        case "cropped_anomaly", _:
            return f"cropped-out defects count as {value}"
        case "smoothing", "method":
            return "smoothing of the method"
        case "smoothing", _:
            return f"smoothing σ {value:g} px" if value else "no smoothing"
        case "score_reduction", "method":
            return "image score of the method"
        case "score_reduction", _:
            return f"image score by {value}"
        case "aupro_limit", _:
            return f"AUPRO up to FPR {value:g}"
        case "selection", "last":
            return "last state scored"
        case "selection", "test_best":
            return "STATE PICKED ON TEST DATA"
    return f"{name} {show_value(value)}"


def own_values(rows: Sequence[ResultRow]) -> list[tuple[str, str]]:
    """Fields that the protocol leaves to methods and backbones, and what they were."""
    seen: dict[str, dict[str, dict[str, None]]] = {}
    for row in rows:
        for name, value in row.protocol.items():
            if value in ("method", "backbone") and name in row.resolved_protocol:
                owner = row.method if value == "method" else row.backbone or f"{row.method} (no backbone)"
                resolved = show_value(row.resolved_protocol[name])
                seen.setdefault(name, {}).setdefault(owner, {})[resolved] = None
    return [
        (name, ", ".join(f"{owner} {' / '.join(values)}" for owner, values in owners.items()))
        for name, owners in seen.items()
    ]


# --- the report folder -----------------------------------------------------------------------------------------


def write_report(
    folder: str | Path,
    rows: Iterable[ResultRow] | Tabulated,
    *,
    title: str,
    command: str,
    expected_cells: int | None = None,
    contact_sheets: Mapping[str, str] | None = None,
    further_sections: Sequence[str] = (),
    also_figures: Sequence[str] = (),
) -> list[Path]:
    """Writes tables and pictures of some rows.

        report.md                                everything a reader needs, with the pictures
        rows.csv                                 one line per cell
        matrices/<metric>.{csv,json,...}         CSV, JSON, Markdown, LaTeX, HTML and PNG; datasets as columns; the
                                                 protocol id is added where there are several
        categories/<dataset>/<metric>.{csv,md,tex}

    Tables and pictures of an earlier report in the same folder that no longer belong to it are removed.

    Args:
        folder: made if need be.
        rows: at most one per cell, in the order in which methods and datasets shall appear.
        title: headline, such as the name of the search space.
        command: what remakes the run.
        expected_cells: number of cells planned; the report says so when rows are missing.
        contact_sheets: cell id -> path or address of its contact sheet, as seen from `folder`.
        further_sections: lines of Markdown that stand after the tables.
        also_figures: `pdf` and `svg`, formats of the pictures of matrices besides PNG.

    Returns:
        The files written, `report.md` first.
    """
    tabulated = rows if isinstance(rows, Tabulated) else Tabulated(rows)
    target, listed, frame, matrices = Path(folder), tabulated.rows, tabulated.frame, tabulated.matrices
    files: list[Path] = [_write(target / "rows.csv", frame.drop(columns="traceback").to_csv(index=False))]
    several = len({row.protocol_id for row in listed}) > 1
    for matrix in matrices:
        stem = target / "matrices" / _stem(matrix, several)
        files += _write_tables(stem, matrix, (".csv", ".json", ".md", ".tex", ".html"))
        pictures = [stem.with_name(f"{stem.name}.{kind}") for kind in dict.fromkeys(("png", *also_figures))]
        draw_matrix(matrix, *pictures)
        files += pictures
    per_dataset: dict[str, list[Matrix]] = {}
    for dataset in dict.fromkeys(frame["dataset"]):
        if len({row.category for row in listed if row.dataset == dataset}) > 1:
            per_dataset[dataset] = tabulated.of_dataset(dataset)
            for matrix in per_dataset[dataset]:
                stem = target / "categories" / _file_name(dataset) / _stem(matrix, several)
                files += _write_tables(stem, matrix, (".csv", ".md", ".tex"))
    sections = [
        *_headline(title, command, listed, expected_cells),
        *_matrix_sections(matrices, several, also_figures),
        *_category_section(per_dataset),
        *further_sections,
        *_sheet_section(listed, contact_sheets or {}),
        *_failure_section(group_failures(listed)),
        *_method_section(listed, matrices),
        *_provenance_section(listed),
    ]
    files.insert(0, _write(target / "report.md", "\n".join(sections) + "\n"))
    _remove_stale(target, set(files))
    return files


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _write_tables(stem: Path, matrix: Matrix, kinds: Sequence[str]) -> Iterator[Path]:
    writers = {
        ".csv": matrix_csv, ".json": matrix_json, ".md": matrix_markdown, ".tex": matrix_latex, ".html": matrix_html
    }  # fmt: skip
    for kind in kinds:
        yield _write(stem.with_name(stem.name + kind), writers[kind](matrix))


def _stem(matrix: Matrix, several_protocols: bool) -> str:
    return f"{matrix.metric}-{matrix.protocol_id}" if several_protocols else matrix.metric


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _remove_stale(folder: Path, written: set[Path]) -> None:
    for part in ("matrices", "categories"):
        for path in (folder / part).rglob("*"):
            if path.suffix in (".csv", ".json", ".md", ".tex", ".html", ".png", ".pdf", ".svg") and path not in written:
                path.unlink()


def _headline(title: str, command: str, rows: Sequence[ResultRow], expected: int | None) -> list[str]:
    done = sum(row.status == "ok" for row in rows)
    lines = [
        f"# {title}",
        "",
        f"    {command}",
        "",
        f"{len(rows)} cells: {done} with numbers, {len(rows) - done} without.",
    ]
    if expected is not None and expected > len(rows):
        lines += [
            "",
            f"**{expected - len(rows)} of {expected} planned cells have no row yet: this report is not complete, and a "
            "category that no method has reached is not counted in any mean.**",
        ]
    return lines


def _matrix_sections(matrices: Sequence[Matrix], several: bool, also_figures: Sequence[str]) -> list[str]:
    lines = []
    for matrix in matrices:
        stem = f"matrices/{_stem(matrix, several)}"
        heading = f"## {matrix.title}" + (f", protocol {matrix.protocol_id}" if several else "")
        files = " · ".join(
            f"[{name}]({stem}.{kind})"
            for name, kind in (
                ("CSV", "csv"),
                ("JSON", "json"),
                ("LaTeX", "tex"),
                ("HTML", "html"),
                *((k.upper(), k) for k in also_figures),
            )
        )
        lines += ["", heading, "", f"![{matrix.title}]({stem}.png)", "", matrix_markdown(matrix), files]
    if not matrices:
        lines += ["", "There is nothing to show yet."]
    return lines


def _category_section(per_dataset: Mapping[str, Sequence[Matrix]]) -> list[str]:
    lines = ["", "## Per category"] if per_dataset else []
    for dataset, matrices in per_dataset.items():
        lines += ["", f"<details><summary>{dataset}</summary>"]
        for matrix in matrices:
            lines += ["", matrix_markdown(matrix)]
        lines += ["", "</details>"]
    return lines


def _sheet_section(rows: Sequence[ResultRow], sheets: Mapping[str, str]) -> list[str]:
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.cell_id in sheets:
            name = " · ".join([row.method, row.backbone or NO_BACKBONE, f"seed {row.seed}"])
            lines.setdefault((row.dataset, row.category), []).append(f"[{name}]({sheets[row.cell_id]})")
    if not lines:
        return []
    listed = [f"- {dataset}, {category}: {', '.join(links)}" for (dataset, category), links in lines.items()]
    return ["", "## Most and least anomalous test images", "", *listed]


def _failure_section(groups: Sequence[FailureGroup]) -> list[str]:
    if not groups:
        return []
    lines = ["", "## Without a number", "", "| what | categories | cells | status | reason |", "|---|---|--:|---|---|"]
    for group in groups:
        reason = group.reason.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
        lines.append(
            f"| {group.what} | {', '.join(group.categories)} | {group.num_cells} | {group.status} | {reason} |"
        )
    for group in groups:
        if group.traceback:
            block = ["```text", group.traceback.replace("```", "'''").rstrip(), "```"]
            lines += ["", f"<details><summary>{group.what}: traceback</summary>", "", *block, "", "</details>"]
    return lines


def _method_section(rows: Sequence[ResultRow], matrices: Sequence[Matrix]) -> list[str]:
    lines = ["", "## How to read the numbers", ""]
    lines += [
        "A number is the unweighted mean over the categories of a dataset, then over the seeds. A hole stands where a "
        "row behind the number is missing or not ok; n/a where the metric does not exist.",
        "",
    ]
    used = [name for name in METRICS if any(matrix.metric == name for matrix in matrices)]
    lines += [f"- {METRICS[name].title}: {METRICS[name].definition}" for name in used]
    own = [f"- {name}: {text}" for name, text in own_values(rows)]
    return (
        [*lines, "", "The protocol leaves these to the method or backbone; the values were:", "", *own]
        if own
        else lines
    )


def summarise_provenance(rows: Sequence[ResultRow]) -> dict[str, str]:
    """What rows say about where they come from, by key: the values, or how many there are with the first and last."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in row.provenance.items():
            values.setdefault(key, set()).add(value)
    return {
        key: ", ".join(sorted(found)) if len(found) <= 4 else f"{len(found)} values, {min(found)} to {max(found)}"
        for key, found in sorted(values.items())
    }


def _provenance_section(rows: Sequence[ResultRow]) -> list[str]:
    told = summarise_provenance(rows)
    lines = ["", "## Provenance", "", "| | |", "|---|---|"] if told else []
    return [*lines, *(f"| {key} | {text.replace('|', chr(92) + '|')} |" for key, text in told.items())]
