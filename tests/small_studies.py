"""A small sweep, and what it must leave in MLflow."""

import time

from runs import SPACE

SWEEP = SPACE.replace("[toy_features]", "[{name: toy_spoiled, params: {spoil: SPOIL, MORE}}]") + (
    "search: {num_samples: 5, tune_on: {toy_squares: [large, middle]}, HOW}\n"
)


def write(tmp_path, text, **values):
    for name, value in {"SPOIL": "{uniform: [0, 1]}", "MORE": "seconds: 0.0", "HOW": "seed: 0", **values}.items():
        text = text.replace(name, value)
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return str(path)


def check_mirror(uri, outcome, best_score, num_samples):
    """The sweep in MLflow: a child per sample, one for the best, the files and the best score on the parent."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("adgrid")
    found = client.search_runs([experiment.experiment_id])
    (parent,) = [one for one in found if "mlflow.parentRunId" not in one.data.tags]
    samples = [one for one in found if "adgrid.study" in one.data.tags]
    (tuned,) = [one for one in found if one not in samples and one is not parent]
    (study,), (row,) = outcome.studies, outcome.rows
    assert len(samples) == num_samples
    assert {one.data.tags["status"] for one in samples} == {"ok", "stopped"}
    assert tuned.info.run_name.endswith("tuned")
    assert "tuned on toy_squares/large" in tuned.data.tags["stamps"]
    objective, name = study.study.search.objective, study.study.name
    assert tuned.data.metrics[objective] == row.metrics[objective]
    assert (parent.info.status, parent.data.metrics["cells_ok"]) == ("FINISHED", 1)
    assert parent.data.metrics[f"tuned/{name}/{objective}"] == best_score
    folder = f"studies/{name}"
    assert {item.path for item in client.list_artifacts(parent.info.run_id, folder)} == {
        f"{folder}/{file}" for file in ("trials.csv", "best.yaml", "parallel_coordinates.png")
    }


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
