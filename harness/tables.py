"""Matrices of results and their text forms: CSV, JSON, Markdown, LaTeX and the terminal.

A matrix is built in `harness/matrices.py` and drawn in `harness/figures.py`; here it is only written down. Rates are in
[0, 1] in the matrix, in CSV and in JSON; percent with one decimal appears only in what people read.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.style import Style
from rich.table import Table
from rich.text import Text

from harness.contracts import ResultRow
from harness.matrices import NO_BACKBONE, Matrix, MatrixCell, Rank

NOT_AVAILABLE = "n/a"
"""Printed where a metric does not exist, such as a pixel metric of a dataset without masks."""

_VIRIDIS = bytes.fromhex(
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c"
    "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725"
)
"""The map of S. van der Walt and N. Smith (public domain) at 17 equal steps, three bytes each."""


def format_percent(cell: MatrixCell) -> str:
    """The number of a cell in percent with one decimal and its spread over seeds, without footnote marks."""
    if cell.value is None:
        return NOT_AVAILABLE if cell.state == "unavailable" else f"— ({cell.note})"
    spread = "" if cell.std is None else f" ± {100 * cell.std:.1f}"
    return f"{100 * cell.value:.1f}{spread}"


def cell_colour(value: float, bounds: tuple[float, float]) -> tuple[int, int, int]:
    """Colour of a rate on the perceptually uniform viridis scale between `bounds`, as (red, green, blue) of 0-255."""
    low, high = bounds
    place = min(max((value - low) / (high - low), 0.0), 1.0) * (len(_VIRIDIS) // 3 - 1)
    left = min(int(place), len(_VIRIDIS) // 3 - 2)
    mix = place - left
    first, second = _VIRIDIS[3 * left : 3 * left + 3], _VIRIDIS[3 * left + 3 : 3 * left + 6]
    red, green, blue = (round(a + (b - a) * mix) for a, b in zip(first, second, strict=True))
    return red, green, blue


def scale_stops() -> list[list[int]]:
    """The (red, green, blue) colours between which `cell_colour` draws straight lines, the lowest rate first."""
    return [list(_VIRIDIS[place : place + 3]) for place in range(0, len(_VIRIDIS), 3)]


def is_dark(colour: tuple[int, int, int]) -> bool:
    """Whether white text is easier to read on this colour than black, by the relative luminance of WCAG 2.1."""
    parts = [part / 255 for part in colour]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179


def describe_matrix(matrix: Matrix) -> list[str]:
    """The sentences that belong under a matrix: protocol, shared settings, footnotes, completeness."""
    lines = [f"Protocol {matrix.protocol_id}: {matrix.protocol}."]
    if matrix.common:
        lines.append(f"All rows: {', '.join(matrix.common)}.")
    if matrix.shared_stamps:
        lines.append(f"All numbers: {', '.join(matrix.shared_stamps)}.")
    lines += [f"{mark} {stamp}." for stamp, mark in matrix.marks.items()]
    if any(cell.std is not None for row in matrix.rows for cell in row.cells):
        lines.append("± is the sample standard deviation over seeds.")
    if matrix.cells_done < matrix.cells_expected:
        lines.append(f"{matrix.cells_done} of {matrix.cells_expected} cells are done; a hole is never averaged over.")
    return lines


# --- for programs ----------------------------------------------------------------------------------------------


def matrix_table(matrix: Matrix) -> tuple[list[str], list[list[Any]]]:
    """Column names and rows of plain values.

    Rates are in [0, 1], a hole is None and a metric that does not exist is `n/a`. A column `<name>_std` follows where
    there are several seeds, and `<name>_note` where there are holes.
    """
    groups = []
    for number, name in enumerate(matrix.columns):
        cells = [row.cells[number] for row in matrix.rows]
        columns: list[tuple[str, list[Any]]] = [
            (name, [NOT_AVAILABLE if cell.state == "unavailable" else cell.value for cell in cells])
        ]
        if any(cell.std is not None for cell in cells):
            columns.append((f"{name}_std", [cell.std for cell in cells]))
        if any(cell.note for cell in cells):
            columns.append((f"{name}_note", [cell.note or None for cell in cells]))
        groups += columns
    header = [*matrix.header, *(name for name, _ in groups)]
    rows = [[*row.labels, *(values[number] for _, values in groups)] for number, row in enumerate(matrix.rows)]
    return header, rows


def matrix_csv(matrix: Matrix) -> str:
    """The matrix as CSV with rates in [0, 1]; a hole is an empty field."""
    header, rows = matrix_table(matrix)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def matrix_json(matrix: Matrix) -> str:
    """The matrix as a JSON table in pandas' `split` orientation, the form that `mlflow.load_table` reads."""
    header, rows = matrix_table(matrix)
    return json.dumps({"columns": header, "data": rows}, ensure_ascii=False)


