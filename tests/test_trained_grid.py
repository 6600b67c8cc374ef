"""The small grid of all detectors on real images, on a cluster that loses a node in the middle."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray._private.state import available_resources_per_node
from ray.cluster_utils import Cluster
from runs import SmallRun, quiet_console

from harness.contracts import Places
from harness.run import execute
from harness.sweep import connect

pytestmark = [pytest.mark.ray, pytest.mark.data, pytest.mark.slow]
SPACE = Path(__file__).parents[1] / "search_spaces" / "trained_small.yaml"
SHORT = [
    "datasets=mvtec_ad",
    "methods.cflow.params.meta_epochs=1",
    "methods.cflow.params.sub_epochs=1",
    "methods.uniad.params.epochs=4",
    "methods.uniad.params.neighbour_size=3",
    "methods.glass.params.epochs=1",
    "methods.draem.params.epochs=1",
    "methods.draem.params.reconstruction_width=4",
    "methods.draem.params.discriminative_width=4",
    "protocol.image_size=64",
]


def remove_busy_node(cluster, store):
    """Takes away a node on which a worker trains, once the first trained row is there."""
    deadline = time.monotonic() + 300
    while not any(row.costs.get("workers") == 2 for row in store.load_rows().values()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    while True:
        free = available_resources_per_node()
        busy = [node for node in cluster.worker_nodes if free.get(node.node_id, {}).get("CPU", 0) == 0]
        if busy:
            cluster.remove_node(busy[0], allow_graceful=False)
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.timeout(700)
def test_the_matrix_of_all_detectors_is_complete_although_a_node_was_lost(tmp_path, data_root):
    run = SmallRun(tmp_path, Places(data_root=str(data_root), cache_dir=str(tmp_path / "cache")))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    with connect(cluster.address), ThreadPoolExecutor(1) as pool:
        removal = pool.submit(remove_busy_node, cluster, run.store)
        options = run.options(overrides=SHORT, random_weights=False)
        outcome = execute(str(SPACE), options, quiet_console(), "test")
        removal.result()
        assert sum(node["Alive"] for node in ray.nodes()) == 3  # the head and two of three
    cluster.shutdown()
    finished = {row.method for row in outcome.rows if row.status == "ok"}
    assert finished == {"padim", "patchcore", "cflow", "uniad", "glass", "draem"}, [row.reason for row in outcome.rows]
    assert all(0 <= row.metrics["pixel_auroc"] <= 1 for row in outcome.rows)
