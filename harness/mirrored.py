"""Reads runs back from MLflow: the rows and image scores that `harness/tracking.py` put on a parent run as files.

Writing and reading MLflow are kept apart because they share nothing but the tags.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
from mlflow.exceptions import MlflowException

from harness.bundle import ROWS_FILE, SCORES_FILE, ImageScores, read_bundle
from harness.contracts import AdgridError, ResultRow
from harness.tracking import PARENT_TAG, RUN_TAG, TRIAL_TAG, TrackingUnavailable, absolute_uri, quieten_mlflow, reported


@dataclass(frozen=True, kw_only=True)
class MirroredRun:
    """A run as MLflow holds it."""

    name: str
    """The id of the run, or for a trial its name."""
    rows: tuple[ResultRow, ...]
    scores: dict[str, ImageScores]
    """By cell id."""


def read_mirrored_run(tracking_uri: str, run: str) -> MirroredRun:
    """The rows of one run.

    Args:
        tracking_uri: of the server or SQLite file.
        run: MLflow's id of a parent run, or of a trial's run for its rows alone; or the id that `adgrid run` printed.

    Raises:
        AdgridError: no such run, one whose rows are not attached, or MLflow cannot be reached.
    """
    uri = _existing(tracking_uri)
    with _told(uri):
        client = _client(uri)
        found = _find_run(client, run)
        if found is None:
            raise AdgridError(
                f"mlflow:{run}: {uri} has no such run; name the id of a parent or child run as MLflow shows it, "
                f"or the run id that `adgrid run` printed"
            )
        parent = client.get_run(found.data.tags[PARENT_TAG]) if PARENT_TAG in found.data.tags else found
        whole = _read(client, parent)
    if parent is found:
        return whole
    trial_id = found.data.tags.get(TRIAL_TAG)
    rows = tuple(row for row in whole.rows if row.trial_id == trial_id)
    return MirroredRun(name=found.info.run_name or run, rows=rows, scores=whole.scores)


def read_mirrored_experiment(tracking_uri: str, experiment: str) -> list[MirroredRun]:
    """Every run of an experiment that has its rows attached, oldest first.

    Raises:
        AdgridError: no such experiment, no such run in it, or MLflow cannot be reached.
    """
    uri = _existing(tracking_uri)
    with _told(uri):
        client = _client(uri)
        known = client.get_experiment_by_name(experiment)
        if known is None:
            names = ", ".join(sorted(each.name for each in client.search_experiments()))
            raise AdgridError(f"--experiment {experiment}: {uri} has no such experiment; it has {names}")
        runs_of_spaces = _search(client, [known.experiment_id], f"tags.`{RUN_TAG}` != ''")
        parents = [run for run in runs_of_spaces if PARENT_TAG not in run.data.tags]
        runs = [_read(client, run) for run in parents if _has_rows(client, run)]
    if not runs:
        raise AdgridError(f"--experiment {experiment}: none of its runs has {ROWS_FILE}; mirror one with `adgrid run`")
    return runs


def find_doubles(tracking_uri: str, experiment: str, run_id: str) -> list[str]:
    """What MLflow has twice of a run, or not at all: a parent, trials, points of a curve, finished cells.

    Args:
        tracking_uri: of the server or SQLite file.
        experiment: its name.
        run_id: as `adgrid run` printed it.

    Returns:
        A sentence for each problem.
    """
    with _told(tracking_uri):
        client = _client(tracking_uri)
        known = client.get_experiment_by_name(experiment)
        found = _search(client, [known.experiment_id], f"tags.`{RUN_TAG}` = {run_id!r}") if known else []
        if len(found) != 1:
            return [f"MLflow has {len(found)} parent runs of {run_id}"]
        (parent,) = found
        children = _search(client, [parent.info.experiment_id], f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'")
        times = Counter(child.data.tags.get(TRIAL_TAG, "") for child in children)
        problems = [f"MLflow has trial {trial_id} {number} times" for trial_id, number in times.items() if number > 1]
        for run in (parent, *children):
            for key in run.data.metrics:
                # Means of the parent and numbers of a cell may be told again as they change; points of a curve not.
                if not key.startswith(("loss/", "running_mean/")):
                    continue
                steps = Counter(point.step for point in client.get_metric_history(run.info.run_id, key))
                twice = [step for step, number in steps.items() if number > 1]
                if twice:
                    problems.append(f"MLflow has steps {twice} of {key} twice in {run.info.run_name}")
        left = [run.info.run_name for run in (parent, *children) if run.info.status != "FINISHED"]
        return problems + [f"{name} is not finished in MLflow" for name in left]


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """A reader has nothing to catch up later, so an unreachable server is an error of the command."""
    try:
        with reported(uri):
            yield
    except TrackingUnavailable as error:
        raise AdgridError(f"MLflow cannot be read, {error}") from error


def _existing(tracking_uri: str) -> str:
    """MLflow would make an empty database where a file is not there; a reader must not."""
    uri = absolute_uri(tracking_uri)
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///(/.+)", uri)
    if found and not Path(found.group(1)).is_file():
        raise AdgridError(f"--tracking-uri {tracking_uri}: there is no file {found.group(1)}")
    return uri


def _client(uri: str) -> MlflowClient:
    quieten_mlflow()
    if not MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.is_set():
        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR.set(False)
    return MlflowClient(uri)


def _find_run(client: MlflowClient, run: str) -> Run | None:
    if re.fullmatch(r"[0-9a-f]{32}", run):
        try:
            return client.get_run(run)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    experiments = [each.experiment_id for each in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`{RUN_TAG}` = {run!r}", max_results=1) if experiments else []
    return found[0] if found else None


def _search(client: MlflowClient, experiments: list[str], condition: str) -> list[Run]:
    runs: list[Run] = []
    token: str | None = None
    while token != "":
        page = client.search_runs(
            experiments,
            condition,
            max_results=1000,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        runs += page
        token = page.token or ""
    return runs


def _has_rows(client: MlflowClient, run: Run) -> bool:
    return {ROWS_FILE, SCORES_FILE} <= {file.path for file in client.list_artifacts(run.info.run_id)}


def _read(client: MlflowClient, run: Run) -> MirroredRun:
    name = run.data.tags.get(RUN_TAG, run.info.run_id)
    if not _has_rows(client, run):
        raise AdgridError(
            f"mlflow:{name}: {ROWS_FILE} is not attached to this run, it has not ended, or an earlier version mirrored "
            f"it; give its `adgrid run` command once more, which computes nothing that is there"
        )
    with tempfile.TemporaryDirectory(prefix="adgrid-mlflow-") as folder:
        for file in (ROWS_FILE, SCORES_FILE):
            client.download_artifacts(run.info.run_id, file, folder)
        rows, scores = read_bundle(folder)
    return MirroredRun(name=name, rows=tuple(rows), scores=scores)
