"""A matrix as a page of its own, for browsers and the artifact view of MLflow; coloured like the pictures."""

from __future__ import annotations

from html import escape

from harness.matrices import Matrix, MatrixCell, Rank
from harness.tables import cell_colour, cell_marks, describe_matrix, format_percent, is_dark

_STYLE = """
:root { color-scheme: light dark }
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem }
h1 { font-size: 1.15rem; margin: 0 0 .75rem }
table { border-collapse: collapse }
th { text-align: left; padding: .35rem .7rem; font-weight: 600 }
td, thead th:not([scope=row]) { text-align: right; padding: .35rem .7rem; font-variant-numeric: tabular-nums }
tbody th { font-weight: 400; white-space: nowrap }
td { border: 1px solid Canvas; white-space: nowrap }
td.best { font-weight: 700 }
td.second { text-decoration: underline }
td.hole { color: #b3261e }
td.unavailable { opacity: .6 }
p { margin: .3rem 0; opacity: .75; max-width: 60rem }
"""


def matrix_html(matrix: Matrix) -> str:
    """The matrix as an HTML page in percent; best of each column bold, second underlined, its sentences below."""
    title = escape(f"{matrix.title} [%], {matrix.subject}")
    header = "".join(f'<th scope="row">{escape(name)}</th>' for name in matrix.header)
    header += "".join(f'<th scope="col">{escape(name)}</th>' for name in matrix.columns)
    bounds = matrix.colour_range()
    lines = []
    for row, ranks in zip(matrix.rows, matrix.ranks(), strict=True):
        labels = "".join(f'<th scope="row">{escape(label)}</th>' for label in row.labels)
        cells = (_cell(matrix, cell, rank, bounds) for cell, rank in zip(row.cells, ranks, strict=True))
        lines.append(f"<tr>{labels}{''.join(cells)}</tr>")
    notes = "\n".join(f"<p>{escape(line)}</p>" for line in describe_matrix(matrix))
    body = f"<table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    page = f"<h1>{title}</h1>\n{body}\n{notes}"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{page}\n</body></html>\n'


def _cell(matrix: Matrix, cell: MatrixCell, rank: Rank, bounds: tuple[float, float]) -> str:
    text = escape(format_percent(cell) + cell_marks(matrix, cell))
    if cell.value is None:
        return f'<td class="{cell.state}" title="{escape(cell.reason)}">{text}</td>'
    colour = cell_colour(cell.value, bounds)
    front = "#fff" if is_dark(colour) else "#000"
    return f'<td class="{rank}" style="background:#{bytes(colour).hex()};color:{front}">{text}</td>'
