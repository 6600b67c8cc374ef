"""ADPretrain on real images: pretrained by two workers on two nodes, one of which is killed, then used."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster
from runs import SmallRun, quiet_console

from harness.contracts import Places
from harness.run import execute
from harness.sweep import connect

pytestmark = [pytest.mark.ray, pytest.mark.data, pytest.mark.slow]
SPACE = Path(__file__).parents[1] / "search_spaces" / "adpretrain_small.yaml"
SHORT = [
    "methods=feature_norm",
    "methods.feature_norm.layers=[blocks.4]",
    "backbones=tf_efficientnet_lite0",
    "datasets=mvtec_ad",
    "representations.adpretrain.layers=[blocks.4]",
    "representations.adpretrain.params.epochs=4",
]


def kill_a_worker():
    """Ends a process of the pretraining that has computed for a while; the seconds of its processor."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()) and process.cpu_times().user > 12:
                    seconds = process.cpu_times().user
                    process.kill()
                    return seconds
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.2)
    raise AssertionError("no worker of the pretraining was found")


def test_a_pretraining_that_loses_a_worker_makes_sizes_tell_defects(tmp_path, data_root):
    run = SmallRun(tmp_path, Places(data_root=str(data_root), cache_dir=str(tmp_path / "cache")))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    with connect(cluster.address), ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_a_worker)
        outcome = execute(str(SPACE), run.options(overrides=SHORT, random_weights=False), quiet_console(), "test")
        assert killing.result() > 12
    cluster.shutdown()
    rows = {row.representation: row for row in outcome.rows}
    assert {row.status for row in rows.values()} == {"ok"}, [row.reason for row in rows.values()]
    assert len(rows["adpretrain"].curves["adpretrain"]) == 4
    assert rows["plain"].metrics["image_auroc"] < 0.8
    assert rows["adpretrain"].metrics["image_auroc"] > 0.95
    assert rows["adpretrain"].metrics["pixel_auroc"] > 0.9
