"""The best of many runs: the newest finished row of every cell, ranked by a metric, protocols apart.

A cell is here what a person means by it, a method with its settings on a category with a seed, not the exact bytes
behind it: a run with newer code or newer data takes the place of an older one.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from harness.contracts import AdgridError, ResultRow
from harness.matrices import Matrix, MatrixCell, MatrixRow
from harness.metrics import METRICS
from harness.registry import suggest
from harness.report import build_matrices, rows_frame
from harness.tables import cell_marks, describe_matrix, format_percent


@dataclass(frozen=True, kw_only=True)
class Board:
    """The lines of one protocol, best first."""

    matrix: Matrix
    lines: tuple[MatrixRow, ...]
    means: tuple[MatrixCell, ...]
    """Of each line over all columns; a hole where one of them has no number."""


def newest_rows(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """The newest finished row of every cell, in order of first appearance; rows with random weights are cells apart."""
    newest: dict[str, ResultRow] = {}
    for row in rows:
        if row.status != "ok":
            continue
        key = _cell_key(row)
        known = newest.get(key)
        if known is None or row.provenance.get("finished_at", "") > known.provenance.get("finished_at", ""):
            newest[key] = row
    return list(newest.values())


def _cell_key(row: ResultRow) -> str:
    axes = [row.method, row.backbone, row.layers, row.representation, row.dataset, row.category, row.shots, row.seed]
    return json.dumps([*axes, dict(row.params), row.protocol_id, "random weights" in row.stamps], sort_keys=True)


def build_boards(rows: Sequence[ResultRow], metric: str) -> list[Board]:
    """One board per protocol.

    Lines with a number in every column come first, by their mean; the others follow, by how many numbers they have and
    then by the mean of those, which is not shown.

    Args:
        rows: as `newest_rows` gives them.
        metric: name in `METRICS`.

    Raises:
        AdgridError: an unknown metric, or no row that has it.
    """
    if metric not in METRICS:
        raise AdgridError(f"--metric {metric}: unknown metric{suggest(metric, METRICS)}")
    with_metric = [row for row in rows if metric in row.metrics]
    if not with_metric:
        known = dict.fromkeys(name for row in rows for name in row.metrics)
        raise AdgridError(f"--metric {metric}: no finished row has it; they have {', '.join(known) or 'no numbers'}")
    boards = []
    for matrix in build_matrices(rows_frame(_tell_random(with_metric)), [metric]):
        if len(matrix.columns) == 1:
            # Of a single dataset its categories say more.
            matrix = _with_categories(with_metric, metric, matrix)
        means = {id(row): _mean_cell(matrix, row) for row in matrix.rows}
        lines = sorted(matrix.rows, key=lambda row: _order(row, means[id(row)]))
        boards.append(Board(matrix=matrix, lines=tuple(lines), means=tuple(means[id(row)] for row in lines)))
    return boards


def _with_categories(rows: Sequence[ResultRow], metric: str, matrix: Matrix) -> Matrix:
    members = [row for row in rows if row.protocol_id == matrix.protocol_id]
    (detailed,) = build_matrices(rows_frame(_tell_random(members)), [metric], dataset=matrix.columns[0])
    return detailed


def _tell_random(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Random weights become part of the backbone's name: they are no rival of trained ones."""
    return [
        dataclasses.replace(row, backbone=f"{row.backbone} (random)") if "random weights" in row.stamps else row
        for row in rows
    ]


def _mean_cell(matrix: Matrix, row: MatrixRow) -> MatrixCell:
    if matrix.dataset is not None or len(row.cells) == 1:
        return row.cells[-1]
    values = [cell.value for cell in row.cells if cell.value is not None]
    if len(values) < len(row.cells):
        return MatrixCell(state="hole", note=f"{len(values)} of {len(row.cells)}")
    return MatrixCell(state="value", value=sum(values) / len(values))