# --- for people ------------------------------------------------------------------------------------------------


def matrix_markdown(matrix: Matrix) -> str:
    """The matrix as a Markdown table in percent, best of each column bold, with its sentences below."""
    ranks = matrix.ranks()
    lines = [
        _markdown_line([*matrix.header, *matrix.columns]),
        _markdown_line(["---"] * len(matrix.header) + ["---:"] * len(matrix.columns)),
    ]
    for row, row_ranks in zip(matrix.rows, ranks, strict=True):
        texts = []
        for cell, rank in zip(row.cells, row_ranks, strict=True):
            text = format_percent(cell)
            texts.append((f"**{text}**" if rank == "best" else text) + cell_marks(matrix, cell))
        lines.append(_markdown_line([*row.labels, *texts]))
    notes = [f"- {_markdown_escape(line)}" for line in describe_matrix(matrix)]
    lead = f"**{matrix.title}** in percent, {_markdown_escape(matrix.subject)}; best of each column in bold."
    return "\n".join([lead, "", *lines, "", *notes]) + "\n"


def _markdown_line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(text if text.startswith("---") else _markdown_escape(text) for text in texts) + " |"


def _markdown_escape(text: str) -> str:
    # Underscores inside words are plain text in CommonMark; only what would break a table or make markup is escaped.
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def cell_marks(matrix: Matrix, cell: MatrixCell) -> str:
    """Footnote marks of a number."""
    return "".join(mark for stamp, mark in matrix.marks.items() if stamp in cell.stamps and cell.state == "value")


def matrix_latex(matrix: Matrix) -> str:
    """The matrix as a LaTeX table (package booktabs) in percent, best of each column bold, second underlined."""
    ranks = matrix.ranks()
    caption = f"{matrix.title} in %, {matrix.subject}; best of each column in bold, second underlined."
    name = "-".join(filter(None, [matrix.metric, matrix.dataset, matrix.protocol_id]))
    label = "tab:" + re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    body = [_latex_line([*map(_latex_escape, matrix.header), *map(_latex_escape, matrix.columns)])]
    body.append("    \\midrule")
    for row, row_ranks in zip(matrix.rows, ranks, strict=True):
        texts = []
        for cell, rank in zip(row.cells, row_ranks, strict=True):
            text = _latex_escape(format_percent(cell))
            wrapped = {"best": f"\\textbf{{{text}}}", "second": f"\\underline{{{text}}}", "": text}[rank]
            marks = _latex_escape(cell_marks(matrix, cell))
            texts.append(wrapped + (f"\\textsuperscript{{{marks}}}" if marks else ""))
        body.append(_latex_line([*map(_latex_escape, row.labels), *texts]))
    lines = [
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{{_latex_escape(' '.join([caption, *describe_matrix(matrix)]))}}}",
        f"  \\label{{{label}}}",
        f"  \\begin{{tabular}}{{{'l' * len(matrix.header)}{'r' * len(matrix.columns)}}}",
        "    \\toprule",
        *body,
        "    \\bottomrule",
        "  \\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_line(texts: Sequence[str]) -> str:
    return "    " + " & ".join(texts) + " \\\\"


