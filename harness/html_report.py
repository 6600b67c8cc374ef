"""The report as one HTML file that needs nothing else: no network, no folder beside it.

What is shown goes in as data; `harness/page/` holds the page, its style and the script that draws it.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from harness import __version__
from harness.bundle import ImageScores
from harness.contracts import ResultRow
from harness.html_cells import Intervals, describe_cells
from harness.matrices import Matrix, MatrixCell, MatrixRow, Variant
from harness.metrics import METRICS
from harness.registry import dataset_layouts, load_dataset_class
from harness.report import Tabulated, describe_protocol, find_variants, own_values, summarise_provenance
from harness.search import parse_distribution
from harness.study import SampleResult, find_best
from harness.tables import FailureGroup, describe_matrix, group_failures, scale_stops

PICTURE_BYTES = 6 * 2**20
"""Room for photos and heat maps; the rest of a report of a thousand cells takes about 3 MiB."""

Study = tuple[Mapping[str, Any], Sequence[SampleResult], Path]
"""A study as its run keeps it, its samples, and its picture."""


def render_page(
    results: Sequence[ResultRow] | Tabulated,
    scores: Mapping[str, ImageScores],
    details: Callable[[str], Mapping[str, Any]],
    *,
    title: str,
    command: str,
    expected_cells: int | None = None,
    studies: Sequence[Study] = (),
    picture_bytes: int = PICTURE_BYTES,
) -> str:
    """The page of some rows.

    Args:
        results: rows, at most one per cell, in the order in which methods and datasets shall appear.
        scores: image scores by cell id; cells without have no ROC curve and no interval.
        details: curves and pictures of a cell by its id, as `harness.details.load_details` gives them.
        title: headline, such as the name of the search space.
        command: what remakes the run.
        expected_cells: number of cells planned; the page says so when rows are missing.
        studies: what was searched.
        picture_bytes: room for photos and heat maps.
    """
    tabulated = results if isinstance(results, Tabulated) else Tabulated(results)
    rows, variants, matrices = tabulated.rows, find_variants(tabulated.frame), [*tabulated.matrices]
    for dataset in dict.fromkeys(row.dataset for row in rows):
        matrices += tabulated.of_dataset(dataset)
    protocols = list(dict.fromkeys(row.protocol_id for row in rows))
    numbers: dict[Variant, int] = {}
    for variant in [line.variant for matrix in matrices for line in matrix.rows if line.variant] + variants:
        numbers.setdefault(variant, len(numbers))
    names = {
        numbers[line.variant]: list(line.labels)
        for matrix in matrices
        for line in matrix.rows
        if line.variant is not None
    }
    members: dict[tuple[str, Variant, str], list[ResultRow]] = {}
    for row, variant in zip(rows, variants, strict=True):
        members.setdefault((row.protocol_id, variant, row.dataset), []).append(row)
    cells, photos = describe_cells(rows, scores, details, picture_bytes)
    finished = [(row, variant) for row, variant in zip(rows, variants, strict=True) if row.status == "ok"]
    for cell, (row, variant) in zip(cells, finished, strict=True):
        cell |= {"dataset": row.dataset, "variant": numbers[variant], "protocol": protocols.index(row.protocol_id)}

    intervals = Intervals(scores)

    def interval(matrix: Matrix, line: MatrixRow, column: str) -> tuple[float, float] | None:
        is_number = line.cells[matrix.columns.index(column)].value is not None
        if matrix.metric != "image_auroc" or line.variant is None or not is_number:
            return None
        dataset = matrix.dataset or column
        found = members.get((matrix.protocol_id, line.variant, dataset), [])
        found = [row for row in found if row.status == "ok"]  # a failed one beside a finished one does not count
        if matrix.dataset is not None and column != "mean":
            found = [row for row in found if row.category == column]
        return intervals.of(found)

    used = [name for name in METRICS if any(matrix.metric == name for matrix in matrices)]
    data = {
        "metrics": [{"name": name, "title": METRICS[name].title} for name in used],
        "protocols": [
            {"id": name, "aupro_limit": next(row for row in rows if row.protocol_id == name).protocol["aupro_limit"]}
            for name in protocols
        ],
        "variants": [names.get(place, []) for place in range(len(numbers))],
        "scale": scale_stops(),
        "matrices": [
            _describe_matrix(
                matrix,
                protocols,
                numbers,
                [[interval(matrix, line, name) for name in matrix.columns] for line in matrix.rows],
            )
            for matrix in matrices
        ],
        "cells": cells,
        "photos": photos,
        "credits": {
            dataset: text for dataset in dict.fromkeys(row.dataset for row in rows) if (text := _credit(dataset))
        },
    }
    failures = group_failures(rows)
    done = sum(row.status == "ok" for row in rows)
    sections = [("results", "Results"), ("cost", "Cost")] if done else [("results", "Results")]
    sections += [("studies", "Studies")] * bool(studies) + [("failures", "Failures")] * bool(failures)
    sections += [("reading", "Reading"), ("provenance", "Provenance")]
    return Template(_asset("page.html")).substitute(
        title=escape(title),
        version=escape(__version__),
        style=_asset("style.css"),
        script=_asset("script.js"),
        navigation="".join(f'<a href="#{name}">{label}</a>' for name, label in sections),
        summary=_summary(rows, done),
        warning=_warning(len(rows), expected_cells),
        command=escape(command),
        studies=_studies_section(studies),
        failures=_failures_section(failures),
        reading=_reading_section(rows, used),
        provenance=_provenance_section(rows),
        # A closing tag inside the data would end the script that holds it.
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )


@cache
def _asset(name: str) -> str:
    return (files("harness") / "page" / name).read_text(encoding="utf-8")


def _describe_matrix(
    matrix: Matrix,
    protocols: Sequence[str],
    numbers: Mapping[Variant, int],
    intervals: Sequence[Sequence[tuple[float, float] | None]],
) -> dict[str, Any]:
    low, high = matrix.colour_range()
    ranks = matrix.ranks()
    return {
        "metric": matrix.metric,
        "title": matrix.title,
        "dataset": matrix.dataset,
        "protocol": protocols.index(matrix.protocol_id),
        "header": matrix.header,
        "columns": matrix.columns,
        "low": low,
        "high": high,
        "notes": [
            *describe_matrix(matrix),
            *(["Ranges: 95 % over test images (DeLong) and seeds."] if any(any(line) for line in intervals) else []),
        ],
        "rows": [
            {
                "labels": line.labels,
                "variant": None if line.variant is None else numbers[line.variant],
                "cells": [
                    _describe_cell(matrix, cell, rank, interval)
                    for cell, rank, interval in zip(line.cells, line_ranks, line_intervals, strict=True)
                ],
            }
            for line, line_ranks, line_intervals in zip(matrix.rows, ranks, intervals, strict=True)
        ],
    }


def _describe_cell(matrix: Matrix, cell: MatrixCell, rank: str, interval: tuple[float, float] | None) -> dict[str, Any]:
    if cell.value is None:
        told = {"state": cell.state, "note": cell.note, "reason": cell.reason}
        return {name: value for name, value in told.items() if value}
    marks = "".join(mark for stamp, mark in matrix.marks.items() if stamp in cell.stamps)
    found = {
        "value": round(cell.value, 5),
        "std": None if cell.std is None else round(cell.std, 5),
        "interval": None if interval is None else [round(end, 5) for end in interval],
        "rank": rank,
        "marks": marks,
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def _credit(dataset: str) -> str:
    """Whose images these are, for a dataset under its published name."""
    if dataset not in dataset_layouts():
        return ""
    known = load_dataset_class(dataset)
    return f"Images: {known.summary}. Licence: {known.licence}. Shrunk, with heat maps laid over."


# --- parts that need no script -----------------------------------------------------------------------------------


def _summary(rows: Sequence[ResultRow], done: int) -> str:
    def count(values: set[Any], one: str, many: str) -> str:
        return f"{len(values)} {one if len(values) == 1 else many}"

    parts = [
        count({row.method for row in rows}, "method", "methods"),
        count({row.backbone for row in rows if row.backbone}, "backbone", "backbones"),
        count({row.dataset for row in rows}, "dataset", "datasets"),
        count({(row.dataset, row.category) for row in rows}, "category", "categories"),
        count({row.seed for row in rows}, "seed", "seeds"),
    ]
    cells = f"{len(rows)} cells" + ("" if done == len(rows) else f", {len(rows) - done} of them without a number")
    newest = max((row.provenance.get("finished_at", "") for row in rows), default="")
    when = f"; last finished {dt.datetime.fromisoformat(newest):%Y-%m-%d %H:%M} UTC" if newest else ""
    return escape(f"{', '.join(parts)}: {cells}{when}.")


def _warning(num_rows: int, expected: int | None) -> str:
    if expected is None or expected <= num_rows:
        return ""
    return (
        f'<p class="warning">{expected - num_rows} of {expected} planned cells have no row yet: this report is not '
        "complete.</p>"
    )


def _failures_section(groups: Sequence[FailureGroup]) -> str:
    if not groups:
        return ""
    lines = []
    for group in groups:
        trace = ""
        if group.traceback:
            trace = f"<details><summary>Traceback</summary><pre>{escape(group.traceback)}</pre></details>"
        lines.append(
            f'<tr><th scope="row">{escape(group.what)}</th><td>{escape(", ".join(group.categories))}</td>'
            f'<td class="num">{group.num_cells}</td><td class="status-{group.status}">{group.status}</td>'
            f"<td>{escape(group.reason)}{trace}</td></tr>"
        )
    total = sum(group.num_cells for group in groups)
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("What", "Categories", "Cells", "Status", "Reason"))
    return (
        '<section id="failures" aria-labelledby="failures-heading"><div class="heading">'
        '<h2 id="failures-heading">Without a number</h2></div><div class="scroll" tabindex="0" role="region" '
        'aria-label="Cells without a number">'
        f'<table class="sortable"><caption>{total} {"cell" if total == 1 else "cells"}, by reason</caption><thead><tr>'
        f"{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _studies_section(studies: Sequence[Study]) -> str:
    if not studies:
        return ""
    parts = [_study(record, results, picture) for record, results, picture in studies]
    return (
        '<section id="studies" aria-labelledby="studies-heading"><h2 id="studies-heading">Studies</h2>'
        f"{''.join(parts)}</section>"
    )


def _study(record: Mapping[str, Any], results: Sequence[SampleResult], picture: Path) -> str:
    objective = METRICS[record["search"]["objective"]].title
    best, fields = find_best(results), list(record["distributions"])
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("Trial", *fields, f"{objective} [%]"))
    lines = []
    for result in sorted(results, key=lambda one: (one.score is None, -(one.score or 0.0), one.number)):
        values = "".join(f"<td>{escape(_show(result.params[field]))}</td>" for field in fields)
        score = result.status if result.score is None else f"{100 * result.score:.1f}"
        if result is best:
            score = f"<b>{score}</b>"
        lines.append(f'<tr><th scope="row">{result.number}</th>{values}<td class="num">{score}</td></tr>')
    ranges = "; ".join(f"{field} {parse_distribution(item)}" for field, item in record["distributions"].items())
    shown = ""
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        shown = f'<img alt="Parallel coordinates of the trials" src="data:image/png;base64,{data}">'
    what = " · ".join(filter(None, [record["method"], record["backbone"], record["tuned_on"][0].rpartition("/")[0]]))
    return (
        f'<article class="study"><h3>{escape(what)}</h3><p>{len(results)} configurations by '
        f"{escape(record['search']['searcher'])} search over {escape(ranges)}. Tuned on "
        f"{escape(', '.join(record['tuned_on']))} by {escape(objective)}, reported on "
        f"{escape(', '.join(record['reported']))}.</p>{shown}"
        f'<div class="scroll" tabindex="0" role="region" aria-label="Trials of {escape(what)}"><table class="sortable">'
        f"<caption>Trials, the best first</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
        "</table></div></article>"
    )


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _reading_section(rows: Sequence[ResultRow], used: Sequence[str]) -> str:
    protocols = {row.protocol_id: row.protocol for row in rows}
    lines = [
        "<p>A number is the unweighted mean over the categories of a dataset, then over the seeds. A hole stands where "
        "a row behind the number is missing or not ok; n/a where the metric does not exist. The best of each column "
        "is bold and underlined. The threshold of a cell starts where F1 on these test images is best: it helps to "
        "look at mistakes and is no result.</p><dl>",
        *(f"<dt>{METRICS[name].title}</dt><dd>{escape(METRICS[name].definition)}</dd>" for name in used),
        *(
            f"<dt>Protocol {escape(name)}</dt><dd>{escape(describe_protocol(fields))}</dd>"
            for name, fields in protocols.items()
        ),
        *(f"<dt>Left open: {escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in own_values(rows)),
        "</dl>",
    ]
    return "".join(lines)


def _provenance_section(rows: Sequence[ResultRow]) -> str:
    told = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in summarise_provenance(rows).items()
    )
    return f"<dl>{told}</dl>" if told else '<p class="muted">Nothing was run yet.</p>'
