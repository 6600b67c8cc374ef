"""The mirror of a run in MLflow: one parent run per search space, one child run per trial.

The one home of MLflow. Rows on disk are the truth; this copy can be made at any time, from nothing or from half, and
made again without doubling anything, because every value is compared with what MLflow holds before it is written.
One process writes, the driver of a run.

    parent   tag `adgrid.run_id`    means per (dataset, method, backbone, representation, whatever else varies), counts,
                                    the report's files, what the machine did meanwhile
    child    tag `adgrid.trial_id`  axes and parameters, `<metric>/<category>`, means, costs, status, the images read,
                                    and curves: losses per epoch, running means per category

`harness/mirror_values.py` says what rows become, docs/mlflow.md how it is found again.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import re
import shlex
import sys
import textwrap
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.environment_variables import (
    MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_HTTP_REQUEST_TIMEOUT,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
)
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from sqlalchemy.exc import SADeprecationWarning, SQLAlchemyError

from harness.contracts import AdgridError, ResultRow, Trial
from harness.matrices import show_value
from harness.mirror_values import (
    Input,
    Point,
    child_curves,
    child_name,
    child_numbers,
    child_params,
    child_tags,
    curve_name,
    curves_over_categories,
    describe_input,
    describe_searched,
    input_profile,
    metric_key,
    run_means,
    summarise,
)
from harness.notes import Loss

PARENT_TAG, RUN_TAG, TRIAL_TAG = "mlflow.parentRunId", "adgrid.run_id", "adgrid.trial_id"
STUDY_TAG = "adgrid.study"
"""On a child that is a sample of a study: the id of that study. Its cells are not among those the parent is about."""
CELLS_TAG = "adgrid.cells"
"""JSON on a child: category -> status of the row mirrored last."""
DIGEST_TAG = "adgrid.digest"
"""On the parent of a run that was mirrored whole: what it was made of."""
FILES_TAG = "adgrid.files"
"""Hash on the parent of the report files uploaded last."""
INPUT_CONTEXT = "training and test images"
"""MLflow's word for what a run did with a dataset."""
COMMIT_TAG, TABLES_TAG = "mlflow.source.git.commit", "mlflow.loggedArtifacts"

_MAX_PARAM, _MAX_TAG = 6000, 8000
_METRICS_PER_BATCH, _OTHERS_PER_BATCH = 800, 90
_RUNS_PER_PAGE = 200  # MLflow takes a third of a MiB for each while it reads them
_SQLITE = re.compile(r"(sqlite(?:\+\w+)?):///(.+)")


class TrackingUnavailable(RuntimeError):
    """MLflow could not be reached or refused; nothing is lost, a later `sync` of the same rows catches up."""


_T = TypeVar("_T")


@dataclass
class _Mirrored:
    """What MLflow holds of one run."""

    id: str
    status: str
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    inputs: set[tuple[str, str]] = field(default_factory=set)
    """Name and digest."""
    cells: dict[str, str] = field(default_factory=dict)
    """Category -> status."""

    @classmethod
    def of(cls, run: Run) -> _Mirrored:
        data = run.data
        found = run.inputs.dataset_inputs if run.inputs else []
        inputs = {(each.dataset.name, each.dataset.digest) for each in found}
        return cls(
            id=run.info.run_id,
            status=run.info.status,
            params=_share_names(data.params),
            metrics=_share_names(data.metrics),
            tags=_share_names(data.tags),
            inputs=inputs,
            cells=json.loads(data.tags.get(CELLS_TAG, "{}")),
        )


def _share_names(values: Mapping[str, _T]) -> dict[str, _T]:
    """The same, whose names are kept once for all trials that have them."""
    return {sys.intern(name): value for name, value in values.items()}


@dataclass
class _Family:
    """A run and its trials in MLflow."""

    parent: _Mirrored
    children: dict[str, _Mirrored] | None
    """By trial id; None while nobody needed them."""