def _order(row: MatrixRow, mean: MatrixCell) -> tuple[float, float]:
    values = [cell.value for cell in row.cells if cell.value is not None]
    own = sum(values) / len(values) if values else 0.0
    return -len(values), -(own if mean.value is None else mean.value)


def _header(board: Board) -> list[str]:
    columns = list(board.matrix.columns)
    has_own_mean = board.matrix.dataset is not None or len(columns) == 1
    return ["", *board.matrix.header, *columns, *([] if has_own_mean else ["mean"])]


def _cells(board: Board, place: int) -> list[MatrixCell]:
    cells = list(board.lines[place].cells)
    return cells if board.matrix.dataset is not None or len(cells) == 1 else [*cells, board.means[place]]


def terminal_board(board: Board, width: int) -> Table:
    """A board for a terminal of `width` letters, in percent; where it is narrow the spread over seeds is left out."""
    matrix = board.matrix
    subject = "" if matrix.dataset is None else f", {matrix.dataset}"
    table = Table(
        title=Text(f"{matrix.title} [%]{subject}", style="bold"),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    header = _header(board)
    num_labels = 1 + len(matrix.header)
    labels = [[str(place + 1), *line.labels] for place, line in enumerate(board.lines)]
    numbers = [[_text(matrix, cell) for cell in _cells(board, place)] for place in range(len(labels))]
    is_narrow = sum(_widths([header, *map(list.__add__, labels, numbers)])) + 3 * len(header) > width
    if is_narrow:
        numbers = [[re.sub(r" ± [\d.]+", "", text) for text in line] for line in numbers]
    # Names are folded, numbers never cut.
    widest = _widths(list(map(list.__add__, labels, numbers)))
    least = [min(most, 12) if 0 < number < num_labels else most for number, most in enumerate(widest)]
    shared = _share(width - 3 * len(header), least, _widths([header, *map(list.__add__, labels, numbers)]))
    for number, (name, letters) in enumerate(zip(header, shared, strict=True)):
        side: Literal["left", "right"] = "left" if 0 < number < num_labels else "right"
        table.add_column(Text(name), justify=side, overflow="fold", width=letters)
    for place, texts in enumerate(numbers):
        cells = _cells(board, place)
        shown = [
            Text(text, style="" if cell.value is not None else "dim") for text, cell in zip(texts, cells, strict=True)
        ]
        shown[-1].stylize("bold")
        table.add_row(*(Text(label) for label in labels[place]), *shown)
    notes = [line for line in describe_matrix(matrix) if not (is_narrow and line.startswith("±"))]
    table.caption = Text("\n".join(notes), style="dim")
    return table


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(text) for text in column) for column in zip(*lines, strict=True)]


def _share(width: int, least: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Widths of columns: what each needs at least, and from left to right what they want while there is room."""
    spare, shared = width - sum(least), []
    for need, want in zip(least, wanted, strict=True):
        more = min(max(spare, 0), want - need)
        spare -= more
        shared.append(need + more)
    return shared


def _text(matrix: Matrix, cell: MatrixCell) -> str:
    return format_percent(cell) + cell_marks(matrix, cell)


def boards_csv(boards: Sequence[Board]) -> str:
    """All boards, one line per place and column; rates in [0, 1], an empty field where there is no number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "protocol_id", "place", "line", "on", "value", "std", "stamps"])
    for board in boards:
        matrix = board.matrix
        names = _header(board)[1 + len(matrix.header) :]
        for place, line in enumerate(board.lines):
            label = " · ".join(filter(None, line.labels))
            for name, cell in zip(names, _cells(board, place), strict=True):
                where = name if matrix.dataset is None else f"{matrix.dataset}, {name}"
                axes = [matrix.metric, matrix.protocol_id, place + 1, label, where]
                writer.writerow([*axes, cell.value, cell.std, "; ".join(cell.stamps)])
    return text.getvalue()
