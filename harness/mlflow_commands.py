"""What `adgrid mlflow` does: a run on disk goes to MLflow, after an outage or to a second server."""

from __future__ import annotations

from argparse import Namespace

from rich.console import Console
from rich.markup import escape

from harness.contracts import AdgridError
from harness.run_folder import find_run
from harness.run_report import remake_report
from harness.tracker import default_tracking_uri, mirror_record
from harness.tracking import Mirror, TrackingUnavailable


def sync_runs(parsed: Namespace, console: Console) -> int:
    """Mirrors runs as their folders tell them; writes nothing that is there already.

    Raises:
        AdgridError: no such run, no URI, or MLflow cannot be reached.
    """
    for word in parsed.runs:
        store, record = find_run(word, parsed.root)
        uri = default_tracking_uri(parsed.tracking_uri, store)
        if uri is None:
            raise AdgridError(f"mlflow sync: {store.root} is no local folder; name the server with --tracking-uri")
        with console.status(f"mirroring {escape(record.run_id)}"):
            try:
                mirror = Mirror(uri, parsed.experiment)
                mirror_record(mirror, record, remake_report(store, record))
            except TrackingUnavailable as error:
                raise AdgridError(f"MLflow: {error}; nothing is lost, give the command once more") from error
        done = sum(row.status == "ok" for row in record.rows)
        state = f"{done} of {record.num_expected} cells with a number"
        where = f"experiment {parsed.experiment} of {mirror.tracking_uri}"
        console.print(f"{escape(record.run_id)}: {state}, up to date in {escape(where)}", soft_wrap=True)
    return 0
