"""What `adgrid report` and `adgrid rescore` do, from parsed arguments to what is printed."""

from __future__ import annotations

from argparse import Namespace

from rich.console import Console
from rich.markup import escape

from harness.contracts import AdgridError
from harness.details import remake_details
from harness.options import RunOptions
from harness.report import build_matrices, rows_frame, terminal_table
from harness.rescore import rescore_run
from harness.run_folder import find_run, read_run
from harness.run_report import remake_report
from harness.sheets import remake_sheets
from harness.store import join_root


def remake(parsed: Namespace, console: Console) -> int:
    """Remakes tables and pictures of a run."""
    store, record = find_run(parsed.run, parsed.root)
    with console.status("drawing"):
        notes = remake_sheets(store, record.rows) if parsed.pictures else []
        if parsed.pictures:
            places = RunOptions(data_root=parsed.data_root, cache_dir=parsed.cache_dir).places
            notes += remake_details(store, record.rows, places.cache_dir)
        files = remake_report(store, record, ("pdf", "svg") if parsed.papers else ())
    folder = join_root(store.root, "runs", record.run_id, "report")
    page = join_root(folder, "report.html")
    if parsed.html:
        for note in notes:
            console.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)
        console.print(page, soft_wrap=True)
        return 0
    for matrix in build_matrices(rows_frame(record.rows)):
        console.print(terminal_table(matrix))
    for note in notes:
        console.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)
    console.print(f"{len(files)} files in {folder}; look at {page}", soft_wrap=True)
    return 0


def rescore(parsed: Namespace, console: Console, command: str) -> int:
    """Scores a run again from its stored predictions; returns 1 where a cell got no number."""
    if not parsed.overrides and not parsed.ensemble:
        raise AdgridError("rescore: say what to change: --set protocol.aupro_limit=0.05, or --ensemble backbone")
    store, record = find_run(parsed.run, parsed.root)
    places = RunOptions(data_root=parsed.data_root, cache_dir=parsed.cache_dir).places
    with console.status("scoring"):
        outcome = rescore_run(store, record, parsed.overrides, bool(parsed.ensemble), places.cache_dir, command)
        record = read_run(store, outcome.run_id)
        remake_report(store, record)
    for matrix in build_matrices(rows_frame(record.rows), metrics=("image_auroc", "pixel_auroc", "aupro")):
        console.print(terminal_table(matrix))
    for note in outcome.notes:
        console.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)
    console.print(
        f"{len(record.rows)} cells: {outcome.num_scored} scored now from stored predictions, no model was used"
    )
    console.print(f"run folder  {join_root(store.root, 'runs', outcome.run_id)}", soft_wrap=True)
    return 1 if outcome.notes else 0
