import dataclasses
import json
import shlex
import socket
import sys

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from toy_rows import toy_row

from harness.contracts import AdgridError, DatasetRef, EvaluationProtocol, Resources, Trial
from harness.mirror_values import metric_key
from harness.notes import Loss
from harness.report import build_matrices, rows_frame, write_report
from harness.tracking import CELLS_TAG, PARENT_TAG, RUN_TAG, TRIAL_TAG, Mirror, TrackingUnavailable, ui_command

EXPERIMENT = "tests of the mirror"


class Server:
    """One database for all tests of this file; a run id of its own keeps each test apart."""

    def __init__(self, folder):
        self.folder = folder
        self.uri = f"sqlite:///{folder}/deep/mlflow.db"
        self.mirror().sync("warm-up", "warm-up", [])
        self.client = MlflowClient(self.uri)

    def mirror(self):
        return Mirror(self.uri, EXPERIMENT)

    @property
    def experiment(self):
        return self.client.get_experiment_by_name(EXPERIMENT)

    def parent(self, run_id):
        (run,) = self.client.search_runs([self.experiment.experiment_id], f"tags.`{RUN_TAG}` = '{run_id}'")
        return run

    def children(self, run_id):
        parent = self.parent(run_id).info.run_id
        return self.client.search_runs(
            [self.experiment.experiment_id], f"tags.`{PARENT_TAG}` = '{parent}'", order_by=["attributes.start_time"]
        )

    def snapshot(self, run_id):
        """Everything that a second identical sync must not change: runs, and every point of every metric."""
        runs = [self.parent(run_id), *self.children(run_id)]
        return [
            (
                run.info.run_id,
                run.info.status,
                run.info.end_time,
                run.data.params,
                run.data.tags,
                {key: len(self.client.get_metric_history(run.info.run_id, key)) for key in run.data.metrics},
            )
            for run in runs
        ]


def no_point_twice(snapshot):
    """Of two categories a curve over categories has two points, every other number one."""
    curves = ("running_mean/", "system/")
    return all(count == 1 + key.startswith(curves) for *_, counts in snapshot for key, count in counts.items())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    return Server(tmp_path_factory.mktemp("mlflow"))


def two_trials():
    names = ("bolt", "nut")
    return [
        *(toy_row(value, category=name, pixel=0.5) for value, name in zip((0.8, 0.9), names, strict=True)),
        *(toy_row(value, method="patchcore", category=name) for value, name in zip((0.6, 1.0), names, strict=True)),
    ]


def planned(rows, categories=("bolt", "nut")):
    return Trial(
        trial_id=rows[0].trial_id,
        method=rows[0].method,
        params={},
        backbone="resnet18",
        layers=(),
        weights="auto",
        representation="plain",
        dataset=DatasetRef(name="parts", layout="folder"),
        categories=categories,
        shots=None,
        seed=0,
        protocol=EvaluationProtocol(),
        resources=Resources(),
    )


def expected(rows, categories=("bolt", "nut")):
    return {rows[0].trial_id: categories}


# --- what a run shows ---


def test_a_run_is_one_parent_with_a_child_per_trial(server):
    server.mirror().sync("toys", "shape", two_trials(), params={"space": "toys"}, finished=True)
    parent, children = server.parent("shape"), server.children("shape")
    assert (parent.info.run_name, parent.info.status, len(children)) == ("toys", "FINISHED", 2)
    assert parent.data.params == {"space": "toys"}
    assert {child.data.tags[TRIAL_TAG] for child in children} == {row.trial_id for row in two_trials()}
    assert [child.info.run_name for child in children] == [
        "padim · resnet18 · parts · seed 0",
        "patchcore · resnet18 · parts · seed 0",
    ]
    assert all(child.info.end_time for child in children)


