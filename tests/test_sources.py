"""Rows found by run id, run folder, storage root or MLflow; and the commands that read them."""

import json

import mlflow
import pytest
from mlflow import MlflowClient
from scored_rows import Scored
from toy_rows import toy_row

from harness.cli import main
from harness.contracts import AdgridError
from harness.mirrored import read_mirrored_experiment, read_mirrored_run
from harness.run_folder import read_run
from harness.run_report import remake_report
from harness.sources import keep_rows, name_apart, open_any, open_run, parse_conditions
from harness.store import Store
from harness.tracking import PARENT_TAG, Mirror


def finish(root, run_id, shift, tracking_uri=None, **changes):
    """A finished run of six cells in a root, mirrored if there is a URI."""
    store, scored = Store(str(root)), Scored()
    rows = [
        scored(shift, run_id, category=name, method=method, **changes)
        for method in ("padim", "patchcore")
        for name in ("bolt", "nut", "screw")
    ]
    for row in rows:
        scores = scored.scores[row.cell_id]
        paths = [f"/data/parts/{row.category}/test/{image}" for image in scores.images]
        store.publish_row(row)
        store.publish_scores(
            row.cell_id, {"path": paths, "label": scores.label.tolist(), "image_score": scores.score.tolist()}
        )
    trials = [{"trial_id": row.trial_id, "tuned": None, "cell_ids": [row.cell_id]} for row in rows]
    record = {"name": "toys", "command": "adgrid run toys.yaml", "num_expected": len(rows), "trials": trials}
    store.publish(f"runs/{run_id}/plan.json", json.dumps({**record, "samples": [], "studies": []}).encode())
    files = remake_report(store, read_run(store, run_id))
    if tracking_uri is not None:
        Mirror(tracking_uri, "tests").sync("toys", run_id, rows, files, finished=True)
    return rows


