"""What a run that is given again does when nothing has come since, and what it makes anew."""

import pytest
from mlflow import MlflowClient
from runs import SPACE, SmallRun, quiet_console

from harness import tracking
from harness.run import execute
from harness.run_folder import read_run
from harness.run_report import is_made
from harness.tracking import PARENT_TAG


class Finished:
    """A run of which every cell is computed, as `adgrid run` leaves it."""

    def __init__(self, tmp_path, places):
        self.run = SmallRun(tmp_path, places)
        self.space = tmp_path / "space.yaml"
        self.space.write_text(SPACE)
        self.plan = self.run.plan()
        self.rows = self.run.run_plan(self.plan)
        self.execute()

    def execute(self, command="test"):
        """The same command once more."""
        outcome = execute(str(self.space), self.run.options(tracking_uri=None), quiet_console(), command)
        assert outcome.num_computed == 0
        assert not outcome.notes
        return outcome

    @property
    def folder(self):
        return self.run.store.local_path(f"runs/{self.plan.run_id}/report")

    def times(self):
        """When each file of the report was written."""
        return {path: path.stat().st_mtime_ns for path in self.folder.rglob("*") if path.is_file()}

    def client(self):
        return MlflowClient(f"sqlite:///{self.run.store.local_path('mlflow.db')}")

    def mirrored(self):
        """The parent run and its children."""
        client = self.client()
        (experiment,) = client.search_experiments(filter_string="name = 'adgrid'")
        runs = client.search_runs([experiment.experiment_id])
        (parent,) = [found for found in runs if PARENT_TAG not in found.data.tags]
        return parent, [found for found in runs if PARENT_TAG in found.data.tags]


@pytest.fixture
def finished(tmp_path, places):
    return Finished(tmp_path, places)


def test_a_run_to_which_nothing_has_come_is_left_as_it_is(finished, monkeypatch):
    before, (parent, _) = finished.times(), finished.mirrored()
    assert parent.info.status == "FINISHED"

    def refuse(*arguments):
        raise AssertionError("the trials of a run that is mirrored whole are not read")

    monkeypatch.setattr(tracking, "_find_children", refuse)
    outcome = finished.execute()
    assert [row.status for row in outcome.rows] == ["ok"] * len(finished.rows)
    assert finished.times() == before
    after, _ = finished.mirrored()
    assert after.data.tags == parent.data.tags
    assert after.info.end_time == parent.info.end_time


@pytest.mark.parametrize("name", ["report.html", "matrices/image_auroc.png", "rows.csv"])
def test_a_file_of_the_report_that_was_lost_is_made_again(finished, name):
    (finished.folder / name).unlink()
    finished.execute()
    assert (finished.folder / name).stat().st_size


def test_another_command_is_told_in_the_report(finished):
    finished.execute("adgrid run again")
    assert "adgrid run again" in (finished.folder / "report.md").read_text()


def test_a_mirror_that_is_not_there_is_made_of_a_report_that_is(finished):
    finished.run.store.local_path("mlflow.db").unlink()
    finished.execute()
    parent, children = finished.mirrored()
    assert parent.info.status == "FINISHED"
    assert len(children) == len(finished.plan.trials)


def test_a_mirror_that_is_under_way_is_not_whole(finished):
    parent, _ = finished.mirrored()
    finished.client().update_run(parent.info.run_id, "RUNNING")
    finished.execute()
    assert finished.mirrored()[0].info.status == "FINISHED"


def test_a_row_that_comes_later_changes_the_digest(finished):
    store, run_id = finished.run.store, finished.plan.run_id
    record = read_run(store, run_id)
    digest = record.digest
    assert is_made(store, record)
    finished.run.run_plan(finished.plan)  # nothing is open, so no row comes
    assert read_run(store, run_id).digest == digest
    (name, *_) = store.names("rows/new")
    store.delete(f"rows/new/{name}")
    fewer = read_run(store, run_id)
    assert fewer.digest != digest
    assert not is_made(store, fewer)
    finished.run.run_plan(finished.plan)
    again = read_run(store, run_id)
    assert len(again.rows) == len(record.rows)
    assert not is_made(store, again)  # the same cell, at another time
