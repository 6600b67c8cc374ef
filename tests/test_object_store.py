"""A whole run on an object store: an S3 server in this process, reached as any other."""

import pyarrow.fs
import pytest
from moto.server import ThreadedMotoServer
from runs import SPACE, SmallRun, quiet_console

from harness.claims import Claims
from harness.cli import main
from harness.run import execute
from harness.store import Store, StoreError, join_root, split_run
from harness.sweep import connect


@pytest.fixture(scope="module")
def bucket():
    """A URI with the server's address among its options, and the keys of a made-up user in the environment."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ACCESS_KEY_ID": "user",
            "SECRET_ACCESS_KEY": "secret",
            "DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(f"AWS_{name}", value)
        endpoint = f"?scheme=http&endpoint_override={host}:{port}"
        files, _ = pyarrow.fs.FileSystem.from_uri(f"s3://bucket{endpoint}&allow_bucket_creation=true")
        files.create_dir("bucket")
        yield lambda folder: f"s3://bucket/{folder}{endpoint}"
    server.stop()


def test_objects_are_published_listed_and_removed(bucket):
    store = Store(bucket("objects"))
    store.publish("rows/new/a", b"one")
    store.publish("rows/new/a", b"two")
    assert store.read("rows/new/a") == b"two"
    assert store.exists("rows/new/a")
    assert not store.exists("rows/new/b")
    assert (store.names("rows/new"), store.folders("rows"), store.names("absent")) == (["a"], ["new"], [])
    assert not store.publish_new("rows/new/a", b"three")
    assert store.local_path("rows") is None
    with pytest.raises(FileNotFoundError):
        store.read("rows/new/b")
    store.delete("rows/new/a")
    store.delete("rows/new/a")
    assert store.names("rows/new") == []


def test_claims_work_as_on_a_disk(bucket):
    store = Store(bucket("claims"))
    with Claims(store, "me").take("cell"):
        assert Claims(store, "you").take("cell") is None
    with Claims(store, "you").take("cell"):
        pass


def test_a_server_that_is_gone_is_one_error(bucket):
    store = Store(bucket("gone"))
    store._fs = pyarrow.fs.S3FileSystem(
        endpoint_override="127.0.0.1:9", scheme="http", retry_strategy=pyarrow.fs.AwsDefaultS3RetryStrategy(1)
    )
    with pytest.raises(StoreError, match=r"--root s3://bucket/gone.* cannot be written"):
        store.publish("key", b"")


def test_parts_of_a_root_go_before_its_options():
    assert join_root("s3://b/p?endpoint_override=h:1", "runs", "x") == "s3://b/p/runs/x?endpoint_override=h:1"
    assert join_root("/a/b", "runs") == "/a/b/runs"
    assert split_run("s3://b/p/runs/x?endpoint_override=h:1") == ("s3://b/p?endpoint_override=h:1", "x")
    assert split_run("results/runs/x/") == ("results", "x")
    assert split_run("x") == (None, "x")


@pytest.mark.ray
def test_a_whole_run_lives_on_an_object_store_and_goes_on_there(bucket, tmp_path, places, capsys):
    space = tmp_path / "space.yaml"
    methods = SPACE.replace("[toy_features]", "[toy_features, {name: toy_tuned, params: {epochs: 2}}]")
    space.write_text(methods + "resources: {cpu: 1, workers: 2}\n")
    run = SmallRun(tmp_path, places)
    options = run.options(root=bucket("run"), overrides=["categories=small,middle"], checkpoint_seconds=0.0)
    with connect(None, num_cpus=2):
        outcome = execute(str(space), options, quiet_console(), "test")
        assert (outcome.num_computed, outcome.num_failed) == (4, 0), [row.reason for row in outcome.rows]
        assert {row.costs["workers"] for row in outcome.rows if row.method == "toy_tuned"} == {2}
        more = run.options(root=bucket("run"), overrides=["methods=toy_features"])
        wider = execute(str(space), more, quiet_console(), "test")
        assert (wider.num_computed, len(wider.rows)) == (1, 3)  # only `large` was not there
    local = execute(str(space), run.options(overrides=["methods=toy_features"]), quiet_console(), "test")
    assert [row.metrics for row in wider.rows] == [row.metrics for row in local.rows]
    store = Store(bucket("run"))
    run_id = outcome.plan.run_id
    assert {"report.md", "rows.csv", "image_scores.parquet"} <= set(store.names(f"runs/{run_id}/report"))
    assert store.names("checkpoints") == []
    assert main(["report", outcome.run_folder, "--no-pictures"]) == 0
    assert main(["compare", outcome.run_folder, "--axis", "method"]) == 0
    assert "toy_tuned" in capsys.readouterr().out
