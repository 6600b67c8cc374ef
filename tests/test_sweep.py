"""Trials through Ray Tune: failures, killed workers, stopping by hand."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import SPACE, SmallRun, quiet_console, write

from harness.progress import Listener
from harness.run import execute
from harness.sweep import Relay, connect, execute_job, run_trials

pytestmark = pytest.mark.ray
GRID = SPACE.replace(
    "[toy_features]", "[toy_features, {name: toy_broken, params: {how: HOW, category: middle, note: NOTE}}]"
)


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    """One Ray of two cores for the whole module."""
    with connect(None, num_cpus=2):
        yield


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


def statuses(rows):
    return {(row.method, row.category): row.status for row in rows}


def test_a_grid_with_a_worker_killed_once_is_complete(run, tmp_path):
    note = tmp_path / "fits"
    space = write(tmp_path, GRID.replace("HOW", "kill_once").replace("NOTE", str(note)))
    outcome = execute(space, run.options(), quiet_console(), "test")
    assert set(statuses(outcome.rows).values()) == {"ok"}, [row.reason for row in outcome.rows]
    assert len(outcome.rows) == 6
    assert note.read_text().count("fit") == 2
    assert execute(space, run.options(), quiet_console(), "test").num_computed == 0


class Curves(Listener):
    """Keeps the losses that it hears of."""

    def __init__(self):
        self.told = {}

    def trained(self, trial, losses):
        for loss in losses:
            assert loss.categories == (loss.categories[0],)
            self.told.setdefault(loss.categories[0], []).append((loss.epoch, loss.value))


def test_losses_are_told_while_a_trial_runs(run, monkeypatch):
    monkeypatch.setattr("harness.notes.NOTE_SECONDS", 0.0)
    plan = run.plan(SPACE.replace("[toy_features]", "[{name: toy_tuned, params: {epochs: 3}}]"))
    (trial,), settings, curves = plan.trials, run.settings(plan), Curves()
    relay = Relay([curves], lambda config: trial, run.store, settings)
    tunes = SimpleNamespace(config={})
    execute_job(trial, settings, lambda message: relay.on_trial_result(0, [], tunes, message))
    rows = relay.all_rows.values()
    assert {row.category: list(enumerate(row.curves["tuning"], start=1)) for row in rows} == curves.told
    assert sorted(curves.told) == ["large", "middle", "small"]


def test_a_cell_that_always_kills_its_worker_is_a_failed_row(run, tmp_path):
    note = tmp_path / "fits"
    space = write(tmp_path, GRID.replace("HOW", "kill").replace("NOTE", str(note)))
    outcome = execute(space, run.options(), quiet_console(), "test")
    found = statuses(outcome.rows)
    assert [cell for cell, status in found.items() if status != "ok"] == [("toy_broken", "middle")]
    row = next(row for row in outcome.rows if row.status == "failed")
    assert "died 2 times" in row.reason
    assert outcome.num_failed == 1
    assert note.read_text().count("fit") == 2


def test_rows_are_the_same_with_and_without_ray(run, tmp_path, places):
    outcome = execute(write(tmp_path, SPACE), run.options(), quiet_console(), "test")
    alone = SmallRun(tmp_path / "alone", places)
    plain = alone()
    assert {row.category: row.metrics for row in outcome.rows} == {name: row.metrics for name, row in plain.items()}


@pytest.mark.parametrize("cpus", [1, 2])
def test_torch_uses_the_threads_that_the_trial_asked_for(run, tmp_path, cpus):
    text = SPACE.replace("[toy_features]", "[{name: toy_broken, params: {how: count, category: large, note: NOTE}}]")
    text = text.replace("NOTE", str(tmp_path / "fits"))
    execute(write(tmp_path, f"{text}resources: {{cpu: {cpus}}}\n"), run.options(), quiet_console(), "test")
    assert (tmp_path / "fits").read_text() == f"fit with {cpus} threads\n"


def test_nothing_to_run_starts_nothing(run):
    assert run_trials([], run.settings(run.plan()), []) == []


def test_stopping_by_hand_keeps_finished_rows_and_the_next_run_goes_on(run, tmp_path):
    space = write(
        tmp_path, GRID.replace("HOW", "slow").replace("NOTE", str(tmp_path / "fits")).replace("[toy_features, {", "[{")
    )
    command = [sys.executable, "-m", "harness.cli", "run", space, "--root", run.root, "--random-weights"]
    command += ["--cache-dir", run.places.cache_dir, "--tracking-uri", "off", "--no-pictures", "--num-cpus", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 120
    while not (tmp_path / "fits").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "same command" in errors
    assert {row.category for row in run.store.load_rows().values()} == {"large"}
    second = execute(
        write(tmp_path, Path(space).read_text()),
        run.options(overrides=["categories=large,small"]),
        quiet_console(),
        "test",
    )
    assert second.num_computed == 1
    assert {row.category: row.status for row in second.rows} == {"large": "ok", "small": "ok"}


def test_cells_whose_representation_cannot_be_trained_are_skipped_and_tried_again(run, tmp_path):
    text = """
name: pretrained
methods: [toy_features]
backbones: [{name: toy_resnet, layers: [layer2]}]
datasets: [{name: toy_squares, categories: [middle]}]
representations:
  - plain
  - {name: scaled, kind: toy_scaled, data: [{name: toy_squares, categories: [small]}], params: {trouble: raise}}
protocol: {image_size: 64}
"""
    rows = {row.representation: row for row in execute(write(tmp_path, text), run.options(), quiet_console(), "t").rows}
    assert rows["plain"].status == "ok"
    assert rows["scaled"].status == "skipped"
    assert rows["scaled"].reason == (
        "representation 'scaled' could not be trained: ValueError: the pretraining has a problem"
    )
    again = execute(write(tmp_path, text), run.options(), quiet_console(), "test")
    assert (again.num_computed, again.num_failed) == (1, 1)
    well = execute(write(tmp_path, text.replace("raise", "''")), run.options(), quiet_console(), "test")
    assert (well.num_computed, well.num_failed) == (1, 0)
    assert execute(write(tmp_path, text.replace("raise", "''")), run.options(), quiet_console(), "t").num_computed == 0