class Mirror:
    """Writes the rows of runs to one MLflow experiment."""

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        """Nothing is opened before the first `sync`.

        Args:
            tracking_uri: of a server, or of a SQLite file, which is made if need be with its artifacts beside it.
            experiment: name of the experiment, made if need be.

        Raises:
            AdgridError: a SQLite URI without a file.
        """
        self.tracking_uri = absolute_uri(tracking_uri)
        self.experiment = experiment
        self._opened: tuple[MlflowClient, str] | None = None
        self._known: dict[str, _Family] = {}
        self._monitor: SystemMetricsMonitor | None = None

    def start(self, space_name: str, run_id: str, params: Mapping[str, object]) -> None:
        """Opens or makes the parent run of a run, and asks for nothing else.

        Args:
            space_name: name of the parent run.
            run_id: finds the parent run again.
            params: of the parent, written once and never changed.

        Raises:
            TrackingUnavailable: MLflow cannot be reached or refuses.
        """
        with self._reported():
            client, _ = self._open()
            parent = self._find(space_name, run_id)
            if _write(client, parent, params=params):
                _reopen(client, parent)

    def holds(self, space_name: str, run_id: str, digest: str) -> bool:
        """Whether the last `sync` of a run was that of a finished one with this digest, and nothing came since.

        Raises:
            TrackingUnavailable: MLflow cannot be reached or refuses.
        """
        with self._reported():
            parent = self._find(space_name, run_id)
            return parent.tags.get(DIGEST_TAG) == digest and parent.status != "RUNNING"

    def sync(
        self,
        space_name: str,
        run_id: str,
        rows: Iterable[ResultRow],
        files: Sequence[Path] = (),
        params: Mapping[str, object] | None = None,
        finished: bool = False,
        planned: Mapping[str, Sequence[str]] | None = None,
        metrics: Mapping[str, float] | None = None,
        digest: str = "",
    ) -> None:
        """Brings MLflow up to date. Writes nothing that is there already.

        A trial gets its means and its final status when every category has a row: as told by `planned`, else when the
        run is `finished`. A mean is written only where every category has the number.

        Args:
            space_name: name of the parent run.
            run_id: finds the parent run again.
            rows: new rows, in any portions; those mirrored earlier count on. A finished row is never replaced by a
                failed one.
            files: of the report; kept on the parent under their places below the deepest folder that holds them all.
            params: of the parent, written once and never changed.
            finished: the run has ended; `rows` are all its rows, and their means go to the parent.
            planned: categories of the trials of the run, by trial id.
            metrics: of the parent, besides the means.
            digest: of all that is mirrored of a finished run, for `holds`.

        Raises:
            TrackingUnavailable: MLflow cannot be reached or refuses.
        """
        listed = list(rows)
        expected = planned or {}
        with self._reported():
            client, _ = self._open()
            parent = self._find(space_name, run_id)
            children = self._children(run_id)
            by_trial: dict[str, list[ResultRow]] = {}
            for row in listed:
                by_trial.setdefault(row.trial_id, []).append(row)
            for trial_id, members in by_trial.items():
                row = members[0]
                searched = describe_searched(row.tuned, row.params)
                child = self._child(run_id, trial_id, child_name(row, row.dataset, searched))
                known = expected.get(trial_id) or ([row.category for row in members] if finished else None)
                _sync_child(client, child, members, known)
            if finished:
                for trial_id, child in children.items():
                    _settle(client, child, set(expected.get(trial_id, ())) <= set(child.cells))
            about = [child for child in children.values() if STUDY_TAG not in child.tags]
            _sync_parent(client, parent, about, listed, params or {}, finished, metrics or {})
            if files:
                _upload(client, parent, files)
            if digest:
                _write(client, parent, tags={DIGEST_TAG: digest})

    def log_losses(self, space_name: str, run_id: str, losses: Mapping[str, tuple[Trial, Sequence[Loss]]]) -> None:
        """Adds points to the curves of trials that are still being trained.

        Args:
            space_name: name of the parent run.
            run_id: finds the parent run again.
            losses: trial id to the trial and its new points.

        Raises:
            TrackingUnavailable: MLflow cannot be reached or refuses.
        """
        with self._reported():
            client, _ = self._open()
            self._find(space_name, run_id)
            for trial_id, (trial, points) in losses.items():
                searched = [] if trial.tuned is None else describe_searched(asdict(trial.tuned), trial.params)
                child = self._child(run_id, trial_id, child_name(trial, trial.dataset.name, searched))
                now = int(time.time() * 1000)
                metrics = [
                    Metric(metric_key(curve_name(point.stage, category)), point.value, now, point.epoch)
                    for point in points
                    for category in point.categories
                    if category not in child.cells
                ]
                for start in range(0, len(metrics), _METRICS_PER_BATCH):
                    client.log_batch(child.id, metrics[start : start + _METRICS_PER_BATCH])
                child.metrics.update({metric.key: metric.value for metric in metrics})

    def watch_machine(self, space_name: str, run_id: str) -> None:
        """From now on notes on the parent run what this machine does: processor, memory, disk, network, GPUs.

        MLflow's own thread does it, every ten seconds, until the run has ended or `close` is called.

        Raises:
            TrackingUnavailable: MLflow cannot be reached or refuses.
        """
        with self._reported():
            client, _ = self._open()
            parent = self._find(space_name, run_id)
            _reopen(client, parent)
            self._monitor = SystemMetricsMonitor(parent.id, resume_logging=True, tracking_uri=self.tracking_uri)
            self._monitor.start()

    def close(self) -> None:
        """Ends `watch_machine`."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None

    def _find(self, space_name: str, run_id: str) -> _Mirrored:
        """The parent run of a run, made if need be."""
        if run_id not in self._known:
            self._known[run_id] = _find_family(*self._open(), space_name, run_id)
        return self._known[run_id].parent

    def _children(self, run_id: str) -> dict[str, _Mirrored]:
        """The child runs of a run that was found, by trial id."""
        family = self._known[run_id]
        if family.children is None:
            family.children = _find_children(*self._open(), family.parent)
        return family.children

    def _child(self, run_id: str, trial_id: str, name: str) -> _Mirrored:
        """The child run of a trial, made under a name if need be."""
        client, experiment_id = self._open()
        children = self._children(run_id)
        if trial_id not in children:
            tags = {PARENT_TAG: self._known[run_id].parent.id, TRIAL_TAG: trial_id, "run": run_id}
            tags |= {"mlflow.source.name": "adgrid", **_user_tag()}
            children[trial_id] = _Mirrored.of(client.create_run(experiment_id, run_name=name, tags=tags))
        return children[trial_id]

    def _open(self) -> tuple[MlflowClient, str]:
        if self._opened is None:
            quieten_mlflow()
            sqlite = _SQLITE.fullmatch(self.tracking_uri)
            location = None
            if sqlite:
                folder = Path(sqlite.group(2)).parent
                folder.mkdir(parents=True, exist_ok=True)
                location = (folder / "mlartifacts" / re.sub(r"[^\w.-]+", "_", self.experiment)).as_uri()
            client = MlflowClient(self.tracking_uri)
            self._opened = client, _find_experiment(client, self.experiment, location)
        return self._opened

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            with reported(self.tracking_uri):
                yield
        except TrackingUnavailable:
            # What was written before the error is unknown, so it is read again next time.
            self._opened = None
            self._known.clear()
            raise


@contextmanager
def reported(tracking_uri: str) -> Iterator[None]:
    """Turns what MLflow and its ways to a server raise into TrackingUnavailable, told without the password."""
    # Between MLflow and its database layer; nobody who reads it here can do anything about it. The filter stays, since
    # one that is put back would not be a thread's own.
    warnings.filterwarnings("ignore", category=SADeprecationWarning)
    try:
        yield
    # The exceptions of requests are OSErrors.
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" …")
        raise TrackingUnavailable(_without_password(f"{tracking_uri}: {reason}", tracking_uri)) from error


def ui_command(tracking_uri: str) -> str:
    """The shell command that shows a mirror: MLflow's own server for a database, the browser for a running server."""
    if tracking_uri.startswith(("http://", "https://")):
        return f"{shlex.quote(sys.executable)} -m webbrowser {shlex.quote(tracking_uri)}"
    return f"mlflow ui --backend-store-uri {shlex.quote(absolute_uri(tracking_uri))}"