def test_a_child_holds_every_axis_metric_and_cost(server):
    server.mirror().sync("toys", "child", two_trials(), finished=True)
    child = server.children("child")[0].data
    assert child.metrics["image_auroc/bolt"] == 0.8
    assert child.metrics["image_auroc/nut"] == 0.9
    assert child.metrics["image_auroc"] == pytest.approx(0.85)
    assert child.metrics["pixel_auroc"] == 0.5
    assert (child.metrics["fit_seconds"], child.metrics["images_per_second"], child.metrics["peak_rss_mib"]) == (
        4,
        40,
        700,
    )
    axes = {"method": "padim", "backbone": "resnet18", "layers": "layer2+layer3", "shots": "all", "seed": "0"}
    assert axes.items() <= child.params.items()
    assert (child.params["param.ratio"], child.params["protocol.aupro_limit"]) == ("0.1", "0.3")
    tags = {"method": "padim", "backbone": "resnet18", "dataset": "parts", "status": "ok"}
    assert (tags | {"mlflow.source.git.commit": "abc1234"}).items() <= child.tags.items()


def test_a_loss_is_a_curve_with_a_point_per_epoch(server):
    row = toy_row(0.8, curves={"flow": (3.0, 2.5, 2.5)})
    server.mirror().sync("toys", "curve", [row], finished=True)
    server.mirror().sync("toys", "curve", [row], finished=True)  # again, which writes nothing
    (child,) = server.children("curve")
    history = server.client.get_metric_history(child.info.run_id, "loss/flow/bolt")
    assert [(point.step, point.value) for point in history] == [(1, 3.0), (2, 2.5), (3, 2.5)]


def test_losses_are_there_while_a_trial_is_trained_and_no_point_twice(server):
    row = toy_row(0.8, curves={"flow": (3.0, 2.5, 2.25, 2.0)})
    trial = dataclasses.replace(planned([row], ("bolt",)), method=row.method)
    mirror = server.mirror()

    def points():
        (child,) = server.children("live")
        history = server.client.get_metric_history(child.info.run_id, "loss/flow/bolt")
        return child.info, sorted((point.step, point.value) for point in history)

    for losses in ([(1, 3.0)], [(2, 2.5)]):
        mirror.log_losses("toys", "live", {row.trial_id: (trial, [Loss(("bolt",), "flow", *one) for one in losses])})
    info, found = points()
    assert (info.run_name, info.status) == ("padim · resnet18 · parts · seed 0", "RUNNING")
    assert found == [(1, 3.0), (2, 2.5)]
    # The row comes to another driver: it writes what is missing, and later nothing.
    for _ in range(2):
        server.mirror().sync("toys", "live", [row], finished=True)
        info, found = points()
        assert info.status == "FINISHED"
        assert found == [(1, 3.0), (2, 2.5), (3, 2.25), (4, 2.0)]


def test_the_mean_so_far_and_the_peak_of_memory_are_curves_over_categories(server):
    values = {"bolt": 0.6, "nut": 1.0, "pin": 0.8}
    rows = [
        toy_row(
            value,
            category=name,
            pixel=None if name == "nut" else 0.5,
            provenance={"finished_at": f"2026-01-0{day}"},
            costs={"peak_rss_mib": 100.0 * day},
        )
        for day, (name, value) in enumerate(values.items(), start=1)
    ]
    failed = toy_row(None, category="pin")
    for portion in ([rows[1], rows[0]], [failed], [rows[0]], [rows[2]], rows):
        server.mirror().sync("toys", "means so far", portion, finished=portion is rows)
    (child,) = server.children("means so far")

    def points(key):
        history = server.client.get_metric_history(child.info.run_id, key)
        return [(point.step, pytest.approx(point.value)) for point in sorted(history, key=lambda point: point.step)]

    assert points("running_mean/image_auroc") == [(1, 0.6), (2, 0.8), (3, 0.8)]
    assert points("running_mean/pixel_auroc") == [(1, 0.5)]  # not over what one category lacks
    assert points("system/peak_rss_mib") == [(1, 100), (2, 200), (3, 300)]
    server.mirror().sync("toys", "single", [toy_row(0.8)], finished=True, planned=expected([toy_row()], ("bolt",)))
    (child,) = server.children("single")
    assert not any(key.startswith("running_mean/") for key in child.data.metrics)


