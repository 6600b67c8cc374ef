"""Published numbers against ours: reproduced, not reproduced, or not comparable and why.

A published number is compared with every line of a run that has its method on its dataset, and only where all that is
known of its setting agrees; a field that the source does not tell is named beside the verdict.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from harness.comparison_tables import csv_text, markdown_table
from harness.contracts import ResultRow
from harness.matrices import NO_BACKBONE, show_value
from harness.metrics import METRICS
from harness.published import NUM_CATEGORIES, PublishedNumber, PublishedTable

Verdict = Literal["reproduced", "not reproduced", "not comparable"]
ScopeOf = Callable[[str], "str | None"]
"""Method -> `category` or `dataset`, or None where it is not known."""

_STYLES = {"reproduced": "green", "not reproduced": "red", "not comparable": "dim"}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What became of one published number in one run."""

    number: PublishedNumber
    run: str
    line: str
    """Settings of the rows it was held against."""
    verdict: Verdict
    ours: float | None
    """Mean over seeds (and categories), or the gain; None where there is none."""
    reasons: tuple[str, ...] = ()
    """Why it is not comparable; or by how much it is off."""
    unknown: tuple[str, ...] = ()
    """Fields that the source does not tell."""

    @property
    def difference(self) -> float | None:
        """Ours less the published number."""
        return None if self.ours is None else self.ours - self.number.value


@dataclass(frozen=True)
class _Line:
    """Rows that differ in nothing but category and seed."""

    rows: tuple[ResultRow, ...]

    @property
    def first(self) -> ResultRow:
        return self.rows[0]


def judge_numbers(
    runs: Mapping[str, Sequence[ResultRow]], tables: Iterable[PublishedTable], scope_of: ScopeOf
) -> tuple[list[Judgement], int]:
    """Holds published numbers against the rows of runs.

    Args:
        runs: rows by the name of the run.
        tables: what was published.
        scope_of: whether a method fits one model per category or one for all.

    Returns:
        Judgements, comparable ones first for each number, and the count of numbers whose method was not run on their
        dataset. Of lines that cannot be compared only the nearest is told.
    """
    numbers = [number for table in tables for number in table.numbers]
    judgements: list[Judgement] = []
    absent = 0
    for number in numbers:
        found = [judgement for name, rows in runs.items() for judgement in _judge(number, name, rows, scope_of)]
        absent += not found
        judgements += found
    return judgements, absent


def _judge(number: PublishedNumber, run: str, rows: Sequence[ResultRow], scope_of: ScopeOf) -> list[Judgement]:
    members = [row for row in rows if (row.method, row.dataset) == (number.method, number.dataset)]
    lines = _lines(members)
    candidates = [line for line in lines if line.first.representation == number.representation]
    if not lines:
        return []
    judged = [_judge_line(number, run, line, lines, scope_of) for line in candidates or lines]
    comparable = [judgement for judgement in judged if judgement.verdict != "not comparable"]
    return comparable or [min(judged, key=lambda judgement: len(judgement.reasons))]


def _lines(rows: Sequence[ResultRow]) -> list[_Line]:
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(_setting(row, row.representation), []).append(row)
    return [_Line(tuple(group)) for group in groups.values()]


def _setting(row: ResultRow, representation: str) -> str:
    axes = [row.method, row.backbone, row.layers, representation, row.dataset, row.shots, dict(row.params)]
    return json.dumps([*axes, row.protocol_id], sort_keys=True)


def _judge_line(number: PublishedNumber, run: str, line: _Line, lines: Sequence[_Line], scope_of: ScopeOf) -> Judgement:
    reasons = _find_reasons(number, line, scope_of)
    ours = _mean(line, number)
    if number.against is not None:
        # The baseline is the same line but for its representation.
        wanted = _setting(line.first, number.against)
        base = next((other for other in lines if _setting(other.first, other.first.representation) == wanted), None)
        if base is None:
            reasons.append(f"a gain over {number.against}, which was not run with the same settings")
            ours = None
        else:
            reasons += [f"{number.against}: {reason}" for reason in _find_row_reasons(number, base)]
            theirs = _mean(base, number)
            ours = None if ours is None or theirs is None else ours - theirs
    first = line.first
    text = " · ".join([first.method, first.backbone or NO_BACKBONE, first.representation])
    if reasons or ours is None:
        return Judgement(number=number, run=run, line=text, verdict="not comparable", ours=ours, reasons=tuple(reasons))
    difference = ours - number.value
    is_near = abs(difference) <= number.tolerance + 1e-9
    off = f"{100 * abs(difference):.2f} points {'above' if difference > 0 else 'below'}"
    return Judgement(
        number=number,
        run=run,
        line=text,
        verdict="reproduced" if is_near else "not reproduced",
        ours=ours,
        reasons=() if is_near else (f"{off}, tolerance {100 * number.tolerance:g}",),
        unknown=_find_unknown(number, line),
    )


# --- what keeps a number from being compared ---------------------------------------------------------------------


