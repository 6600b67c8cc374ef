"""Sweeps through Ray Tune: stopped trials, tuned rows, killed drivers and workers."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from runs import SPACE, SmallRun, quiet_console
from small_studies import SWEEP, check_mirror, wait_for, write

from harness.run import execute
from harness.run_folder import read_run
from harness.study import Ledger
from harness.sweep import connect

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def local_ray():
    """One Ray of two cores for the tests that lose nothing."""
    with connect(None, num_cpus=2):
        yield


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


def results_of(outcome):
    (study,) = outcome.studies
    return {result.params["spoil"]: result for result in study.results}


@pytest.mark.usefixtures("local_ray")
def test_asha_stops_the_worse_trial_and_the_best_is_reported_elsewhere(run, tmp_path):
    note = tmp_path / "fits"
    space = write(
        tmp_path,
        SWEEP,
        SPOIL="{choice: [0.0, 0.4, 0.6, 0.8, 1.0]}",
        MORE=f"fit_note: {note}",
        HOW="scheduler: asha, max_concurrent: 1",
    )
    outcome = execute(space, run.options(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"), quiet_console(), "test")
    results = results_of(outcome)
    assert results[0.0].status == "finished"
    assert results[0.0].score == 1.0
    stopped = {spoil for spoil, result in results.items() if result.status == "stopped"}
    assert stopped
    for spoil in stopped:
        row = results[spoil].rows["middle"]
        assert row.status == "stopped"
        assert row.reason.startswith("stopped by asha after 1 of 2 categories: image_auroc ")
    fits = Counter(note.read_text().splitlines())
    assert set(fits.values()) == {1}
    assert not {f"{spoil} middle" for spoil in stopped} & set(fits)
    # The best configuration is reported where nothing was tuned, and says what it was tuned on.
    (row,) = outcome.rows
    assert (row.category, row.params["spoil"], row.status) == ("small", 0.0, "ok")
    assert "tuned on toy_squares/large, toy_squares/middle" in row.stamps
    assert outcome.num_failed == 0
    report = run.store.local_path(f"runs/{outcome.plan.run_id}/report")
    names = {path.name for path in (report / "studies" / "toy_spoiled-toy_resnet-toy_squares").iterdir()}
    assert names == {"trials.csv", "best.yaml", "parallel_coordinates.png"}
    assert "## Studies" in (report / "report.md").read_text()
    check_mirror(f"sqlite:///{tmp_path}/mlflow.db", outcome, 1.0, num_samples=5)
    # A second start computes nothing and says the same.
    again = execute(space, run.options(), quiet_console(), "test")
    assert again.num_computed == 0
    assert again.rows == outcome.rows
    assert {spoil: result.status for spoil, result in results_of(again).items()} == {
        spoil: result.status for spoil, result in results.items()
    }


@pytest.mark.usefixtures("local_ray")
def test_a_plain_random_search_runs_beside_the_grid_and_shares_its_rows(run, tmp_path):
    space = write(tmp_path, SWEEP.replace("methods: [", "methods: [{name: toy_spoiled, params: {spoil: 0.5}}, "))
    outcome = execute(space, run.options(), quiet_console(), "test")
    assert [row.category for row in outcome.rows] == ["large", "middle", "small", "small"]
    assert [bool(row.tuned) for row in outcome.rows] == [False, False, False, True]
    assert {result.status for result in results_of(outcome).values()} == {"finished"}
    best = max(results_of(outcome).values(), key=lambda result: result.score)
    assert outcome.rows[-1].params["spoil"] == best.params["spoil"]
    grid = SPACE.replace("[toy_features]", f"[{{name: toy_spoiled, params: {{spoil: {best.params['spoil']}}}}}]")
    shared = execute(write(tmp_path, grid), run.options(), quiet_console(), "test")
    assert shared.num_computed == 0
    assert not any(row.tuned or any("tuned" in stamp for stamp in row.stamps) for row in shared.rows)
    record = read_run(run.store, outcome.plan.run_id)
    assert record.rows == outcome.rows


@pytest.mark.usefixtures("local_ray")
def test_a_trial_of_one_training_is_stopped_at_an_epoch(run, tmp_path):
    text = SWEEP.replace("toy_spoiled", "toy_spoiled_tuned").replace("[large, middle]", "[large]")
    how = "scheduler: {name: asha, grace_period: 2}, max_concurrent: 1, seed: 4"
    space = write(tmp_path, text, SPOIL="{choice: [0.0, 0.4, 0.6, 0.8, 1.0]}", MORE="epochs: 5", HOW=how)
    outcome = execute(space, run.options(), quiet_console(), "test")
    results = results_of(outcome)
    ledger = Ledger(outcome.plan.studies[0], run.store)
    reports = {sample.params["spoil"]: ledger.reports(sample) for sample in ledger.samples()}
    assert [when for when, _ in reports[0.0]] == [2, 4, 1_000_000]
    stopped = [spoil for spoil, result in results.items() if result.status == "stopped"]
    assert stopped
    for spoil in stopped:
        row = results[spoil].rows["large"]
        assert row.reason.startswith(f"stopped by asha after epoch {reports[spoil][-1][0]}: image_auroc ")
        assert reports[spoil][-1][0] in (2, 4)
    assert {row.category for row in outcome.rows} == {"middle", "small"}


@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_is_killed_in_a_sample_costs_that_sample_nothing(run, tmp_path):
    note = tmp_path / "fits"
    broken = f"{{name: toy_broken, params: {{how: kill_once, category: middle, note: {note}, scale: SPOIL}}}}"
    text = SWEEP.replace("{name: toy_spoiled, params: {spoil: SPOIL, MORE}}", broken)
    space = write(tmp_path, text, SPOIL="{choice: [1.0, 2.0]}", HOW="searcher: optuna, max_concurrent: 1")
    outcome = execute(space, run.options(), quiet_console(), "test")
    (study,) = outcome.studies
    assert [result.status for result in study.results] == ["finished", "finished"]
    assert note.read_text().count("fit") == 3


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(run, tmp_path):
    note = tmp_path / "fits"
    how = "searcher: optuna, scheduler: asha, max_concurrent: 2"
    space = write(tmp_path, SWEEP, MORE=f"seconds: 1.0, fit_note: {note}", HOW=how)
    command = [sys.executable, "-m", "harness.cli", "run", space, "--root", run.root, "--random-weights"]
    command += ["--cache-dir", run.places.cache_dir, "--tracking-uri", "off", "--no-pictures", "--num-cpus", "2"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    wait_for(lambda: driver.poll() is not None or len(run.store.load_rows()) >= 3)
    assert driver.poll() is None
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    time.sleep(3)  # its workers notice
    before = run.store.load_rows()
    fits_before = Counter(note.read_text().splitlines())
    (study,) = run.plan(space_text := (tmp_path / "space.yaml").read_text()).studies
    known = {sample.params["spoil"] for sample in Ledger(study, run.store).samples()}
    assert 2 <= len(known) < 5
    outcome = execute(space, run.options(), quiet_console(), "test")
    results = results_of(outcome)
    assert len(results) == 5
    assert known <= set(results)
    assert {result.status for result in results.values()} <= {"finished", "stopped"}
    assert "finished" in {result.status for result in results.values()}
    fits = Counter(note.read_text().splitlines())
    for row in before.values():  # what was done is not done again; a row that was stopped was never done
        line = f"{row.params['spoil']} {row.category}"
        assert fits[line] == fits_before[line] == (row.status == "ok")
    assert max(fits.values()) <= 2  # only what was running when the driver died
    assert sum(number > 1 for number in fits.values()) <= 2
    assert (
        outcome.rows[0].params["spoil"] == max(results.values(), key=lambda result: result.score or 0).params["spoil"]
    )
    assert run.plan(space_text).studies[0].study_id == study.study_id
