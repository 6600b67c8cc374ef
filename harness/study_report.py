"""What a run writes and says about its studies: a table of trials, the best configuration, a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from harness.contracts import ResultRow
from harness.metrics import METRICS
from harness.search import Distribution, parse_distribution
from harness.store import Store
from harness.study import Ledger, SampleResult, Study, find_best, read_result, read_study
from harness.study_figures import draw_parallel_coordinates

Record = Mapping[str, Any]
"""A study as `harness.study.describe_study` keeps it."""
MOST_LINES = 10
"""Samples of a study that the terminal shows."""


def write_studies(
    folder: Path, records: Sequence[Record], rows: Mapping[str, ResultRow], command: str
) -> tuple[list[Path], list[str]]:
    """Writes `studies/<name>/{trials.csv, best.yaml, parallel_coordinates.png}` for each study.

    Args:
        folder: of the report.
        records: the studies.
        rows: by cell id; those of the samples.
        command: what remakes the run.

    Returns:
        The files, and a section of the report about them.
    """
    files: list[Path] = []
    lines = ["", "## Studies"] if records else []
    for record in records:
        results, target = read_study(record, rows), folder / "studies" / record["name"]
        objective = METRICS[record["search"]["objective"]].title
        target.mkdir(parents=True, exist_ok=True)
        (target / "trials.csv").write_text(_trials_csv(record, results), encoding="utf-8")
        files.append(target / "trials.csv")
        best = find_best(results)
        if best is None:
            (target / "best.yaml").unlink(missing_ok=True)
        else:
            (target / "best.yaml").write_text(_best_yaml(record, best, results, command), encoding="utf-8")
            files.append(target / "best.yaml")
        picture = study_picture(folder, record)
        draw_parallel_coordinates(_distributions(record), results, objective, _title(record), picture)
        files.append(picture)
        lines += _section(record, results, best, objective)
    return files, lines


def study_picture(folder: Path, record: Record) -> Path:
    """Where the picture of a study lies in the folder of a report."""
    return folder / "studies" / str(record["name"]) / "parallel_coordinates.png"


def study_table(record: Record, results: Sequence[SampleResult]) -> Table:
    """The best samples of a study for the terminal, the best first, and how many others there are."""
    objective = METRICS[record["search"]["objective"]].title
    table = Table(title=f"{_title(record)}, tuned on {', '.join(record['tuned_on'])}", title_justify="left")
    for column in ("trial", *record["distributions"]):
        table.add_column(column, overflow="fold")
    table.add_column(objective, justify="right", no_wrap=True)
    ranked = _ranked(results)
    for place, result in enumerate(ranked[:MOST_LINES]):
        values = [_show(result.params[field]) for field in record["distributions"]]
        shown = result.status if result.score is None else f"{result.score:.1%}"
        table.add_row(
            str(result.number), *values, shown, style="bold" if place == 0 and result.score is not None else ""
        )
    if len(ranked) > MOST_LINES:
        table.caption = f"and {len(ranked) - MOST_LINES} more in trials.csv"
    return table


def list_studies(studies: Sequence[Study], rows: Mapping[str, ResultRow], store: Store) -> Table:
    """What would be searched, and how much of it is done.

    Args:
        studies: of a plan.
        rows: all rows of the store, by cell id.
        store: knows what searchers have proposed.
    """
    table = Table(title=_count_studies(studies), title_justify="left", show_header=False)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for study in studies:
        search = study.search
        results = [read_result(sample, search.objective, rows) for sample in Ledger(study, store).samples()]
        done = sum(result.status in ("finished", "stopped") for result in results)
        scheduler = f", ended early by {search.scheduler.name}" if search.scheduler.name != "none" else ""
        lines = [f"{field} {distribution}" for field, distribution in study.distributions.items()]
        lines.append(f"{_num_trials(study)} trials by {search.searcher} search{scheduler}; {done} done")
        lines.append(f"tuned on {_list_cells(study.tuned_on)} by {search.objective}")
        lines.append(f"reported on {_list_cells(study.reported)}")
        table.add_row(study.name, "\n".join(lines), end_section=True)
    return table


def _num_trials(study: Study) -> int:
    return len(study.samples) or study.search.num_samples


def _count_studies(studies: Sequence[Study]) -> str:
    trials = sum(_num_trials(study) for study in studies)
    cells = sum(_num_trials(study) * len(study.categories) for study in studies)
    reported = sum(study.num_reported for study in studies)
    word = "study" if len(studies) == 1 else "studies"
    return f"{len(studies)} {word}: {trials} trials, {cells} tuning cells, {reported} reported cells"


def _list_cells(cells: Sequence[str], most: int = 4) -> str:
    return ", ".join(cells[:most]) + (f" and {len(cells) - most} more" if len(cells) > most else "")


def _ranked(results: Sequence[SampleResult]) -> list[SampleResult]:
    return sorted(results, key=lambda result: (result.score is None, -(result.score or 0.0), result.number))


def _title(record: Record) -> str:
    parts = [record["method"], record["backbone"], record["tuned_on"][0].rpartition("/")[0]]
    parts += [record["representation"]] * (record["representation"] != "plain")
    parts += [f"{record['shots']} shots"] * (record["shots"] is not None)
    return " · ".join(part for part in parts if part)


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _distributions(record: Record) -> dict[str, Distribution]:
    return {field: parse_distribution(item) for field, item in record["distributions"].items()}


def _trials_csv(record: Record, results: Sequence[SampleResult]) -> str:
    objective, fields = record["search"]["objective"], list(record["distributions"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "status", *fields, objective, *record["tuned_on"], "reason"])
    for result in results:
        values = [
            row.metrics.get(objective, "") if (row := result.rows.get(category)) is not None else ""
            for category in result.cell_ids
        ]
        reason = next((row.reason for row in result.rows.values() if row.status != "ok"), "")
        score = "" if result.score is None else result.score
        writer.writerow(
            [result.number, result.status, *(result.params[field] for field in fields), score, *values, reason]
        )
    return text.getvalue()


def _best_yaml(record: Record, best: SampleResult, results: Sequence[SampleResult], command: str) -> str:
    """A `methods` entry to be copied into a search space."""
    entry = {"methods": [{"name": record["method"], "params": {**record["fixed"], **best.params}}]}
    finished = sum(result.score is not None for result in results)
    return (
        f"# {command}\n"
        f"# Best of {finished} finished configurations: {record['search']['objective']} {best.score:.4f} as mean over\n"
        f"# {', '.join(record['tuned_on'])}\n{yaml.safe_dump(entry, sort_keys=False)}"
    )


def _section(record: Record, results: Sequence[SampleResult], best: SampleResult | None, objective: str) -> list[str]:
    stem, search = f"studies/{record['name']}", record["search"]
    scheduler = search["scheduler"]["name"]
    how = f"{len(results)} configurations by {search['searcher']} search"
    how += f", ended early by {scheduler}" if scheduler != "none" else ""
    lines = [
        "",
        f"### {_title(record)}",
        "",
        f"{how}; tuned on {', '.join(record['tuned_on'])} by {objective}, reported on {', '.join(record['reported'])}.",
        "",
        f"![{record['name']}]({stem}/parallel_coordinates.png)",
        "",
        f"| trial | {' | '.join(record['distributions'])} | {objective} [%] |",
        f"|--:|{'---|' * len(record['distributions'])}--:|",
    ]
    for result in _ranked(results)[:MOST_LINES]:
        values = " | ".join(_show(result.params[field]) for field in record["distributions"])
        mark = "**" if result is best else ""
        score = result.status if result.score is None else f"{100 * result.score:.1f}"
        lines.append(f"| {mark}{result.number}{mark} | {values} | {mark}{score}{mark} |")
    links = [f"[all trials]({stem}/trials.csv)"] + [f"[best configuration]({stem}/best.yaml)"] * (best is not None)
    return [*lines, "", " · ".join(links)]