def absolute_uri(uri: str) -> str:
    """A tracking URI that means the same in every folder. Raises AdgridError for a SQLite URI without a file."""
    sqlite = _SQLITE.fullmatch(uri)
    if sqlite is None and uri.startswith("sqlite"):
        raise AdgridError(f"--tracking-uri {uri}: names no file; write sqlite:///FOLDER/mlflow.db")
    return uri if sqlite is None else f"{sqlite.group(1)}:///{Path(sqlite.group(2)).expanduser().absolute()}"


def _without_password(text: str, uri: str) -> str:
    login, found, _ = urlsplit(uri).netloc.rpartition("@")
    return text.replace(login + found, "") if found else text


def quieten_mlflow() -> None:
    """Few and short retries, no chatter. MLflow offers only its environment for this; what a user has set stays."""
    choices: tuple[tuple[Any, object], ...] = (
        (MLFLOW_HTTP_REQUEST_MAX_RETRIES, 2),
        (MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR, 1),
        (MLFLOW_HTTP_REQUEST_TIMEOUT, 30),
        (MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT, True),
    )
    for variable, value in choices:
        if not variable.is_set():
            variable.set(value)
    # "Creating initial MLflow database tables..." and the like.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)


def _user_tag() -> dict[str, str]:
    try:
        return {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError):
        # A container may run under a number that has no name.
        return {}


