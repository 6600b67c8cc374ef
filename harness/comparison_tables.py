"""Comparisons as people read them: terminal, CSV, Markdown and pictures in a folder.

Percent and percentage points appear only in what people read; CSV holds rates in [0, 1].
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from harness.compare import Comparison, Delta, Level
from harness.comparison_figures import draw_deltas, draw_ranks
from harness.intervals import IMAGE_METRICS, Estimate
from harness.metrics import METRICS
from harness.ranks import AverageRanks

_MAX_TERMINAL_ROWS = 60
_STYLES = {"better": "green", "worse": "red", "not distinguishable": "dim"}
_LEVELS: tuple[Level, ...] = ("everything", "dataset", "category")


# --- words -------------------------------------------------------------------------------------------------------


def describe_comparison(comparison: Comparison) -> str:
    """What is compared with what, in one line."""
    matches = comparison.matches
    axis = "" if matches.axis == "run" else f"{matches.axis} "
    return f"{axis}{', '.join(matches.candidates)} against {matches.baseline}"


def describe_reasons(comparison: Comparison) -> list[str]:
    """What was not compared and why, equal reasons together; then what else differs between rows compared."""
    counts: dict[tuple[str, str], int] = {}
    for item in comparison.matches.unmatched:
        key = (item.candidate, item.reason)
        counts[key] = counts.get(key, 0) + 1
    several = len(comparison.matches.candidates) > 1
    lines = [
        f"not compared, {number} {'place' if number == 1 else 'places'}"
        + (f" of {candidate}" * several)
        + f": {reason}"
        for (candidate, reason), number in counts.items()
    ]
    lines += [f"note: {note}" for note in comparison.matches.notes]
    for metric in comparison.metrics:
        notes = {delta.note for delta in comparison.deltas if delta.metric == metric}
        title, has_images = METRICS[metric].title, metric in IMAGE_METRICS
        why = "image scores of some cells are not there or too few" if has_images else "it has none over images"
        if "no interval" in notes:
            lines.append(
                f"{title} without interval: {why}, and a single seed, or seeds that change nothing, tell nothing"
            )
        if "seeds alone" in notes:
            lines.append(f"{title}, seeds alone: {why}; the verdict holds for these test images and no others")
    return lines


def describe_ranks(ranks: AverageRanks) -> str:
    """Average ranks in one line."""
    listed = ", ".join(f"{name} {rank:.2f}" for name, rank in zip(ranks.names, ranks.ranks, strict=True))
    test = "Wilcoxon" if len(ranks.names) == 2 else "Friedman"
    return (
        f"average ranks over {ranks.num_tests} categories (1 = best): {listed}; two differ where they are "
        f"{ranks.critical_difference:.2f} apart (Nemenyi); {test} p {_p(ranks.p_value, '= ')}"
    )


def _points(value: float) -> str:
    return f"{round(100 * value, 2) + 0.0:+.2f}"  # no minus before a zero


def _interval(estimate: Estimate, confidence: float) -> str:
    found = estimate.interval(confidence)
    return "–" if found is None else f"{_points(found[0])} … {_points(found[1])}"


def _p(value: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{sign}{value:.3f}"


def _where(delta: Delta) -> str:
    if delta.level == "category":
        return f"{delta.dataset}, {delta.category}"
    total = delta.num_places + delta.num_missing
    number = f"{delta.num_places} of {total}" if delta.num_missing else str(total)
    if delta.level == "everything":
        return f"everything, {number} {'pair' if total == 1 else 'pairs'}"
    return f"{delta.dataset}, {number} {'category' if total == 1 else 'categories'}"


def _columns(comparison: Comparison, metric: str, deltas: Sequence[Delta]) -> tuple[list[str], list[list[str]]]:
    """Header and texts of one table; columns that would say nothing are left out."""
    per_cent = f"{100 * comparison.confidence:g} %"
    everything = [delta for delta in comparison.deltas if delta.metric == metric]
    has_several = len(comparison.matches.candidates) > 1
    has_lines = any(delta.line for delta in deltas)
    has_images = any(delta.over_images.variance is not None for delta in everything)
    has_seeds = any(delta.over_seeds.variance is not None for delta in everything)
    header = [comparison.matches.axis] * has_several + ["equal on both sides"] * has_lines + ["on"]
    header += ["baseline", "candidate", "difference", f"{per_cent} interval"]
    header += ["over images", "over seeds"] * (has_images and has_seeds) + ["p (Holm)", "verdict"]
    rows = []
    for delta in deltas:
        texts = [delta.candidate] * has_several + [delta.line] * has_lines + [_where(delta)]
        texts += [f"{100 * delta.baseline_value:.2f}", f"{100 * delta.candidate_value:.2f}", _points(delta.value)]
        texts += [_interval(delta.total, comparison.confidence)]
        if has_images and has_seeds:
            texts += [_interval(each, comparison.confidence) for each in (delta.over_images, delta.over_seeds)]
        note = f" ({delta.note})" if delta.note else ""
        rows.append([*texts, _p(delta.adjusted_p), f"{delta.verdict}{note}"])
    return header, rows


# --- terminal ----------------------------------------------------------------------------------------------------


def terminal_comparison(comparison: Comparison, width: int) -> Iterator[RenderableType]:
    """Tables and lines for a terminal of `width` letters; no table of more than 60 rows."""
    for metric in comparison.metrics:
        for level in _LEVELS:
            deltas = comparison.select(metric, level)
            if not deltas:
                continue
            if len(deltas) > _MAX_TERMINAL_ROWS:
                yield Text(f"{len(deltas)} rows of level {level} are not shown; --out DIR writes them", style="dim")
                continue
            yield _terminal_table(comparison, metric, deltas, level, width)
        if metric in comparison.ranks:
            yield Text(describe_ranks(comparison.ranks[metric]))
    for line in describe_reasons(comparison):
        yield Text(line, style="yellow")


def _terminal_table(comparison: Comparison, metric: str, deltas: Sequence[Delta], level: Level, width: int) -> Table:
    title = f"{METRICS[metric].title} [%], {describe_comparison(comparison)}"
    table = Table(
        title=Text(title if level == "everything" else f"per {level}", style="bold"),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    header, rows = _columns(comparison, metric, deltas)
    widths = [max(len(texts[number]) for texts in (header, *rows)) for number in range(len(header))]
    if sum(widths) + 3 * len(widths) > width:
        header, rows = _narrow(header, rows)
    first_number = header.index("on") + 1
    for number, name in enumerate(header):
        is_text = number < first_number or name == "verdict"
        # Names are folded, numbers never cut.
        least = 15 if is_text else max(len(texts[number]) for texts in (header, *rows))
        table.add_column(Text(name), overflow="fold", justify="left" if is_text else "right", min_width=least)
    for delta, texts in zip(deltas, rows, strict=True):
        table.add_row(*(Text(text) for text in texts[:-1]), Text(texts[-1], style=_STYLES[delta.verdict]))
    return table


def _narrow(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The same with one column for all names, and with nothing but the difference, its interval and the verdict."""
    last_name = header.index("on")
    kept = [number for number, name in enumerate(header) if name == "difference" or name.endswith("% interval")]
    kept.append(len(header) - 1)
    narrow = [[" · ".join(texts[: last_name + 1]), *(texts[number] for number in kept)] for texts in rows]
    return ["on", *(header[number] for number in kept)], narrow