def test_the_images_of_a_trial_are_a_dataset_with_a_fingerprint(server, monkeypatch):
    def rows(images="a"):
        facts = {"images_fingerprint": images, "truth_fingerprint": "t"}
        return [toy_row(0.8, category=name, provenance=facts) for name in ("bolt", "nut")]

    def inputs(run_id):
        (child,) = server.children(run_id)
        return {each.dataset.digest: each for each in child.inputs.dataset_inputs}

    server.mirror().sync("toys", "inputs", rows()[:1], planned=expected(rows()))
    assert inputs("inputs") == {}  # half of the images are no dataset
    server.mirror().sync("toys", "inputs", rows(), finished=True)
    ((digest, found),) = inputs("inputs").items()
    assert found.dataset.name == "parts"
    assert json.loads(found.dataset.source)["nut"] == {"images": "a", "ground_truth": "t"}
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training and test images")]
    again = server.mirror()
    writes = count_writes(monkeypatch)
    again.sync("toys", "inputs", rows(), finished=True)
    assert writes == []
    server.mirror().sync("toys", "same images", rows(), finished=True)
    server.mirror().sync("toys", "other images", rows("b"), finished=True)
    assert inputs("same images").keys() == {digest}
    assert inputs("other images").keys().isdisjoint({digest})
    server.mirror().sync("toys", "no fingerprint", two_trials()[:2], finished=True)
    assert inputs("no fingerprint") == {}


def test_a_metric_without_masks_is_not_there(server):
    server.mirror().sync("toys", "masks", two_trials(), finished=True)
    assert not any(key.startswith(("pixel", "aupro")) for key in server.children("masks")[1].data.metrics)
    assert "pixel_auroc/parts padim resnet18 plain" in server.parent("masks").data.metrics
    assert "pixel_auroc/parts patchcore resnet18 plain" not in server.parent("masks").data.metrics


def test_the_parent_holds_the_numbers_of_the_matrices(server):
    rows = [
        *two_trials(),
        toy_row(0.7, method="draem", backbone=None),
        toy_row(0.75, method="draem", backbone=None, category="nut"),
    ]
    server.mirror().sync("toys", "means", rows, finished=True)
    metrics = server.parent("means").data.metrics
    (matrix,) = build_matrices(rows_frame(rows), ["image_auroc"])
    assert [
        metrics[f"image_auroc/parts {name}"]
        for name in ("padim resnet18 plain", "patchcore resnet18 plain", "draem none none")
    ] == matrix.numbers
    assert (metrics["cells_ok"], metrics["cells_without_number"]) == (6, 0)


def test_swept_parameters_and_protocols_keep_their_means_apart(server):
    rows = [toy_row(0.8, params={"ratio": 0.1}), toy_row(0.9, params={"ratio": 0.25})]
    server.mirror().sync("toys", "sweep", rows, finished=True)
    metrics = server.parent("sweep").data.metrics
    assert metrics["image_auroc/parts padim resnet18 plain ratio:0.1"] == 0.8
    assert metrics["image_auroc/parts padim resnet18 plain ratio:0.25"] == 0.9
    other = toy_row(0.5, protocol={"aupro_limit": 0.05})
    server.mirror().sync("toys", "protocols", [toy_row(0.8), other], finished=True)
    metrics = server.parent("protocols").data.metrics
    assert metrics[f"image_auroc/protocol {other.protocol_id} parts padim resnet18 plain"] == 0.5


def test_stamps_are_a_tag(server):
    server.mirror().sync("toys", "stamps", [toy_row(0.8, stamps=("random weights",))], finished=True)
    assert server.children("stamps")[0].data.tags["stamps"] == "random weights"
    assert server.parent("stamps").data.tags["stamps"] == "random weights"


# --- again and again ---