def _find_reasons(number: PublishedNumber, line: _Line, scope_of: ScopeOf) -> list[str]:
    first = line.first
    reasons = [number.caveat] if number.caveat else []
    if number.backbone is None:
        reasons.append("the source does not tell the backbone")
    elif number.backbone.partition(".")[0] != (first.backbone or "none").partition(".")[0]:
        reasons.append(_tell("backbone", number.backbone, first.backbone or "none"))
    if number.representation != first.representation:
        reasons.append(_tell("representation", number.representation, first.representation))
    if number.shots != first.shots:
        reasons.append(_tell("shots", number.shots or "all", first.shots or "all"))
    for name, value in number.params.items():
        if first.params.get(name) != value:
            reasons.append(_tell(f"params.{name}", value, first.params.get(name)))
    scope = scope_of(number.method)
    if number.scope is not None and scope is not None and number.scope != scope:
        told = {"category": "one model per category", "dataset": "one model for all categories"}
        reasons.append(_tell("scope", told[number.scope], told[scope]))
    resolved = first.resolved_protocol or first.protocol
    for name, value in number.protocol.items():
        ours = resolved.get(name)
        matters = name != "aupro_limit" or number.metric == "aupro"
        if matters and value != (list(ours) if isinstance(ours, tuple) else ours):
            reasons.append(_tell(f"protocol.{name}", value, ours))
    return reasons + _find_row_reasons(number, line)


def _find_row_reasons(number: PublishedNumber, line: _Line) -> list[str]:
    """Holes, stamps and missing categories among our rows."""
    wanted = [row for row in line.rows if number.category in (None, row.category)]
    if not wanted:
        return [f"category {number.category} was not run"]
    reasons = []
    failed = sorted({row.category for row in wanted if row.status != "ok"})
    if failed:
        reasons.append(f"no number for {', '.join(failed)}")
    if any("random weights" in row.stamps for row in wanted):
        reasons.append("our weights are random")
    expected = NUM_CATEGORIES.get(number.dataset)
    categories = {row.category for row in wanted}
    if number.category is None and expected is not None and len(categories) < expected:
        reasons.append(f"{len(categories)} of {expected} categories")
    seeds = {seed: {row.category for row in wanted if row.seed == seed} for seed in {row.seed for row in wanted}}
    if any(members != categories for members in seeds.values()):
        reasons.append("not every seed has every category")
    if not failed and any(number.metric not in row.metrics for row in wanted):
        reasons.append(f"{METRICS[number.metric].title} is not available")
    return reasons


def _mean(line: _Line, number: PublishedNumber) -> float | None:
    wanted = [row for row in line.rows if number.category in (None, row.category)]
    if not wanted or any(number.metric not in row.metrics for row in wanted):
        return None
    per_seed: dict[int, list[float]] = {}
    for row in wanted:
        per_seed.setdefault(row.seed, []).append(row.metrics[number.metric])
    return float(np.mean([np.mean(values) for values in per_seed.values()]))


def _find_unknown(number: PublishedNumber, line: _Line) -> tuple[str, ...]:
    needed = ["image_size", "resize"]
    if any(row.curves for row in line.rows):  # of a method without training there is one state alone
        needed.append("selection")
    if number.metric == "aupro":
        needed.append("aupro_limit")
    return tuple(name for name in needed if name not in number.protocol)


def _tell(field: str, published: Any, ours: Any) -> str:
    return f"{field}: {show_value(published)} published, {show_value(ours)} here"


# --- tables ------------------------------------------------------------------------------------------------------


def _told_together(judgements: Sequence[Judgement]) -> list[list[Judgement]]:
    """Metrics of one published row that cannot be compared for the same reasons share a line."""
    groups: dict[tuple[object, ...], list[Judgement]] = {}
    for place, judgement in enumerate(judgements):
        number = judgement.number
        key: tuple[object, ...] = (place,)
        if judgement.verdict == "not comparable":
            row = (number.method, number.backbone, number.dataset, number.category, number.representation)
            known = (number.against, json.dumps(dict(number.params)), number.source)
            key = (judgement.run, number.table, *row, *known, judgement.line, judgement.reasons)
        groups.setdefault(key, []).append(judgement)
    return list(groups.values())


def _texts(judgements: Sequence[Judgement], between: str = " / ") -> list[str]:
    first = judgements[0]
    number, sign = first.number, "+" if first.number.against is not None else ""
    reasons = list(first.reasons)
    if first.unknown:
        reasons.append(f"not told: {', '.join(first.unknown)}")
    gain = f", gain over {number.against}" if number.against is not None else ""
    names = [METRICS[each.number.metric].title for each in judgements]
    return [
        f"{number.table} ({number.evidence})",
        first.line,
        number.dataset + (f", {number.category}" if number.category is not None else ""),
        (between if between == "\n" else ", ").join(names) + gain,
        between.join(f"{100 * each.number.value:{sign}.2f}" for each in judgements),
        between.join("–" if each.ours is None else f"{100 * each.ours:{sign}.2f}" for each in judgements),
        first.verdict,
        "; ".join(reasons),
    ]