# --- files -------------------------------------------------------------------------------------------------------


def deltas_csv(comparison: Comparison) -> str:
    """Every difference with its intervals; rates in [0, 1], an empty field where there is no interval."""
    header = ["metric", "level", "candidate", "baseline", "line", "dataset", "category", "categories", "missing"]
    header += ["candidate_seeds", "baseline_seeds", "candidate_value", "baseline_value", "difference"]
    header += [f"{name}_{end}" for name in ("total", "images", "seeds") for end in ("low", "high")]
    header += ["p", "adjusted_p", "verdict", "note"]
    rows = []
    for delta in comparison.deltas:
        ends = [
            end
            for estimate in (delta.total, delta.over_images, delta.over_seeds)
            for end in estimate.interval(comparison.confidence) or (None, None)
        ]
        axes = [delta.metric, delta.level, delta.candidate, delta.baseline, delta.line, delta.dataset, delta.category]
        counts = [delta.num_places, delta.num_missing, *delta.num_seeds]
        values = [delta.candidate_value, delta.baseline_value, delta.value, *ends, delta.total.p_value()]
        rows.append([*axes, *counts, *values, delta.adjusted_p, delta.verdict, delta.note])
    return csv_text(header, rows)


def ranks_csv(comparison: Comparison) -> str:
    """Average ranks of every metric."""
    header = ["metric", "name", "average_rank", "categories", "critical_difference", "p"]
    rows = [
        [metric, name, rank, ranks.num_tests, ranks.critical_difference, ranks.p_value]
        for metric, ranks in comparison.ranks.items()
        for name, rank in zip(ranks.names, ranks.ranks, strict=True)
    ]
    return csv_text(header, rows)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A CSV file; None is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def comparison_markdown(comparison: Comparison, command: str) -> str:
    """Everything as one Markdown page that names the pictures beside it."""
    lines = [f"# {describe_comparison(comparison)}", "", f"    {command}"]
    for metric in comparison.metrics:
        lines += ["", f"## {METRICS[metric].title}", "", f"![differences](differences_{metric}.png)"]
        for level in _LEVELS:
            deltas = comparison.select(metric, level)
            if deltas:
                header, rows = _columns(comparison, metric, deltas)
                lines += ["", *markdown_table(header, rows)]
        if metric in comparison.ranks:
            lines += ["", f"![average ranks](critical_difference_{metric}.png)", ""]
            lines += [describe_ranks(comparison.ranks[metric])]
    reasons = describe_reasons(comparison)
    lines += ["", "## Not compared, and what else differs", "", *(f"- {line}" for line in reasons)] if reasons else []
    lines += [
        "",
        "Numbers in percent, differences in percentage points, intervals and verdicts over test images and seeds; "
        "p-values after Holm among all rows of a table.",
    ]
    return "\n".join(lines) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    escaped = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in (header, *rows)]
    return [
        "| " + " | ".join(escaped[0]) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in escaped[1:]),
    ]


def write_comparison(comparison: Comparison, folder: str | Path, command: str) -> list[Path]:
    """Writes a comparison into a folder, made if need be.

    compare.md                           tables, reasons and pictures
    differences.csv, ranks.csv           everything as numbers
    differences_<metric>.png             differences with their intervals
    critical_difference_<metric>.png     average ranks; where two or more categories have all contestants
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text in (
        ("compare.md", comparison_markdown(comparison, command)),
        ("differences.csv", deltas_csv(comparison)),
        ("ranks.csv", ranks_csv(comparison)),
    ):
        files.append(target / name)
        files[-1].write_text(text, encoding="utf-8")
    for metric in comparison.metrics:
        files.append(target / f"differences_{metric}.png")
        draw_deltas(comparison, metric, files[-1])
        if metric in comparison.ranks:
            files.append(target / f"critical_difference_{metric}.png")
            draw_ranks(comparison.ranks[metric], METRICS[metric].title, files[-1])
    return files
