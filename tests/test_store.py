import dataclasses
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
import torch

from harness.contracts import AdgridError, ResultRow
from harness.quantisation import MapError, quantise
from harness.store import Store, StoredPrediction, StoreError


def make_row(cell_id="c1", status="ok", time="2026-01-01", **changes):
    row = ResultRow(
        cell_id=cell_id,
        prediction_id="p1",
        trial_id="t1",
        status=status,
        method="padim",
        backbone=None,
        layers=("a", "b"),
        representation="plain",
        dataset="d",
        category="x",
        shots=None,
        seed=0,
        params={"ratio": 0.1},
        protocol={"image_size": [224, 224]},
        protocol_id="12345678",
        metrics={"image_auroc": 0.1 + 0.2},
        provenance={"finished_at": time},
    )
    return dataclasses.replace(row, **changes)


@pytest.fixture(params=["path", "uri"])
def store(request, tmp_path):
    return Store(str(tmp_path / "root") if request.param == "path" else f"file://{tmp_path}/root")


def test_a_row_comes_back_as_it_went_in(store):
    row = make_row(stamps=("random weights",), reason="", costs={"fit_seconds": 1.5}, shots=4)
    store.publish_row(row)
    assert store.load_rows() == {"c1": row}
    assert store.load_rows(["other"]) == {}


def test_a_failed_row_never_replaces_a_finished_one(store):
    store.publish_row(make_row(time="2026-01-01"))
    store.publish_row(make_row(status="failed", time="2026-02-01", reason="later"))
    assert store.load_rows()["c1"].status == "ok"


def test_of_two_failures_the_newer_counts(store):
    store.publish_row(make_row(status="failed", time="2026-01-01", reason="old"))
    store.publish_row(make_row(status="skipped", time="2026-02-01", reason="new"))
    assert store.load_rows()["c1"].reason == "new"


def test_folding_keeps_every_row_and_leaves_one_file(store):
    rows = [make_row(f"c{i}", status="ok" if i % 2 else "failed") for i in range(10)]
    for row in rows:
        store.publish_row(row)
    assert store.fold_rows(at_least=20) == 0
    assert store.fold_rows(at_least=2) == 10
    assert store.names("rows/new") == []
    assert len(store.names("rows/segments")) == 1
    assert store.load_rows() == {row.cell_id: row for row in rows}
    store.publish_row(make_row("c0", time="2026-03-01"))
    assert store.load_rows()["c0"].status == "ok"


def test_predictions_come_back_bit_for_bit(store):
    maps = quantise(np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32), MapError(-9.0, 1e-3, 1e-4))
    for scores in (None, np.array([1, 2, 3], np.float32)):
        stored = StoredPrediction(paths=("a", "b", "c"), maps=maps, image_scores=scores, facts={"costs": {"x": 1}})
        store.publish_prediction("p", stored)
        back = store.load_prediction("p")
        assert back.paths == stored.paths
        assert back.facts == stored.facts
        np.testing.assert_array_equal(back.anomaly_maps, stored.anomaly_maps)
        assert back.maps.scaled_error == maps.scaled_error
        if scores is None:
            assert back.image_scores is None
        else:
            np.testing.assert_array_equal(back.image_scores, scores)
    assert store.load_prediction("absent") is None


def test_predictions_that_were_not_used_for_longest_make_room(store):
    maps = quantise(np.zeros((2, 30, 30), np.float32))
    for place, name in enumerate("abc"):
        store.publish_prediction(name, StoredPrediction(paths=("x", "y"), maps=maps, image_scores=None, facts={}))
        os.utime(store.local_path(f"predictions/{name}.arrow"), (place, place))
    size = store.local_path("predictions/a.arrow").stat().st_size
    assert store.load_prediction("a") is not None
    assert store.trim_predictions(3 * size) == 0
    assert store.trim_predictions(2.5 * size) == 1
    assert store.names("predictions") == ["a.arrow", "c.arrow"]


