"""From `adgrid run` to decisions, as people do it: two real runs, compared, ranked and shared through MLflow."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient
from test_tracking import count_writes

from harness.cli import main
from harness.tracking import PARENT_TAG, RUN_TAG

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SPACE = """
name: toys
methods:
  - toy_features
  - {name: toy_spoiled, params: {spoil: SPOIL}}
  - {name: toy_tuned, params: {epochs: 2}}
backbones: [toy_resnet]
datasets: [toy_squares]
seeds: [SEED]
protocol: {image_size: 64}
"""


class Runs:
    """A good run and one with another seed and a worse detector, in one root with its SQLite file."""

    def __init__(self, folder):
        self.folder, self.root = folder, folder / "root"
        self.uri = f"sqlite:///{self.root}/mlflow.db"
        self.good, self.bad = self.run("0.0", "0"), self.run("0.5", "1")

    def run(self, spoil, seed):
        known = set(self.root.glob("runs/*"))
        space = self.folder / f"space{seed}.yaml"
        space.write_text(SPACE.replace("SPOIL", spoil).replace("SEED", seed))
        words = ["run", str(space), "--random-weights", "--num-cpus", "1", "--no-pictures", *self.places]
        assert main(words) == 0
        (folder,) = set(self.root.glob("runs/*")) - known
        return folder.name

    @property
    def places(self):
        return ["--root", str(self.root), "--cache-dir", str(self.folder / "cache")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
        return Runs(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def call(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        code = main([*words, *runs.places])
        shown = capsys.readouterr()
        return code, " ".join(shown.out.split()), " ".join(shown.err.split())

    return run


# --- decisions ---


def test_runs_are_compared_by_id_by_folder_and_from_mlflow_alike(runs, call):
    ways = [
        (runs.good, runs.bad),
        (f"{runs.root}/runs/{runs.good}", f"{runs.root}/runs/{runs.bad}/"),
        (f"mlflow:{runs.good}", f"mlflow:{runs.bad}"),
        (runs.good, f"mlflow:{runs.bad}"),
    ]
    shown = [call("compare", *words) for words in ways]
    assert shown[1:] == shown[:-1]
    code, out, _ = shown[0]
    assert code == 0
    assert f"Image AUROC [%], {runs.bad} against {runs.good}" in out
    assert "not compared, 3 places: params.spoil: 0 against 0.5" in out
    assert "seeds: not the same in 6 of 6 pairs" in out
    assert "better" not in out
    assert "worse" not in out


def test_the_worse_detector_is_found_and_closes_the_gate(runs, call):
    words = ("compare", runs.good, runs.bad, "--ignore", "params.spoil", "--fail-if-worse", "0.005")
    code, out, _ = call(*words)
    assert code == 1
    assert f"worse: image_auroc, {runs.bad} · toy_spoiled · toy_resnet · toy_squares" in out
    assert "toy_features · toy_resnet · toy_squares: -" not in out
    assert call(*words, "--where", "method=toy_features,toy_tuned")[0] == 0
    code, out, _ = call("compare", runs.bad, "--axis", "method", "--where", "method=toy_features,toy_spoiled")
    assert "method toy_spoiled against toy_features" in out


def test_the_leaderboard_ranks_both_runs_from_disk_and_from_mlflow(runs, call, tmp_path):
    code, _, _ = call("leaderboard", "--out", str(tmp_path / "board.csv"))
    assert code == 0
    assert call("leaderboard", runs.good, runs.bad)[1] == call("leaderboard", "--experiment", "adgrid")[1]
    lines = (tmp_path / "board.csv").read_text().splitlines()
    assert lines[-1].split(",")[2:4] == ["4", "toy_spoiled · toy_resnet (random) · spoil=0.5"]


def test_a_run_is_held_against_a_csv_of_a_paper(runs, call, tmp_path):
    paper = tmp_path / "paper.csv"
    paper.write_text(
        "method,backbone,dataset,image_auroc,image_size\ntoy_features,toy_resnet,toy_squares,1.0,64\n"
        "toy_features,toy_resnet,toy_squares,1.0,128\n"
    )
    code, out, _ = call("compare", runs.good, "--published", str(paper))
    assert code == 0
    assert "our weights are random" in out
    assert "protocol.image_size: [128, 128] published, [64, 64] here" in out


# --- what MLflow shows ---


def find(uri, condition, experiment="adgrid"):
    client = MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id], condition)


def test_a_trial_tells_its_axes_numbers_curves_costs_images_and_memory(runs):
    (child,) = find(runs.uri, f"tags.run = '{runs.good}' and tags.method = 'toy_tuned'")
    client, categories = MlflowClient(runs.uri), ["large", "middle", "small"]
    assert child.info.status == "FINISHED"
    axes = {"method": "toy_tuned", "backbone": "toy_resnet", "dataset": "toy_squares", "seed": "0", "param.epochs": "2"}
    assert axes.items() <= child.data.params.items()
    assert {f"image_auroc/{name}" for name in categories} <= child.data.metrics.keys()
    assert {"image_auroc", "fit_seconds", "images_per_second", "peak_rss_mib"} <= child.data.metrics.keys()
    for key, steps in (
        ("loss/tuning/small", [1, 2]),
        ("running_mean/aupro", [1, 2, 3]),
        ("system/peak_rss_mib", [1, 2, 3]),
    ):
        assert sorted(point.step for point in client.get_metric_history(child.info.run_id, key)) == steps
    assert child.data.metrics["running_mean/aupro"] == pytest.approx(child.data.metrics["aupro"])
    (used,) = child.inputs.dataset_inputs
    assert used.dataset.name == "toy_squares"
    assert sorted(json.loads(used.dataset.source)) == categories
    # Equal images, equal digests; another seed of all images reads the same.
    digests = {run.inputs.dataset_inputs[0].dataset.digest for run in find(runs.uri, "tags.kind = 'trial'")}
    assert digests == {used.dataset.digest}


def test_both_runs_share_the_columns_of_their_means_and_saw_the_machine(runs):
    parents = find(runs.uri, "tags.kind = 'run'")
    assert {parent.data.tags[RUN_TAG] for parent in parents} == {runs.good, runs.bad}
    for parent in parents:
        means = {key for key in parent.data.metrics if key.startswith("image_auroc/")}
        methods = ("toy_features", "toy_spoiled", "toy_tuned")
        assert means == {f"image_auroc/toy_squares {method} toy_resnet plain" for method in methods}
        assert "system/cpu_utilization_percentage" in parent.data.metrics
        children = find(runs.uri, f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'")
        assert len(children) == 3


def documented(language):
    """A block of the page that tells people how to find their runs."""
    text = (Path(__file__).parents[1] / "docs" / "mlflow.md").read_text()
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL).group(1)


def test_every_documented_filter_finds_what_it_says(runs):
    parents, trials = find(runs.uri, "tags.kind = 'run'"), find(runs.uri, "tags.kind = 'trial'")
    features = [run for run in trials if run.data.params["method"] == "toy_features"]
    # The names of the page in those of this test, in the order of the page; and what each filter is to find.
    words = {
        "small_five_by_five-1a2b3c4d": runs.good,
        "mvtec_ad": "toy_squares",
        "patchcore resnet18": "toy_features toy_resnet",
        "patchcore": "toy_features",
        "param.coreset_ratio` = '0.1'": "param.scale` = '1'",
        "/bottle": "/large",
        "protocol_id = '1a2b3c4d'": f"protocol_id = '{trials[0].data.tags['protocol_id']}'",
        "0123456789abcdef": trials[0].inputs.dataset_inputs[0].dataset.digest,
    }
    numbers = {run.info.run_id: run.data.metrics for run in trials}
    good = [run for run in trials if numbers[run.info.run_id]["image_auroc"] > 0.9]
    large = [run for run in trials if numbers[run.info.run_id]["image_auroc/large"] > 0.9]
    of_run = [run for run in trials if run.data.tags["run"] == runs.good]
    expected = [
        of_run, parents, features, of_run, trials, good, parents, large, trials, trials, trials, [*trials, *parents], []
    ]  # fmt: skip
    lines = documented("sql").splitlines()
    assert [line.startswith("-- ") for line in lines] == [True, False] * len(expected)
    for query, wanted in zip(lines[1::2], expected, strict=True):
        for word, own in words.items():
            query = query.replace(word, own)
        assert {run.info.run_id for run in find(runs.uri, query)} == {run.info.run_id for run in wanted}, query


def test_matrices_are_attached_as_csv_table_picture_and_page(runs, monkeypatch):
    (parent,) = find(runs.uri, f"tags.`{RUN_TAG}` = '{runs.bad}'")
    client = MlflowClient(runs.uri)
    files = {file.path for file in client.list_artifacts(parent.info.run_id, "matrices")}
    assert {f"matrices/image_auroc.{kind}" for kind in ("csv", "json", "png", "html", "tex", "md")} <= files
    # As the page says.
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", runs.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "adgrid")
    names = {}
    exec(documented("python").replace("small_five_by_five-1a2b3c4d", runs.bad), names)
    table = names["matrix"]
    assert table["method"].tolist() == ["toy_features", "toy_spoiled", "toy_tuned"]
    key = "image_auroc/toy_squares toy_spoiled toy_resnet plain"
    assert table["toy_squares"][1] == pytest.approx(parent.data.metrics[key])


# --- other servers ---


def snapshot(uri, experiment="adgrid"):
    """Everything that a server holds, without its own ids and times and without what the machine did."""
    client, held = MlflowClient(uri), {}
    for run in find(uri, "", experiment):
        params, tags = dict(run.data.params), dict(run.data.tags)
        own = (PARENT_TAG, "adgrid.files")
        points = {
            key: run.data.metrics[key]
            if key.startswith("cells_")
            else sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))
            for key in run.data.metrics
            if not key.startswith("system/") or "peak" in key
        }
        inputs = [(each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs]
        files = sorted(file.path for file in client.list_artifacts(run.info.run_id))
        kept = {key: value for key, value in tags.items() if key not in own}
        held[tags.get("run", ""), run.info.run_name, tags.get(RUN_TAG)] = (params, kept, points, inputs, files)
    return held


def test_a_second_database_gets_everything_and_a_second_time_nothing(runs, call, tmp_path, monkeypatch):
    second = f"sqlite:///{tmp_path}/second.db"
    words = ("mlflow", "sync", runs.good, f"{runs.root}/runs/{runs.bad}", "--tracking-uri", second)
    code, out, _ = call(*words)
    assert code == 0
    assert f"{runs.good}: 9 of 9 cells with a number, up to date in experiment adgrid of {second}" in out
    assert snapshot(second) == snapshot(runs.uri)
    writes = count_writes(monkeypatch)
    assert call(*words) == (0, out, "")
    assert call("mlflow", "sync", runs.good)[0] == 0  # the root's own database has it all as well
    assert writes == []


@pytest.fixture
def server(tmp_path):
    """A real MLflow server on a free port of the loopback address, with its own artifacts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "a"),
    ]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    uri, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 150
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_teams_compare_through_a_server_without_a_common_disk(runs, call, server, monkeypatch, capsys, tmp_path):
    words = ("mlflow", "sync", runs.good, runs.bad, "--tracking-uri", server, "--experiment", "shared")
    assert call(*words)[0] == 0
    assert snapshot(server, "shared") == snapshot(runs.uri)
    writes = count_writes(monkeypatch)
    assert call(*words)[0] == 0
    assert writes == []
    here = call("compare", runs.good, runs.bad)[1]
    board = call("leaderboard", runs.good, runs.bad)[1]
    # Elsewhere there is nothing but the address.
    elsewhere = ["--tracking-uri", server, "--root", str(tmp_path / "nothing"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["compare", f"mlflow:{runs.good}", f"mlflow:{runs.bad}", *elsewhere]) == 0
    assert " ".join(capsys.readouterr().out.split()) == here
    assert main(["leaderboard", "--experiment", "shared", *elsewhere]) == 0
    assert " ".join(capsys.readouterr().out.split()) == board
    assert not (tmp_path / "nothing").exists()


def test_an_outage_is_told_and_caught_up_by_a_sync(runs, call):
    code, _, errors = call("mlflow", "sync", runs.good, "--tracking-uri", "http://127.0.0.1:9")
    assert code == 2
    assert "nothing is lost, give the command once more" in errors
    code, _, errors = call("mlflow", "sync", f"{runs.good}x")
    assert code == 2
    assert f"did you mean '{runs.good}'" in errors