def count_writes(monkeypatch):
    """The names of the calls by which a mirror writes, as they happen."""
    calls = []
    for name in ("create_run", "log_batch", "log_inputs", "update_run", "set_terminated", "log_artifact"):
        original = getattr(MlflowClient, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            calls.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(MlflowClient, name, counted)
    return calls


def test_a_second_sync_writes_nothing(server, tmp_path, monkeypatch):
    rows = two_trials()
    files = write_report(tmp_path, rows, title="t", command="c")
    server.mirror().sync("toys", "twice", rows, files, {"space": "toys"}, True)
    before = server.snapshot("twice")
    again = server.mirror()
    again.sync("toys", "twice", rows, files, {"space": "toys"}, True)
    writes = count_writes(monkeypatch)
    again.sync("toys", "twice", rows, files, {"space": "toys"}, True)
    assert writes == []
    again.sync("toys", "twice", rows[:1], finished=False)
    assert server.snapshot("twice") == before
    assert no_point_twice(before)


def test_rows_may_come_one_by_one_from_several_processes(server):
    first, second = two_trials()[:2]
    server.mirror().sync("toys", "portions", [first])
    (child,) = server.children("portions")
    assert child.info.status == "RUNNING"
    assert "image_auroc" not in child.data.metrics
    server.mirror().sync("toys", "portions", [second])
    server.mirror().sync("toys", "portions", [first, second], finished=True)
    (child,) = server.children("portions")
    assert child.info.status == "FINISHED"
    assert child.data.metrics["image_auroc"] == pytest.approx(0.85)
    assert len(server.client.get_metric_history(child.info.run_id, "image_auroc")) == 1


def test_a_planned_trial_is_settled_when_its_last_category_arrives(server):
    first, second = two_trials()[:2]
    mirror = server.mirror()
    mirror.sync("toys", "plan", [first], planned=expected([first]))
    assert server.children("plan")[0].data.tags["status"] == "running"
    mirror.sync("toys", "plan", [second], planned=expected([first]))
    (child,) = server.children("plan")
    assert (child.info.status, child.data.tags["status"]) == ("FINISHED", "ok")
    assert child.data.metrics["image_auroc"] == pytest.approx(0.85)
    assert server.parent("plan").info.status == "RUNNING"


def test_a_trial_that_was_cut_short_is_not_called_finished(server):
    row = toy_row(0.8)
    server.mirror().sync("toys", "cut", [row], finished=True, planned=expected([row]))
    (child,) = server.children("cut")
    assert (child.info.status, child.data.tags["status"]) == ("KILLED", "incomplete")
    assert "image_auroc" not in child.data.metrics


def test_a_run_that_lacks_planned_cells_is_not_called_finished(server):
    for cells, expected_state in (("3", ("KILLED", "incomplete")), ("2", ("FINISHED", "ok"))):
        server.mirror().sync("toys", f"of {cells}", two_trials()[:2], params={"cells": cells}, finished=True)
        parent = server.parent(f"of {cells}")
        assert (parent.info.status, parent.data.tags["status"]) == expected_state


def test_a_failed_row_fails_its_run_and_gives_no_mean(server):
    rows = [toy_row(0.8), toy_row(None, category="nut")]
    server.mirror().sync("toys", "failed", rows, finished=True)
    (child,), parent = server.children("failed"), server.parent("failed")
    assert (child.info.status, child.data.tags["status"]) == ("FAILED", "failed")
    assert child.data.tags[CELLS_TAG] == '{"bolt": "ok", "nut": "failed"}'
    assert "image_auroc" not in child.data.metrics
    assert child.data.metrics["image_auroc/bolt"] == 0.8
    assert parent.info.status == "FAILED"
    assert not any(key.startswith("image_auroc") for key in parent.data.metrics)


def test_a_repaired_cell_finishes_its_run(server):
    good, bad = toy_row(0.8), toy_row(None, category="nut")
    server.mirror().sync("toys", "repaired", [good, bad], finished=True)
    mirror = server.mirror()
    mirror.sync("toys", "repaired", [toy_row(0.9, category="nut")])
    assert server.children("repaired")[0].info.status == server.parent("repaired").info.status == "RUNNING"
    mirror.sync("toys", "repaired", [good, toy_row(0.9, category="nut")], finished=True)
    (child,) = server.children("repaired")
    assert (child.info.status, child.data.tags["status"]) == ("FINISHED", "ok")
    assert child.data.metrics["image_auroc"] == pytest.approx(0.85)
    assert server.parent("repaired").data.metrics["cells_without_number"] == 0


def test_a_failed_row_never_replaces_a_finished_one(server):
    server.mirror().sync("toys", "keeps", [toy_row(0.8)], finished=True)
    before = server.snapshot("keeps")
    server.mirror().sync("toys", "keeps", [toy_row(None)])
    assert server.snapshot("keeps") == before


def test_a_stopped_trial_is_neither_finished_nor_failed(server):
    rows = [toy_row(0.8), toy_row(None, category="nut", status="stopped", reason="by the scheduler")]
    server.mirror().sync("toys", "stopped", rows, finished=True)
    (child,) = server.children("stopped")
    assert (child.info.status, child.data.tags["status"]) == ("KILLED", "stopped")


def test_a_changed_number_is_a_new_point_not_a_new_run(server):
    server.mirror().sync("toys", "changed", [toy_row(0.8)], finished=True)
    server.mirror().sync("toys", "changed", [toy_row(0.7, cell_id="rescored")], finished=True)
    (child,) = server.children("changed")
    assert child.data.metrics["image_auroc"] == 0.7
    history = server.client.get_metric_history(child.info.run_id, "image_auroc/bolt")
    assert [point.value for point in history] == [0.8, 0.7]


def test_runs_with_the_same_trials_do_not_share_children(server):
    for run_id in ("one", "other"):
        server.mirror().sync("toys", run_id, two_trials(), finished=True)
    ids = [{child.info.run_id for child in server.children(run_id)} for run_id in ("one", "other")]
    assert not ids[0] & ids[1]


def test_a_trial_is_mirrored_in_a_handful_of_requests(server, monkeypatch):
    rows = [
        toy_row(0.9, method=f"m{method}", backbone=f"b{backbone}", category=name, pixel=0.8)
        for method in range(3)
        for backbone in range(4)
        for name in ("bolt", "nut", "pin")
    ]
    mirror = server.mirror()
    mirror.sync("toys", "speed", [])
    writes = count_writes(monkeypatch)
    mirror.sync("toys", "speed", rows, finished=True)
    assert len(writes) <= 5 * (12 + 1), writes
    assert len(server.children("speed")) == 12


def test_more_values_than_one_request_may_hold_all_arrive(server):
    rows = [
        toy_row(0.9, category=f"category {number}", params={f"p{n}": n for n in range(150)}) for number in range(250)
    ]
    server.mirror().sync("toys", "many", rows, finished=True)
    (child,) = server.children("many")
    assert len([key for key in child.data.metrics if key.startswith("image_auroc/")]) == 250
    assert child.data.params["param.p149"] == "149"


# --- files ---


def test_the_report_lies_on_the_parent_under_its_own_names(server, tmp_path):
    rows = two_trials()
    files = write_report(tmp_path, rows, title="t", command="c")
    server.mirror().sync("toys", "files", rows, files, finished=True)
    run_id = server.parent("files").info.run_id

    def listed(path=None):
        for entry in server.client.list_artifacts(run_id, path):
            if entry.is_dir:
                yield from listed(entry.path)
            else:
                yield entry.path

    assert set(listed()) == {path.relative_to(tmp_path).as_posix() for path in files}


def test_a_matrix_loads_as_a_table_and_its_rows_are_not_doubled(server, tmp_path, monkeypatch):
    rows = two_trials()
    mirror = server.mirror()
    for values in (rows, [*rows, toy_row(None, method="draem", backbone=None)]):
        files = write_report(tmp_path, values, title="t", command="c")
        mirror.sync("toys", "tables", values, files, finished=True)
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # `load_table` of a client looks for its runs at the process's own address.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    table = server.client.load_table(
        server.experiment.experiment_id, "matrices/image_auroc.json", [server.parent("tables").info.run_id]
    )
    assert table["method"].tolist() == ["padim", "patchcore", "draem"]
    assert table["parts"].tolist()[:2] == pytest.approx([0.85, 0.8])
    assert pd.isna(table["parts"].iloc[2])