def describe_judgements(judgements: Sequence[Judgement], absent: int) -> str:
    """How many numbers met which fate, in one line."""
    counts = {verdict: sum(each.verdict == verdict for each in judgements) for verdict in _STYLES}
    listed = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    return f"{listed}; {absent} more published numbers have a method or dataset that was not run"


_HEADER = ["published in", "line", "on", "metric", "published", "here", "verdict", "why"]


def terminal_judgements(judgements: Sequence[Judgement], several_runs: bool) -> Iterator[RenderableType]:
    """Verdicts for a terminal, in percent: what can be compared, then what cannot, with numbered reasons below."""
    groups = _told_together(judgements)
    comparable = [group for group in groups if group[0].verdict != "not comparable"]
    others = [group for group in groups if group[0].verdict == "not comparable"]
    names = ["run"] * several_runs + _HEADER
    if comparable:
        table = _table("Published numbers [%]", names)
        for group in comparable:
            texts = [Text(text) for text in [group[0].run] * several_runs + _texts(group)]
            texts[-2].stylize(_STYLES[group[0].verdict])
            table.add_row(*texts)
        yield table
    if others:
        yield Text("Published numbers that cannot be compared [%]", style="bold")
        yield Text()
        numbers: dict[str, int] = {}
        table = _table("", ["run"] * several_runs + ["line", "on", "metric", "published", "here", "why"])
        source = None
        for group in others:
            for reason in group[0].reasons:
                numbers.setdefault(reason, len(numbers) + 1)
            why = ", ".join(str(number) for number in sorted(numbers[reason] for reason in group[0].reasons))
            told_in, *cells = _texts(group, "\n")[:-2]
            if told_in != source:
                source = told_in
                table.add_section()
                table.add_row(*[""] * several_runs, Text(source, style="bold"))
            table.add_row(*[Text(cell) for cell in [group[0].run] * several_runs + cells], Text(why, "yellow"))
        yield table
        for reason, number in numbers.items():
            yield Text.assemble((f"{number:>4} ", "yellow"), reason)
        yield Text()


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(title=Text(title, style="bold") if title else None, title_justify="left", box=SIMPLE_HEAD)
    for name in names:
        table.add_column(Text(name), overflow="fold", justify="right" if name in ("published", "here") else "left")
    return table


def judgements_markdown(judgements: Sequence[Judgement], absent: int, command: str) -> str:
    """Verdicts as a Markdown page."""
    rows = [[group[0].run, *_texts(group)] for group in _told_together(judgements)]
    lines = ["# Published numbers", "", f"    {command}", "", *markdown_table(["run", *_HEADER], rows), ""]
    sources = dict.fromkeys(f"- {judgement.number.table}: {judgement.number.source}" for judgement in judgements)
    lines += ["Sources:", "", *sources, ""] if sources else []
    lines += [f"{describe_judgements(judgements, absent)}.", ""]
    lines += ["Numbers in percent. Reproduced: within the tolerance of the source, all known settings equal.", ""]
    return "\n".join(lines)


def judgements_csv(judgements: Sequence[Judgement]) -> str:
    """Verdicts as CSV; rates in [0, 1]."""
    header = ["run", "table", "evidence", "source", "method", "backbone", "dataset", "category", "representation"]
    header += ["against", "metric", "published", "ours", "difference", "tolerance", "verdict", "reasons", "not_told"]
    rows = []
    for judgement in judgements:
        number = judgement.number
        axes = [number.method, number.backbone, number.dataset, number.category, number.representation, number.against]
        values = [number.metric, number.value, judgement.ours, judgement.difference, number.tolerance]
        ends = [judgement.verdict, "; ".join(judgement.reasons), ", ".join(judgement.unknown)]
        rows.append([judgement.run, number.table, number.evidence, number.source, *axes, *values, *ends])
    return csv_text(header, rows)


def write_judgements(judgements: Sequence[Judgement], absent: int, folder: str | Path, command: str) -> list[Path]:
    """Writes `published.md` and `published.csv` into a folder, made if need be."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    files = [target / "published.md", target / "published.csv"]
    files[0].write_text(judgements_markdown(judgements, absent, command), encoding="utf-8")
    files[1].write_text(judgements_csv(judgements), encoding="utf-8")
    return files


def find_shortfalls(judgements: Sequence[Judgement], margin: float) -> list[str]:
    """Why a gate fails: numbers below the published ones by more than `margin`, or none that can be compared."""
    comparable = [judgement for judgement in judgements if judgement.verdict != "not comparable"]
    if not comparable:
        return ["no published number can be compared"]
    return [
        f"{judgement.number.table}, {METRICS[judgement.number.metric].title} of {judgement.line} on "
        f"{judgement.number.dataset}: {100 * judgement.difference:+.2f} points"
        for judgement in comparable
        if judgement.difference is not None and judgement.difference < -margin - 1e-12
    ]
