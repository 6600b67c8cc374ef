"""What `adgrid compare` and `adgrid leaderboard` do, from parsed arguments to what is printed."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.compare import compare_rows, find_regressions
from harness.comparison_tables import terminal_comparison, write_comparison
from harness.contracts import AdgridError, ResultRow
from harness.leaderboard import boards_csv, build_boards, newest_rows, terminal_board
from harness.published import load_published, published_names
from harness.registry import scope_of_method
from harness.reproduction import (
    describe_judgements,
    find_shortfalls,
    judge_numbers,
    terminal_judgements,
    write_judgements,
)
from harness.sources import (
    keep_rows,
    load_any_scores,
    name_apart,
    open_any,
    open_experiment,
    open_run,
    parse_conditions,
)


def compare_runs(parsed: Namespace, console: Console, command: str) -> int:
    """Compares runs, an axis of them, or a run with published numbers; returns the exit code of the gate."""
    if not 0 < parsed.confidence < 1:
        raise AdgridError(f"--confidence {parsed.confidence:g}: must lie between 0 and 1, such as 0.95")
    conditions = parse_conditions(parsed.where)
    with console.status("reading"):
        sources = name_apart([open_run(word, parsed.root, parsed.tracking_uri) for word in parsed.runs])
    sides = {name: keep_rows(source.rows, conditions) for name, source in sources.items()}
    if parsed.published:
        return _compare_published(parsed, console, command, sides)
    comparison = compare_rows(
        sides,
        lambda cell_id: load_any_scores(sources.values(), cell_id),
        axis=parsed.axis,
        baseline=parsed.baseline,
        ignore=parsed.ignore,
        metrics=tuple(dict.fromkeys(parsed.metrics or ["image_auroc"])),
        interval=parsed.interval,
        confidence=parsed.confidence,
    )
    for part in terminal_comparison(comparison, console.width):
        console.print(part, soft_wrap=not isinstance(part, Table))
    if parsed.out:
        files = write_comparison(comparison, parsed.out, command)
        console.print(f"{len(files)} files in {escape(parsed.out)}", soft_wrap=True)
    if parsed.fail_if_worse is None:
        return 0
    return _close_gate(console, find_regressions(comparison, parsed.fail_if_worse), parsed.fail_if_worse)


def _compare_published(
    parsed: Namespace, console: Console, command: str, sides: Mapping[str, Sequence[ResultRow]]
) -> int:
    names = [name for word in parsed.published for name in (published_names() if word == "all" else [word])]
    judgements, absent = judge_numbers(sides, [load_published(name) for name in dict.fromkeys(names)], scope_of_method)
    for part in terminal_judgements(judgements, len(sides) > 1):
        console.print(part)
    console.print(describe_judgements(judgements, absent))
    if parsed.out:
        files = write_judgements(judgements, absent, parsed.out, command)
        console.print(f"{len(files)} files in {escape(parsed.out)}", soft_wrap=True)
    if parsed.fail_if_worse is None:
        return 0
    return _close_gate(console, find_shortfalls(judgements, parsed.fail_if_worse), parsed.fail_if_worse)


def _close_gate(console: Console, reasons: Sequence[str], margin: float) -> int:
    for reason in reasons:
        console.print(f"[red]worse:[/] {escape(reason)}", soft_wrap=True)
    if not reasons:
        console.print(f"[green]no mean lost more than {100 * margin:g} points[/]")
    return 1 if reasons else 0


def show_leaderboard(parsed: Namespace, console: Console) -> int:
    """Shows one board per protocol and writes them where asked."""
    conditions = parse_conditions(parsed.where)
    with console.status("reading"):
        words = parsed.places or ([] if parsed.experiment else [parsed.root])
        sources = [open_any(word, parsed.root, parsed.tracking_uri) for word in words]
        if parsed.experiment:
            sources += open_experiment(parsed.tracking_uri, parsed.experiment, parsed.root)
    rows = keep_rows([row for source in sources for row in source.rows], conditions)
    boards = build_boards(newest_rows(rows), parsed.metric)
    for board in boards:
        console.print(terminal_board(board, console.width))
    if parsed.out:
        Path(parsed.out).write_text(boards_csv(boards), encoding="utf-8")
        console.print(f"written to {escape(parsed.out)}", soft_wrap=True)
    return 0
