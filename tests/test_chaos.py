"""The chaos run, and what it judges by."""

import dataclasses
import itertools
import math

import mlflow
import pytest
from mlflow import MlflowClient
from rich.console import Console
from runs import SmallRun
from toy_rows import toy_row

from harness.audit import compare_runs, count_finished
from harness.chaos import KINDS, run_chaos, show_chaos
from harness.mirrored import find_doubles
from harness.options import RunOptions
from harness.run_folder import keep_plan
from harness.tracking import Mirror

SECONDS = itertools.count()


@pytest.fixture
def console():
    return Console(record=True, width=150)


@pytest.fixture
def pair(tmp_path, places):
    """The same run in two stores."""
    runs = [SmallRun(tmp_path / name, places) for name in ("calm", "storm")]
    for run in runs:
        plan = run.plan()
        keep_plan(run.store, plan, "test", [])
        run.run_plan(plan)
    return [run.store for run in runs]


def change(store, category, **changes):
    """Publishes a later row of the same cell."""
    (row,) = [row for row in store.load_rows().values() if row.category == category]
    later = {**row.provenance, "finished_at": f"2999-01-01T00:00:{next(SECONDS):02}+00:00"}
    store.fold_rows(at_least=1)  # or the new row would take the place of the old one
    store.publish_row(dataclasses.replace(row, provenance=later, **changes))
    return row


def test_a_run_that_was_not_disturbed_has_no_problems(pair):
    assert compare_runs(*pair) == []
    assert set(count_finished(pair[1]).values()) == {1}


def test_a_lost_row_is_told(pair):
    (name, *_) = pair[1].names("rows/new")
    pair[1].delete(f"rows/new/{name}")
    assert compare_runs(*pair) == ["2 rows of 3 cells"]


def test_a_number_that_differs_in_its_last_bit_is_told(pair):
    row = next(row for row in pair[1].load_rows().values() if row.category == "small")
    change(pair[1], "small", metrics={**row.metrics, "image_auroc": math.nextafter(row.metrics["image_auroc"], 0)})
    (problem,) = compare_runs(*pair)
    assert problem.startswith("toy_features toy_squares/small seed 0: image_auroc is")
    assert [number for number in count_finished(pair[1]).values() if number != 1] == [2]


def test_only_a_training_with_a_free_number_of_workers_may_be_off_by_rounding(pair):
    for store in pair:
        change(store, "large", curves={"train": [0.5, 0.25]})
    row = change(pair[1], "large", curves={"train": [0.5, 0.25]})
    for difference, problems in ((5e-4, 0), (2e-3, 1)):
        change(pair[1], "large", metrics={**row.metrics, "pixel_auroc": row.metrics["pixel_auroc"] - difference})
        assert len(compare_runs(*pair, elastic=True)) == problems
        assert len(compare_runs(*pair)) == 1


def test_two_pairs_of_images_may_change_places_where_the_number_of_workers_changed(pair):
    for store in pair:
        change(store, "large", curves={"train": [0.5, 0.25]})
    row = change(pair[1], "large", curves={"train": [0.5, 0.25]})
    labels = pair[0].load_scores(row.cell_id)["label"]
    one = 1 / (labels.count(0) * labels.count(1))
    for pairs, problems in ((2, 0), (3, 1)):
        change(pair[1], "large", metrics={**row.metrics, "image_auroc": row.metrics["image_auroc"] - pairs * one})
        assert len(compare_runs(*pair, elastic=True)) == problems


def test_anomaly_maps_that_differ_are_told(pair):
    (row,) = [row for row in pair[1].load_rows().values() if row.category == "middle"]
    (other,) = [row for row in pair[1].load_rows().values() if row.category == "small"]
    prefix = next(name for name in pair[1].folders("") if name.startswith("predictions"))
    found = [name for name in pair[1].names(prefix) if name.startswith((row.prediction_id, other.prediction_id))]
    data = {name: pair[1].read(f"{prefix}/{name}") for name in found}
    for name in found:
        suffix = name.split(".", 1)[1]
        if name.startswith(row.prediction_id):
            pair[1].publish(f"{prefix}/{name}", data[f"{other.prediction_id}.{suffix}"])
    assert compare_runs(*pair) == ["toy_features toy_squares/middle seed 0: its anomaly maps differ"]


def test_what_mlflow_has_twice_is_told(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    rows = [toy_row(0.8), toy_row(0.9, category="nut")]
    Mirror(uri, "storm").sync("toys", "run-1", rows, finished=True)
    assert find_doubles(uri, "storm", "run-1") == []
    assert find_doubles(uri, "storm", "run-2") == ["MLflow has 0 parent runs of run-2"]
    assert find_doubles(uri, "calm", "run-1") == ["MLflow has 0 parent runs of run-1"]
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("storm").experiment_id
    parent, child = sorted(client.search_runs([experiment]), key=lambda run: "mlflow.parentRunId" in run.data.tags)
    client.log_metric(child.info.run_id, "running_mean/image_auroc", 0.8, step=1)
    (problem,) = find_doubles(uri, "storm", "run-1")
    assert problem.startswith("MLflow has steps [1] of running_mean/image_auroc twice")
    twin = client.create_run(experiment, tags=child.data.tags)
    problems = find_doubles(uri, "storm", "run-1")
    assert f"MLflow has trial {rows[0].trial_id} 2 times" in problems
    assert any(problem.endswith("is not finished in MLflow") for problem in problems)
    client.delete_run(twin.info.run_id)
    client.create_run(experiment, tags=parent.data.tags)
    assert find_doubles(uri, "storm", "run-1") == ["MLflow has 2 parent runs of run-1"]
    mlflow.set_tracking_uri(None)


STORM = """
name: storm
methods:
  - toy_features
  - {name: uniad, params: {epochs: 12, batch_size: 4, hidden_width: 16, feedforward_width: 32, encoder_layers: 1,
     decoder_layers: 1, heads: 2, neighbour_size: 3}}
backbones: [toy_resnet]
datasets: [{name: toy_squares, categories: [small, large]}]
protocol: {image_size: 64}
resources: {cpu: 1, workers: 2}
"""


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_storm_leaves_what_an_undisturbed_run_leaves(tmp_path, console):
    space = tmp_path / "storm.yaml"
    space.write_text(STORM)
    places = {"cache_dir": str(tmp_path / "cache"), "root": str(tmp_path / "root")}
    outcome = run_chaos(len(KINDS), 1, RunOptions(random_weights=True, **places), console, space=space, rounds=1)
    show_chaos(outcome, console)
    assert outcome.problems == (), console.export_text()
    assert {kill.kind for kill in outcome.kills} == set(KINDS)
    assert "no row is lost or doubled" in console.export_text()
