import threading

import pytest
from mlflow import MlflowClient
from runs import SmallRun

from harness import tracker
from harness.run_folder import keep_plan, read_run
from harness.tracker import Tracker
from harness.tracking import TRIAL_TAG, Mirror


class SlowMirror(Mirror):
    """Waits for permission before it writes the first row."""

    asked, allowed = threading.Event(), threading.Event()

    def sync(self, space_name, run_id, rows, *arguments, **options):
        if list(rows):
            self.asked.set()
            assert self.allowed.wait(60)
        super().sync(space_name, run_id, rows, *arguments, **options)


@pytest.fixture
def slow_mirror(monkeypatch):
    """A mirror that waits, in place of the usual one."""
    monkeypatch.setattr(tracker, "Mirror", SlowMirror)
    SlowMirror.asked.clear()
    SlowMirror.allowed.clear()
    return SlowMirror


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


def hear(told, plan, rows):
    """Tells a tracker what the driver hears."""
    for trial in plan.trials:
        for cell in trial.cells:
            told.finished(trial, next(row for row in rows if row.cell_id == cell.cell_id))
        told.ended(trial)


def mirrored(told):
    """Trial id to status of the runs in MLflow."""
    client = MlflowClient(told.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'adgrid'")
    runs = client.search_runs([experiment.experiment_id])
    return {run.data.tags[TRIAL_TAG]: run.info.status for run in runs if TRIAL_TAG in run.data.tags}


def test_a_slow_mirror_delays_no_trial_and_the_end_of_the_run_brings_it_up_to_date(run, slow_mirror):
    plan = run.plan(overrides=("seeds=0,1",))
    run.run_plan(plan)
    rows = list(run.store.load_rows(plan.cell_ids).values())
    keep_plan(run.store, plan, "test", [])
    with Tracker(run.options(tracking_uri=None), run.store, plan) as told:
        told.start()
        hear(told, plan, rows)
        assert slow_mirror.asked.wait(60)
        assert mirrored(told) == {}  # the driver is here already, and MLflow has nothing yet
        slow_mirror.allowed.set()
        told.finish(read_run(run.store, plan.run_id), [])
    assert told.notes == []
    assert mirrored(told) == {trial.trial_id: "FINISHED" for trial in plan.trials}


def test_a_run_that_is_broken_off_waits_for_no_more_than_the_call_under_way(run, slow_mirror, monkeypatch):
    monkeypatch.setattr(tracker, "TRIALS_AT_ONCE", 1)
    plan = run.plan(overrides=("seeds=0,1,2",))
    run.run_plan(plan)
    rows = list(run.store.load_rows(plan.cell_ids).values())
    told = Tracker(run.options(tracking_uri=None), run.store, plan)
    told.start()
    hear(told, plan, rows)
    assert slow_mirror.asked.wait(60)
    threading.Timer(0.5, slow_mirror.allowed.set).start()
    told.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert list(mirrored(told)) == [plan.trials[0].trial_id]


def test_a_server_that_cannot_be_reached_costs_one_note_before_anything_runs(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    plan = run.plan()
    with Tracker(run.options(tracking_uri="http://127.0.0.1:9"), run.store, plan) as told:
        told.start()
        assert len(told.notes) == 1
        assert "127.0.0.1:9" in told.notes[0]
        told.ended(plan.trials[0])
        keep_plan(run.store, plan, "test", [])
        told.finish(read_run(run.store, plan.run_id), [])
    assert len(told.notes) == 1