# --- finding what is there -------------------------------------------------------------------------------------


def _find_experiment(client: MlflowClient, name: str, location: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException:
            # Another driver may have made it in between.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise MlflowException(f"experiment {name!r} is deleted; restore it in MLflow or name another one")
    return found.experiment_id


def _find_family(client: MlflowClient, experiment_id: str, space_name: str, run_id: str) -> _Family:
    """The parent run, made if need be; one that is new has no children."""
    found = client.search_runs(
        [experiment_id], f"tags.`{RUN_TAG}` = {run_id!r}", order_by=["attributes.start_time ASC"], max_results=1
    )
    if not found:
        tags = {RUN_TAG: run_id, "kind": "run", "mlflow.source.name": "adgrid", **_user_tag()}
        return _Family(_Mirrored.of(client.create_run(experiment_id, run_name=space_name, tags=tags)), {})
    return _Family(_Mirrored.of(found[0]), None)


def _find_children(client: MlflowClient, experiment_id: str, parent: _Mirrored) -> dict[str, _Mirrored]:
    """By trial id."""
    children: dict[str, _Mirrored] = {}
    token: str | None = None
    while token != "":
        page = client.search_runs(
            [experiment_id], f"tags.`{PARENT_TAG}` = '{parent.id}'", max_results=_RUNS_PER_PAGE, page_token=token
        )
        for run in page:
            children[run.data.tags.get(TRIAL_TAG, run.info.run_id)] = _Mirrored.of(run)
        token = page.token or ""
    return children


# --- writing what is not -----------------------------------------------------------------------------------------


def _write(
    client: MlflowClient,
    run: _Mirrored,
    *,
    params: Mapping[str, object] | None = None,
    metrics: Mapping[str, float] | None = None,
    curves: Mapping[str, Sequence[float]] | None = None,
    points: Sequence[Point] = (),
    tags: Mapping[str, str] | None = None,
) -> bool:
    """Logs what is new or changed, remembers it and says whether anything was.

    Parameters cannot change in MLflow, so only new ones count. Of a curve the last point tells whether it is there; if
    another is the last, those points are written that are not. `points` are written in any case, and with them in one
    request the tags, by which the caller knows next time that they are there.
    """
    new_params = {
        key: text[:_MAX_PARAM]
        for key, text in ((metric_key(name), _text(value)) for name, value in (params or {}).items())
        if key not in run.params
    }
    new_metrics = {
        key: value
        for key, value in ((metric_key(name), float(value)) for name, value in (metrics or {}).items())
        if run.metrics.get(key) != value
    }
    new_tags = {key: value[:_MAX_TAG] for key, value in (tags or {}).items() if run.tags.get(key) != value[:_MAX_TAG]}
    now = int(time.time() * 1000)
    found = [Metric(metric_key(name), value, now, step) for name, step, value in points]
    found += [Metric(key, value, now, 0) for key, value in new_metrics.items()]
    for name, values in (curves or {}).items():
        key = metric_key(name)
        if values and run.metrics.get(key) != values[-1]:
            there = client.get_metric_history(run.id, key) if key in run.metrics else ()
            known = {point.step: point.value for point in sorted(there, key=lambda point: point.timestamp)}
            steps = enumerate(values, start=1)
            found += [Metric(key, value, now, step) for step, value in steps if known.get(step) != value]
            new_metrics[key] = values[-1]
    others = [Param(key, value) for key, value in new_params.items()]
    labels = [RunTag(key, value) for key, value in new_tags.items()]
    while found or others or labels:
        client.log_batch(run.id, found[:_METRICS_PER_BATCH], others[:_OTHERS_PER_BATCH], labels[:_OTHERS_PER_BATCH])
        found, others, labels = (
            found[_METRICS_PER_BATCH:],
            others[_OTHERS_PER_BATCH:],
            labels[_OTHERS_PER_BATCH:],
        )
    run.params.update(new_params)
    run.metrics.update({**new_metrics, **{metric_key(name): value for name, _, value in points}})
    run.tags.update(new_tags)
    return bool(new_params or new_metrics or new_tags or points)


def _set_status(client: MlflowClient, run: _Mirrored, status: str) -> None:
    if run.status == status:
        return
    if status == "RUNNING":
        client.update_run(run.id, status)
    else:
        client.set_terminated(run.id, status)
    run.status = status


def _reopen(client: MlflowClient, run: _Mirrored) -> None:
    _write(client, run, tags={"status": "running"})
    _set_status(client, run, "RUNNING")


def _text(value: object) -> str:
    return "none" if value is None else show_value(value)


def _sync_child(
    client: MlflowClient, child: _Mirrored, rows: Sequence[ResultRow], categories: Sequence[str] | None
) -> None:
    """Mirrors rows of one trial; settles it where `categories` says that no more will come."""
    cells = child.cells
    # Failed rows first, so that a finished one of the same category has the last word.
    fresh = [row for row in rows if row.status == "ok" or cells.get(row.category) != "ok"]
    fresh.sort(key=lambda row: row.status == "ok")
    if not fresh:
        return
    row = fresh[-1]
    before = cells
    cells = before | {row.category: row.status for row in fresh}
    is_complete = categories is not None and set(categories) <= set(cells)
    earlier = [stamp for stamp in child.tags.get("stamps", "").split("; ") if stamp]
    stamps = dict.fromkeys([*earlier, *(stamp for row in fresh for stamp in row.stamps)])
    tags = {
        **child_tags(row),
        "stamps": "; ".join(stamps),
        CELLS_TAG: json.dumps(cells, sort_keys=True),
    }
    if row.tuned.get("is_sample"):
        tags[STUDY_TAG] = row.tuned["study_id"]
    if row.provenance.get("git_commit"):
        tags[COMMIT_TAG] = row.provenance["git_commit"]
    # Of a trial with a single category the curve would be that category's number.
    is_single = categories is not None and len(categories) == 1
    points = [] if is_single else curves_over_categories(fresh, before, child.metrics)
    numbers = child_numbers(fresh)
    status = "RUNNING"
    if is_complete:  # all in one call: most of what a server takes for a trial is the number of calls
        written = {metric_key(name): float(value) for name, value in numbers.items()}
        after = replace(child, metrics={**child.metrics, **written}, cells=cells)
        means, tags["status"], status = _conclude(after, is_complete=True)
        numbers |= means
    has_changed = _write(
        client, child, params=child_params(row), metrics=numbers, curves=child_curves(fresh), points=points, tags=tags
    )
    child.cells = cells
    if is_complete and set(cells.values()) == {"ok"} and {row.category for row in rows} == set(cells):
        _log_input(client, child, describe_input(rows))
    if has_changed and not is_complete:
        _write(client, child, tags={"status": "running"})
    if has_changed or is_complete:
        _set_status(client, child, status)


def _log_input(client: MlflowClient, child: _Mirrored, found: Input | None) -> None:
    """Says on which images a trial ran, unless that is said already."""
    if found is None or (found.name, found.digest) in child.inputs:
        return
    source = json.dumps(found.facts)
    dataset = Dataset(found.name, found.digest, "adgrid", source, profile=input_profile(found))
    context = InputTag("mlflow.data.context", INPUT_CONTEXT)
    client.log_inputs(child.id, [DatasetInput(dataset=dataset, tags=[context])])
    child.inputs.add((found.name, found.digest))


def _settle(client: MlflowClient, child: _Mirrored, is_complete: bool) -> None:
    """Writes the means and the final status of a trial of which no more rows will come."""
    means, word, status = _conclude(child, is_complete)
    _write(client, child, metrics=means, tags={"status": word})
    _set_status(client, child, status)


def _conclude(child: _Mirrored, is_complete: bool) -> tuple[dict[str, float], str, str]:
    """Means, our status and MLflow's of a trial of which no more rows will come."""
    found = set(child.cells.values())
    word, status = "ok", "FINISHED"
    if found & {"failed", "skipped"}:
        word, status = ("failed" if "failed" in found else "skipped"), "FAILED"
    elif found != {"ok"} or not is_complete:
        word, status = ("stopped" if "stopped" in found else "incomplete"), "KILLED"
    return summarise(child.metrics, list(child.cells)) if word == "ok" else {}, word, status


def _sync_parent(
    client: MlflowClient,
    parent: _Mirrored,
    children: Sequence[_Mirrored],
    rows: Sequence[ResultRow],
    params: Mapping[str, object],
    finished: bool,
    further: Mapping[str, float],
) -> None:
    statuses = [status for child in children for status in child.cells.values()]
    num_ok = statuses.count("ok")
    metrics: dict[str, float] = {"cells_ok": num_ok, "cells_without_number": len(statuses) - num_ok, **further}
    stamps = {stamp for child in children for stamp in child.tags.get("stamps", "").split("; ") if stamp}
    tags = {"protocol_id": "; ".join(sorted({child.tags["protocol_id"] for child in children if child.cells}))}
    tags["stamps"] = "; ".join(sorted(stamps))
    if finished:
        metrics |= run_means(rows)
        expected = int(str((params or parent.params).get("cells", num_ok)))
        tags["status"] = "failed" if num_ok < len(statuses) else "incomplete" if num_ok < expected else "ok"
    has_changed = _write(client, parent, params=params, metrics=metrics, tags=tags)
    if finished:
        _set_status(client, parent, {"ok": "FINISHED", "failed": "FAILED", "incomplete": "KILLED"}[tags["status"]])
    elif has_changed:
        _reopen(client, parent)


def _upload(client: MlflowClient, parent: _Mirrored, files: Sequence[Path]) -> None:
    """Puts the report on the parent run, unless the same files are there already."""
    root = os.path.commonpath([path.absolute().parent for path in files])
    places = {path.absolute().relative_to(root).as_posix(): path for path in files}
    hashes = {place: hashlib.sha256(path.read_bytes()).hexdigest() for place, path in places.items()}
    digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    if parent.tags.get(FILES_TAG) == digest:
        return
    for place, path in places.items():
        client.log_artifact(parent.id, str(path), artifact_path=place.rpartition("/")[0] or None)
    # MLflow's own `log_table` would append the rows of a second run to those of the first.
    tables = [{"path": place, "type": "table"} for place in places if re.fullmatch(r"matrices/[^/]+\.json", place)]
    _write(client, parent, tags={FILES_TAG: digest, TABLES_TAG: json.dumps(tables)})
