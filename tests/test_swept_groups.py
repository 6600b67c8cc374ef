"""A sweep of groups of workers on a cluster that loses a node: Ray Tune with Ray Train inside."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from runs import SmallRun, quiet_console
from small_studies import SWEEP, check_mirror, wait_for, write

from harness.run import execute
from harness.sweep import connect

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SWEPT = (
    "{name: tocoad, params: {guide_epochs: 1, decoder_width: 0.2, contrast_epochs: {choice: [1, 2]}, "
    "backbone_lr: {choice: [1.0e-5, 0.3]}}}"  # the larger one ruins the features
)


@pytest.mark.timeout(900)
def test_stage_two_of_tocoad_is_swept_although_a_node_is_lost(tmp_path, places):
    run = SmallRun(tmp_path, places)
    text = SWEEP.replace("{name: toy_spoiled, params: {spoil: SPOIL, MORE}}", SWEPT).replace("samples: 5", "samples: 4")
    text += "resources: {cpu: 1, workers: 2, min_workers: 1}\n"
    space = write(tmp_path, text, HOW="scheduler: asha, objective: pixel_auroc, seed: 1")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)

    def remove_node():
        wait_for(lambda: any(row.costs.get("workers") == 2 for row in run.store.load_rows().values()), 400)
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)

    with connect(cluster.address), ThreadPoolExecutor(1) as pool:
        removal = pool.submit(remove_node)
        outcome = execute(space, run.options(tracking_uri=uri), quiet_console(), "test")
        removal.result()
    cluster.shutdown()
    (study,), (row,) = outcome.studies, outcome.rows
    reasons = [one.reason for result in study.results for one in result.rows.values() if one.status != "ok"]
    assert {result.status for result in study.results} == {"finished", "stopped"}, reasons
    assert len(study.results) == 4
    for result in study.results:
        assert result.status == "finished" or result.params["backbone_lr"] == 0.3
    best = max((result for result in study.results if result.score), key=lambda result: result.score)
    assert best.params["backbone_lr"] == 1e-5
    assert (row.category, row.status, row.costs["workers"]) == ("small", "ok", 1)
    assert {name: row.params[name] for name in best.params} == best.params
    # Stage I does not depend on what is swept: it was trained once per category, before any stage II.
    trained = sorted(Path(run.root, "artifacts").glob("*.training.json"), key=lambda path: path.stat().st_mtime_ns)
    stages = [next(iter(json.loads(path.read_text())["curves"])) for path in trained]
    assert stages.count("discriminative") == 3
    assert stages[0] == "discriminative"
    check_mirror(uri, outcome, best.score, num_samples=4)
