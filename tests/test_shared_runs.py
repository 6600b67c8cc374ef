"""Several `adgrid run` of one space at the same time, and storage that fails under them."""

import datetime as dt
import errno
import os
import re
import socket
import subprocess
import sys

import pytest
from runs import SPACE, SmallRun, quiet_console, write

from harness.claims import Claims
from harness.cli import main
from harness.progress import Listener
from harness.run import execute
from harness.store import StoreError
from harness.sweep import connect, run_trials

pytestmark = pytest.mark.ray
SLOW = SPACE.replace(
    "[toy_features]", "[{name: toy_broken, params: {how: slow, seconds: 1.5, category: any, note: NOTE}}]"
)


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


def start(space, run, *words):
    command = [sys.executable, "-m", "harness.cli", "run", space, "--root", run.root, "--random-weights"]
    command += ["--cache-dir", run.places.cache_dir, "--no-pictures", "--num-cpus", "1", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # between MLflow and its database layer
def test_two_runs_of_a_space_at_once_share_its_cells_and_both_matrices_are_complete(run, tmp_path):
    from mlflow import MlflowClient

    run.plan()  # paints the images
    note = tmp_path / "fits"
    space = write(tmp_path, SLOW.replace("NOTE", str(note)) + "seeds: [0, 1, 2]\n")
    both = [start(space, run), start(space, run)]
    told = [process.communicate(timeout=280) for process in both]
    assert [process.returncode for process in both] == [0, 0], "".join(error for _, error in told)
    counts = [re.search(r"9 cells: (\d) computed now, (\d) from earlier runs, 0 without", out) for out, _ in told]
    assert sum(int(count.group(1)) for count in counts) == 9
    assert note.read_text().count("fit") == 9  # each cell once
    rows = run.store.load_rows()
    assert {(row.category, row.seed, row.status) for row in rows.values()} == {
        (category, seed, "ok") for category in ("small", "middle", "large") for seed in (0, 1, 2)
    }
    matrices = [out[out.index("\n\n") : out.index("9 cells")] for out, _ in told]
    assert matrices[0] == matrices[1]
    client = MlflowClient(f"sqlite:///{run.root}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "adgrid"]
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 4  # one parent, three trials
    points = [
        client.get_metric_history(one.info.run_id, key)
        for one in runs
        for key in one.data.metrics
        if key.startswith("image_auroc")
    ]
    assert len(points) == 3 * 4 + 1  # of each trial three categories and their mean, of the parent the mean
    assert {len(values) for values in points} == {1}
    assert run.store.names("claims") == []


@pytest.fixture(scope="module")
def local_ray():
    """One Ray of two cores."""
    with connect(None, num_cpus=2):
        yield


class KilledElsewhere(Listener):
    """A run on another machine that holds a cell and is killed when this run has done all others."""

    def __init__(self, run, cell, monkeypatch):
        self.run, self.cell, self.monkeypatch = run, cell, monkeypatch
        self.rows, self.ends = [], None
        self.claim(1e6)

    def claim(self, ttl):
        with self.monkeypatch.context() as patch:
            patch.setattr(socket, "gethostname", lambda: "elsewhere")
            record = Claims(self.run.store, "killed", ttl)._record()
        self.run.store.publish(f"claims/{self.cell.prediction_id}.json", record)

    def finished(self, trial, row):
        self.rows.append(row)
        if len(self.rows) == 2:
            self.claim(2.0)
            self.ends = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=2)


def test_a_cell_that_a_killed_run_elsewhere_has_claimed_is_taken_over(run, local_ray, monkeypatch):
    plan = run.plan()
    cell = next(cell for cell in plan.trials[0].cells if cell.category == "middle")
    listener = KilledElsewhere(run, cell, monkeypatch)
    rows = run_trials(plan.trials, run.settings(plan), [listener])
    assert {row.category: row.status for row in rows} == dict.fromkeys(("large", "middle", "small"), "ok")
    last = listener.rows[-1]
    assert (len(listener.rows), last.category) == (3, "middle")
    assert dt.datetime.fromisoformat(last.provenance["finished_at"]) >= listener.ends


def test_a_disk_that_is_full_on_a_worker_is_one_error_and_the_next_run_goes_on(run, tmp_path, local_ray):
    text = SLOW.replace("slow", "full_once").replace("any", "middle").replace("NOTE", str(tmp_path / "fits"))
    space = write(tmp_path, text)
    with pytest.raises(StoreError, match=r"cannot be written .*No space left.* the same command goes on"):
        execute(space, run.options(), quiet_console(), "test")
    assert {row.category: row.status for row in run.store.load_rows().values()} == {"large": "ok"}
    outcome = execute(space, run.options(), quiet_console(), "test")
    assert (outcome.num_computed, outcome.num_failed) == (2, 0)


def test_a_root_that_cannot_be_written_is_one_error(run, tmp_path, monkeypatch, capsys):
    run.plan()  # paints the images

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("os.replace", read_only)
    words = ["run", write(tmp_path, SPACE), "--root", run.root, "--random-weights", "--tracking-uri", "off"]
    assert main([*words, "--cache-dir", run.places.cache_dir]) == 2
    told = capsys.readouterr().err
    assert "Read-only file system" in told
    assert "name a writable folder" in told
    assert "Traceback" not in told