class Place:
    """Two runs in one root, mirrored to one database."""

    def __init__(self, folder):
        self.root = folder / "root"
        self.uri = f"sqlite:///{folder}/elsewhere/mlflow.db"
        self.old = finish(self.root, "old-1", 1.0, self.uri)
        self.new = finish(self.root, "new-1", 1.8, self.uri)
        self.client = MlflowClient(self.uri)
        self.experiment = self.client.get_experiment_by_name("tests").experiment_id

    def runs(self, condition=""):
        return self.client.search_runs([self.experiment], condition)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def call(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        code = main([*words, "--root", str(place.root)])
        shown = capsys.readouterr()
        return code, " ".join(shown.out.split()), " ".join(shown.err.split())

    return run


# --- on disk ---


def test_a_run_is_found_by_its_id_and_by_its_folder(place):
    for word, root in (("old-1", str(place.root)), (f"{place.root}/runs/old-1/", "nowhere")):
        source = open_run(word, root)
        assert (source.name, list(source.rows)) == ("old-1", place.old)
        assert source.load_scores(place.old[0].cell_id).images[0] == "bad/000.png"
        assert source.load_scores("absent") is None


def test_a_root_stands_for_all_its_rows(place):
    assert len(open_any(str(place.root), "results").rows) == 12
    assert len(open_any("old-1", str(place.root)).rows) == 6


def test_what_is_not_there_is_told(place, tmp_path):
    with pytest.raises(AdgridError, match=r"no such run.*did you mean 'old-1'"):
        open_run("old-2", str(place.root))
    with pytest.raises(AdgridError, match="no such folder"):
        open_run("old-1", str(tmp_path / "absent"))
    with pytest.raises(AdgridError, match="no rows there"):
        open_any(str(tmp_path), "results")
    with pytest.raises(AdgridError, match="name the server with --tracking-uri"):
        open_run("mlflow:old-1", str(tmp_path))
    assert not (tmp_path / "absent").exists()


def test_equal_names_are_told_apart(place):
    source = open_run("old-1", str(place.root))
    assert list(name_apart([source, source, source])) == ["old-1", "old-1 (2)", "old-1 (3)"]


def test_conditions_narrow_rows_by_every_axis():
    rows = [toy_row(), toy_row(method="draem", backbone=None), toy_row(shots=8, params={"ratio": 0.5})]

    def kept(*texts):
        return [rows.index(row) for row in keep_rows(rows, parse_conditions(texts))]

    assert kept() == [0, 1, 2]
    assert kept("backbone=none") == [1]
    assert kept("shots=all", "method=padim,draem") == [0, 1]
    assert kept("params.ratio=0.5") == [2]
    with pytest.raises(AdgridError, match="they have padim, draem"):
        kept("method=cflow")
    for text, expected in (("method", "write axis=value"), ("metod=padim", "did you mean 'method'")):
        with pytest.raises(AdgridError, match=expected):
            kept(text)


# --- in MLflow ---


def test_rows_and_scores_come_back_from_mlflow_alone(place):
    (parent,) = place.runs("tags.`adgrid.run_id` = 'new-1'")
    for word in (parent.info.run_id, "new-1"):
        found = read_mirrored_run(place.uri, word)
        assert (found.name, list(found.rows)) == ("new-1", place.new)
        assert found.scores.keys() == {row.cell_id for row in place.new}


def test_a_run_of_a_trial_stands_for_its_rows_alone(place):
    (parent,) = place.runs("tags.`adgrid.run_id` = 'new-1'")
    child = next(
        run for run in place.runs(f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'") if run.data.tags["method"] == "padim"
    )
    found = read_mirrored_run(place.uri, child.info.run_id)
    assert found.name.startswith("padim · resnet18")
    assert {row.method for row in found.rows} == {"padim"}
    assert len({row.trial_id for row in found.rows}) == 1


def test_an_experiment_gives_every_run_that_has_rows(place):
    Mirror(place.uri, "tests").sync("toys", "unfinished", place.old[:1])
    assert [run.name for run in read_mirrored_experiment(place.uri, "tests")] == ["old-1", "new-1"]


def test_what_mlflow_does_not_have_is_told(place, tmp_path):
    Mirror(place.uri, "tests").sync("toys", "unfinished", place.old[:1])
    with pytest.raises(AdgridError, match="not attached to this run"):
        read_mirrored_run(place.uri, "unfinished")
    for word in ("absent", "0" * 32):
        with pytest.raises(AdgridError, match="has no such run"):
            read_mirrored_run(place.uri, word)
    with pytest.raises(AdgridError, match=r"no such experiment; it has .*tests"):
        read_mirrored_experiment(place.uri, "absent")
    with pytest.raises(AdgridError, match="there is no file"):
        read_mirrored_run(f"sqlite:///{tmp_path}/absent.db", "new-1")
    with pytest.raises(AdgridError, match="MLflow cannot be read"):
        read_mirrored_run("http://127.0.0.1:9", "new-1")
    assert mlflow.active_run() is None


# --- the commands ---


def test_two_runs_are_compared_from_disk_and_from_mlflow_alike(call, place):
    code, out, _ = call("compare", "old-1", "new-1")
    assert code == 0
    assert "Image AUROC [%], new-1 against old-1" in out
    assert "better" in out
    mirrored = call("compare", "mlflow:old-1", "mlflow:new-1", "--tracking-uri", place.uri)[1]
    assert mirrored == out
    assert call("compare", "mlflow:old-1", "new-1", "--tracking-uri", place.uri)[1] == out


def test_one_axis_of_one_run_is_compared(call):
    code, out, _ = call("compare", "old-1", "--axis", "method", "--metric", "image_ap", "--where", "category=bolt,nut")
    assert code == 0
    assert "Image AP [%], method patchcore against padim" in out
    assert "everything, 2 pairs" in out


def test_the_gate_decides_by_its_exit_code(call):
    code, out, _ = call("compare", "old-1", "new-1", "--fail-if-worse", "0.005")
    assert code == 0
    assert "no mean lost more than 0.5 points" in out
    code, out, _ = call("compare", "new-1", "old-1", "--fail-if-worse", "0.005")
    assert code == 1
    assert "worse: image_auroc, old-1 · padim · resnet18 · parts" in out


def test_a_comparison_is_written_into_a_folder(call, tmp_path):
    code, out, _ = call("compare", "old-1", "new-1", "--interval", "bootstrap", "--out", str(tmp_path / "out"))
    assert code == 0
    assert "5 files in" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"compare.md", "differences.csv"}


def test_a_run_is_held_against_published_numbers(call, tmp_path):
    path = tmp_path / "paper.csv"
    path.write_text("method,backbone,dataset,image_auroc\npadim,resnet18,parts,0.99\nother,none,parts,0.5\n")
    code, out, _ = call(
        "compare", "old-1", "--published", str(path), "--published", "all", "--out", str(tmp_path / "out")
    )
    assert code == 0
    assert "not reproduced" in out
    assert (tmp_path / "out" / "published.csv").is_file()
    code, out, _ = call("compare", "old-1", "--published", str(path), "--fail-if-worse", "0.01")
    assert code == 1
    assert "worse: paper, Image AUROC" in out
    assert call("compare", "old-1", "--published", "padim", "--fail-if-worse", "0.01")[0] == 1


def test_the_leaderboard_reads_roots_runs_and_experiments(call, place, tmp_path):
    code, out, _ = call("leaderboard", "old-1", "--where", "method=patchcore")
    assert code == 0
    assert "1 patchcore resnet18" in out
    assert "padim" not in out
    assert call("leaderboard")[1] == call("leaderboard", str(place.root))[1]
    whole = call("leaderboard", "old-1", "new-1")[1]
    assert call("leaderboard", "--experiment", "tests", "--tracking-uri", place.uri)[1] == whole
    call("leaderboard", "--out", str(tmp_path / "board.csv"))
    assert (tmp_path / "board.csv").read_text().startswith("metric,protocol_id,place,line")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compare", "old-1"], "name a second run"),
        (["compare", "old-1", "new-1", "--confidence", "95"], "must lie between 0 and 1"),
        (["compare", "old-1", "--published", "padin"], "did you mean 'padim'"),
        (["compare", "old-1", "new-1", "--where", "method=x"], "no such rows"),
        (["leaderboard", "--metric", "auroc"], "unknown metric"),
    ],
)
def test_bad_input_is_one_message(call, words, expected):
    code, out, errors = call(*words)
    assert code == 2
    assert expected in errors
    assert "Traceback" not in out + errors