def test_everything_lies_beside_the_database(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mirror = Mirror(server.uri.replace(str(server.folder), "."), EXPERIMENT)
    assert mirror.tracking_uri == f"sqlite:///{tmp_path}/deep/mlflow.db"
    location = server.experiment.artifact_location
    assert location == (server.folder / "deep" / "mlartifacts" / "tests_of_the_mirror").as_uri()
    server.mirror().sync("toys", "place", [toy_row()], finished=True)
    assert list(tmp_path.iterdir()) == []


# --- when MLflow is not there ---


def test_a_server_that_is_down_is_reported_without_the_password():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mirror = Mirror(f"http://someone:secret@127.0.0.1:{port}", EXPERIMENT)
    with pytest.raises(TrackingUnavailable, match=rf"^http://127.0.0.1:{port}: ") as caught:
        mirror.sync("toys", "down", two_trials())
    assert "secret" not in str(caught.value)


def test_an_outage_in_the_middle_is_caught_up_without_doubling(server, monkeypatch):
    rows = two_trials()
    mirror = server.mirror()
    calls = []

    def fail_late(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise mlflow.exceptions.MlflowException("gone")
        return log_batch(self, *arguments, **options)

    log_batch = MlflowClient.log_batch
    monkeypatch.setattr(MlflowClient, "log_batch", fail_late)
    with pytest.raises(TrackingUnavailable, match="gone"):
        mirror.sync("toys", "outage", rows, finished=True)
    monkeypatch.undo()
    mirror.sync("toys", "outage", rows, finished=True)
    snapshot = server.snapshot("outage")
    assert [status for _, status, *_ in snapshot] == ["FINISHED"] * 3
    assert no_point_twice(snapshot)


def test_a_database_that_is_none_is_reported(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database, but long enough to be taken for one" * 20)
    with pytest.raises(TrackingUnavailable, match="not a database"):
        Mirror(f"sqlite:///{tmp_path}/mlflow.db", EXPERIMENT).sync("toys", "x", [])


def test_a_deleted_experiment_is_reported(server):
    mirror = Mirror(server.uri, "deleted one")
    mirror.sync("toys", "x", [])
    server.client.delete_experiment(server.client.get_experiment_by_name("deleted one").experiment_id)
    with pytest.raises(TrackingUnavailable, match="'deleted one' is deleted; restore it"):
        Mirror(server.uri, "deleted one").sync("toys", "x", [])


def test_a_database_without_a_file_is_refused():
    with pytest.raises(AdgridError, match=r"--tracking-uri sqlite://: names no file"):
        Mirror("sqlite://", EXPERIMENT)


# --- small things ---


def test_keys_hold_only_what_mlflow_takes():
    assert metric_key("image_auroc/my data (v2)/[x]") == "image_auroc/my data _v2_/_x_"
    assert metric_key("a//../.b/ratio=0.1") == "a/_/_/.b/ratio:0.1"
    long = [metric_key("image_auroc/" + "x" * 300 + end) for end in "ab"]
    assert [len(key) for key in long] == [250, 250]
    assert long[0] != long[1]


def test_odd_names_are_mirrored(server):
    row = toy_row(0.8, dataset="hub:timm/x (y)", category="a//b", params={"list": [1, None], "none": None})
    row = dataclasses.replace(row, params={**row.params, "long": "x" * 9000})
    server.mirror().sync("it's", "odd's run", [row], finished=True)
    (run,) = [
        run
        for run in server.client.search_runs([server.experiment.experiment_id], "tags.method = 'padim'")
        if run.data.params["dataset"] == "hub:timm/x (y)"
    ]
    assert run.data.metrics["image_auroc"] == 0.8
    assert run.data.params["param.none"] == "none"
    assert len(run.data.params["param.long"]) == 6000


def test_nothing_is_printed(server, capfd):
    Mirror(f"sqlite:///{server.folder}/fresh.db", EXPERIMENT).sync("toys", "quiet", two_trials(), finished=True)
    assert capfd.readouterr() == ("", "")


def test_the_ui_command_opens_what_was_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(ui_command("sqlite:///my db/mlflow.db"))
    assert words == ["mlflow", "ui", "--backend-store-uri", f"sqlite:///{tmp_path}/my db/mlflow.db"]
    assert shlex.split(ui_command("http://host:5000")) == [sys.executable, "-m", "webbrowser", "http://host:5000"]