def test_predictions_of_an_earlier_version_count_as_absent(store):
    sink = io.BytesIO()
    table = pa.table({"path": ["a"], "anomaly_map": [b"1234"]}, metadata={"shape": "[1, 1]", "facts": "{}"})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    store.publish("predictions/p.arrow", sink.getvalue())
    assert store.load_prediction("p") is None


def test_a_damaged_prediction_counts_as_absent(store):
    store.publish("predictions/p.arrow", b"half a file")
    assert store.load_prediction("p") is None


def test_states_hold_tensors_alone(store):
    state = {"mean": torch.arange(6.0).reshape(2, 3).T, "index": torch.tensor([3, 1])}
    store.publish_state("s", state)
    back = store.load_state("s")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert store.load_state("absent") is None


def test_scores_come_back(store):
    store.publish_scores("c", {"path": ["a"], "label": [1], "mask_path": [None], "image_score": [0.5]})
    assert store.load_scores("c") == {"path": ["a"], "label": [1], "mask_path": [None], "image_score": [0.5]}
    assert store.load_scores("absent") is None


def test_attempts_are_counted_per_invocation(store):
    assert [store.count_attempt("run1", "c") for _ in range(3)] == [1, 2, 3]
    assert store.count_attempt("run2", "c") == 1
    store.forget_attempts("run1")
    assert store.count_attempt("run1", "c") == 1


def test_a_killed_writer_leaves_the_old_bytes_and_no_half_file(tmp_path):
    store = Store(str(tmp_path))
    store.publish("rows/new/a.ok.parquet", b"old")
    code = (
        "import os, signal, sys\n"
        "from harness.store import StoreError, Store\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Store(sys.argv[1]).publish('rows/new/a.ok.parquet', b'new' * 1000)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert store.read("rows/new/a.ok.parquet") == b"old"
    assert store.names("rows/new") == ["a.ok.parquet"]


def test_a_full_disk_keeps_the_old_bytes_and_is_told(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.publish("key", b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match=r"--root .* cannot be written .*No space left.*row saved so far is safe"):
        store.publish("key", b"new")
    assert store.read("key") == b"old"
    assert store.names("") == ["key"]


def test_a_root_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdgridError, match="--root"):
        Store(str(tmp_path / "file" / "root"))
    with pytest.raises(AdgridError, match="--root"):
        Store("nonsense://bucket/root")


def test_a_few_rows_are_the_same_as_picked_from_all(tmp_path):
    store = Store(str(tmp_path))
    rows = [make_row(f"{number:03d}", trial_id=f"t{number // 10}") for number in range(600)]
    for row in rows[:500]:
        store.publish_row(row)
    assert store.fold_rows() == 500
    for row in rows[500:]:
        store.publish_row(row)
    everything = store.load_rows()
    assert len(everything) == 600
    for wanted in (["003"], ["599"], ["003", "255", "256", "511"], [f"{number:03d}" for number in range(0, 600, 3)]):
        assert store.load_rows(wanted) == {cell_id: everything[cell_id] for cell_id in wanted}
    assert store.load_rows(["nothing of that name"]) == {}


def test_of_many_that_publish_something_new_one_does(store):
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: store.publish_new("key", str(n).encode()), range(8)))
    assert won.count(True) == 1
    assert store.read("key") == str(won.index(True)).encode()
    assert store.names("") == ["key"]


def test_a_file_system_without_links_takes_new_objects_too(store, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", refuse)
    assert store.publish_new("key", b"one")
    assert not store.publish_new("key", b"two")
    assert store.read("key") == b"one"


def test_cells_that_others_finish_meanwhile_are_found_though_folded(store):
    segments = store.segments()
    assert store.finished_since(["c1", "c2"], segments) == set()
    store.publish_row(make_row())
    store.publish_row(make_row(cell_id="c2", status="failed", reason="x"))
    assert store.finished_since(["c1", "c2"], segments) == {"c1"}
    store.fold_rows(at_least=1)
    assert store.finished_since(["c1", "c2"], segments) == {"c1"}
