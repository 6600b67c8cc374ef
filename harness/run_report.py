"""The report of a run: from its folder and the rows in the store to files, and whether they are still up to date."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.bundle import SCORES_FILE, scores_from_parquet, write_bundle
from harness.details import load_details
from harness.html_report import render_page
from harness.identity import canonical_json
from harness.report import Tabulated, write_report
from harness.run_folder import RunRecord
from harness.sheets import sheet_key
from harness.store import Store
from harness.study import read_study
from harness.study_report import study_picture, write_studies


def remake_report(store: Store, record: RunRecord, also_figures: Sequence[str] = ()) -> list[Path]:
    """Writes tables and pictures of a run into its folder and returns them as local files."""
    run_id, rows, tabulated = record.run_id, record.rows, Tabulated(record.rows)
    # As seen from the report's folder, whether on a file system or under a URI.
    drawn = {f"sheets/{name}" for name in store.names("sheets")}
    keys = {row.cell_id: sheet_key(row.cell_id) for row in rows}
    sheets = {cell_id: f"../../../{key}" for cell_id, key in keys.items() if key in drawn}
    folder = store.local_path(f"runs/{run_id}/report")
    temporary = folder or Path(tempfile.mkdtemp(prefix="adgrid-report-"))
    samples = {row.cell_id: row for row in record.sample_rows}
    study_files, sections = write_studies(temporary, record.studies, samples, record.command)
    files = write_report(
        temporary,
        tabulated,
        title=record.name,
        command=record.command,
        expected_cells=record.num_expected,
        contact_sheets=sheets,
        further_sections=sections,
        also_figures=also_figures,
    )
    files += study_files
    files += write_bundle(store, record.run_id, rows, temporary)
    files.append(write_page(store, record, temporary, tabulated))
    names = [file.relative_to(temporary).as_posix() for file in files]
    for name, file in zip(names, files, strict=True) if folder is None else ():
        store.publish(f"runs/{run_id}/report/{name}", file.read_bytes())
    store.publish(_made_key(run_id), canonical_json({"digest": record.digest, "files": names}).encode())
    return files


def is_made(store: Store, record: RunRecord) -> bool:
    """Whether the report in a run's folder was made of this record, and all its files are there."""
    try:
        made = json.loads(store.read(_made_key(record.run_id)))
    except FileNotFoundError:
        return False
    return made["digest"] == record.digest and all(
        store.exists(f"runs/{record.run_id}/report/{name}") for name in made["files"]
    )


def _made_key(run_id: str) -> str:
    return f"runs/{run_id}/report.json"


def write_page(store: Store, record: RunRecord, folder: Path, results: Tabulated) -> Path:
    """Writes `report.html` beside the other files of a report of these results, and returns it."""
    samples = {row.cell_id: row for row in record.sample_rows}
    page = render_page(
        results,
        scores_from_parquet((folder / SCORES_FILE).read_bytes()),
        lambda cell_id: load_details(store, cell_id),
        title=record.name,
        command=record.command,
        expected_cells=record.num_expected,
        studies=[(study, read_study(study, samples), study_picture(folder, study)) for study in record.studies],
    )
    target = folder / "report.html"
    target.write_text(page, encoding="utf-8")
    return target