_LATEX = {
    "\\": "\\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "—": "---",
    "–": "--",
    "±": "$\\pm$",
    "×": "$\\times$",
    "σ": "$\\sigma$",
    "†": "\\textdagger{}",
    "‡": "\\textdaggerdbl{}",
    "§": "\\S{}",
    "¶": "\\P{}",
    "\n": " ",
}


def _latex_escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def terminal_table(matrix: Matrix) -> Table:
    """The matrix as a coloured table for a terminal, in percent; best of each column bold and underlined."""
    table = Table(
        title=Text(f"{matrix.title} [%], {matrix.subject}", style="bold"),
        title_justify="left",
        caption=Text("\n".join(describe_matrix(matrix)), style="dim"),
        caption_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    # In a narrow terminal names are folded, numbers never cut.
    for name in matrix.header:
        table.add_column(Text(name), overflow="fold")
    widest = max((len(_terminal_text(matrix, cell)) for row in matrix.rows for cell in row.cells), default=0)
    for name in matrix.columns:
        table.add_column(Text(name), justify="right", overflow="fold", min_width=widest)
    bounds = matrix.colour_range()
    last = ""
    for row, row_ranks in zip(matrix.rows, matrix.ranks(), strict=True):
        if last not in ("", row.labels[0]):
            table.add_section()
        last = row.labels[0]
        texts = [_terminal_cell(matrix, cell, rank, bounds) for cell, rank in zip(row.cells, row_ranks, strict=True)]
        table.add_row(*(Text(label) for label in row.labels), *texts)
    return table


def _terminal_text(matrix: Matrix, cell: MatrixCell) -> str:
    text = f"{format_percent(cell)}{cell_marks(matrix, cell)}"
    return text if cell.value is None else f" {text} "


def _terminal_cell(matrix: Matrix, cell: MatrixCell, rank: Rank, bounds: tuple[float, float]) -> Text:
    text = _terminal_text(matrix, cell)
    if cell.value is None:
        return Text(text, style="red" if cell.state == "hole" else "dim")
    colour = cell_colour(cell.value, bounds)
    front = "rgb(255,255,255)" if is_dark(colour) else "rgb(0,0,0)"
    style = Style.parse(f"{front} on rgb({colour[0]},{colour[1]},{colour[2]})")
    return Text(text, style=style + Style(bold=rank == "best", underline=rank == "best"))


@dataclass(frozen=True, kw_only=True)
class FailureGroup:
    """Rows without a number that ended alike, for the same reason."""

    what: str
    """Method, backbone and dataset."""
    status: str
    reason: str
    traceback: str
    """Of the first row; empty where there is none."""
    categories: tuple[str, ...]
    num_cells: int


def group_failures(rows: Iterable[ResultRow]) -> list[FailureGroup]:
    """Rows that are not ok, those with equal status and reason of one method, backbone and dataset together."""
    groups: dict[tuple[str, str, str], list[ResultRow]] = {}
    for row in rows:
        if row.status != "ok":
            what = " · ".join((row.method, row.backbone or NO_BACKBONE, row.dataset))
            groups.setdefault((what, row.status, row.reason), []).append(row)
    return [
        FailureGroup(
            what=what,
            status=status,
            reason=reason or "no reason given",
            traceback=members[0].traceback,
            categories=tuple(dict.fromkeys(row.category for row in members)),
            num_cells=len(members),
        )
        for (what, status, reason), members in groups.items()
    ]


def failures_table(rows: Iterable[ResultRow]) -> Table:
    """The rows without a number and their reasons, as a table for a terminal."""
    groups = group_failures(rows)
    total = sum(group.num_cells for group in groups)
    table = Table(
        title=Text(f"Without a number: {total} {'cell' if total == 1 else 'cells'}", style="bold"),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("what", "categories", "cells", "status", "reason"):
        table.add_column(name, overflow="fold", justify="right" if name == "cells" else "left")
    styles = {"failed": "red", "skipped": "yellow", "stopped": "cyan"}
    for group in groups:
        table.add_row(
            Text(group.what),
            Text(", ".join(group.categories)),
            str(group.num_cells),
            Text(group.status, style=styles.get(group.status, "")),
            Text(group.reason),
        )
    return table
