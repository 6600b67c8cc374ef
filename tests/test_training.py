"""Trials run by several Ray Train workers on several nodes: same numbers, killed workers, lost nodes."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, remove_placement_group
from runs import SPACE, SmallRun, quiet_console

from harness.contracts import Places
from harness.run import execute
from harness.sweep import connect
from harness.training import remove_orphans

pytestmark = pytest.mark.ray
TUNED = SPACE.replace("[toy_features]", "[{name: toy_tuned, params: {epochs: 3, learning_rate: 0.1, MORE}}]")
TUNED += "resources: {cpu: 1, workers: 2}\n"


@pytest.fixture(scope="module")
def started():
    """A head that runs nothing."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    with connect(nodes.address):
        yield nodes
    nodes.shutdown()


@pytest.fixture(autouse=True)
def cluster(started):
    """Three nodes of one core beside the head; what a test has removed is replaced."""
    while len(started.worker_nodes) < 3:
        started.add_node(num_cpus=1)
    started.wait_for_nodes()
    return started


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Rows by category of the same training in one process without Ray."""
    folder = tmp_path_factory.mktemp("alone")
    small = SmallRun(folder, Places(data_root=str(folder), cache_dir=str(folder / "cache")))
    return small(TUNED.replace("MORE", "").replace("workers: 2", "workers: 1"))


def execute_text(tmp_path, text, run):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return {row.category: row for row in execute(str(path), run.options(), quiet_console(), "test").rows}


def assert_alike(rows, alone, num_workers=2):
    for category, row in rows.items():
        assert row.status == "ok", row.reason
        assert row.costs["workers"] == num_workers
        assert row.curves["tuning"] == pytest.approx(alone[category].curves["tuning"], rel=1e-4)
        for name, value in alone[category].metrics.items():
            assert row.metrics[name] == pytest.approx(value, abs=1e-3), (category, name)


def test_two_workers_give_the_numbers_of_one(run, tmp_path, alone):
    rows = execute_text(tmp_path, TUNED.replace("MORE", ""), run)
    assert sorted(rows) == ["large", "middle", "small"]
    assert_alike(rows, alone)
    assert alone["small"].curves["tuning"][-1] < 0.9 * alone["small"].curves["tuning"][0]


def test_a_worker_killed_within_an_epoch_changes_no_number(run, tmp_path, alone):
    note = tmp_path / "killed"
    rows = execute_text(tmp_path, TUNED.replace("MORE", f"trouble: kill_once, note: {note}"), run)
    assert note.exists()
    assert_alike(rows, alone)


def test_an_error_of_one_worker_is_one_failed_row(run, tmp_path, alone):
    rows = execute_text(tmp_path, TUNED.replace("MORE", "trouble: raise"), run)
    assert rows["middle"].status == "failed"
    assert rows["middle"].reason == "ValueError: the second worker has a problem of its own"
    assert_alike({name: row for name, row in rows.items() if name != "middle"}, alone)


def remove_node_of(note, cluster):
    """Waits until a worker has written where it is, and takes that node away from it."""
    deadline = time.monotonic() + 120
    while not (note.exists() and note.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (node,) = [node for node in cluster.worker_nodes if node.node_id == note.read_text()]
    cluster.remove_node(node, allow_graceful=False)


def test_a_lost_node_that_nothing_replaces_changes_no_number(run, tmp_path, alone, cluster):
    while len(cluster.worker_nodes) > 2:
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    note = tmp_path / "paused"
    text = TUNED.replace("MORE", f"trouble: pause_once, note: {note}")
    text = text.replace("workers: 2", "workers: 2, min_workers: 1")
    with ThreadPoolExecutor(1) as pool:
        remover = pool.submit(remove_node_of, note, cluster)
        rows = execute_text(tmp_path, text, run)
        remover.result()
    unfinished = {name: row for name, row in rows.items() if name != "large"}
    assert rows["large"].costs["workers"] == 2  # done before
    assert_alike(unfinished, alone, num_workers=1)


PRETRAINED = """
name: pretrained
methods: [toy_features]
backbones: [{name: toy_resnet, layers: [layer2]}]
datasets: [{name: toy_squares, categories: [middle]}]
representations:
  - name: scaled
    kind: toy_scaled
    data: [{name: toy_squares, categories: [small, large]}]
    params: {epochs: 4, trouble: kill_once, note: NOTE}
protocol: {image_size: 64}
resources: {cpu: 1, workers: 2}
"""


def test_a_pretraining_on_two_nodes_survives_a_killed_worker(run, tmp_path):
    note = tmp_path / "note"
    text = PRETRAINED.replace("NOTE", str(note))
    row = execute_text(tmp_path, text, run)["middle"]
    assert row.status == "ok", row.reason
    assert note.exists()  # one was killed; from now on none is
    alone = SmallRun(tmp_path / "alone", run.places)
    expected = alone(text.replace("workers: 2", "workers: 1"))["middle"]
    (artifact,) = run.plan(text).pretrainings
    factors = [one.store.load_state(artifact.trial_id)["factor"].item() for one in (run, alone)]
    assert factors[0] == pytest.approx(factors[1], rel=1e-5)
    assert factors[0] != 1
    assert row.curves["scaling"] == pytest.approx(expected.curves["scaling"], rel=1e-5)
    assert row.metrics == pytest.approx(expected.metrics, abs=1e-5)


def test_places_of_a_killed_controller_are_freed_and_no_others(cluster):
    class Holder:
        def hold(self):
            self.group = ray.util.placement_group([{"CPU": 1}])
            return self.group.wait(30) and self.group.id.hex()

    def start(name):
        actor = ray.remote(type(name, (Holder,), {})).options(num_cpus=0).remote()
        return actor, ray.get(actor.hold.remote())

    (killed, orphan), (_, living), (other, kept) = start("TrainController"), start("TrainController"), start("Another")
    for actor in (killed, other):
        ray.kill(actor)
    deadline = time.monotonic() + 60
    while remove_orphans() == 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)

    def state(group):
        return ray.util.placement_group_table()[group]["state"]

    while state(orphan) != "REMOVED":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert (state(living), state(kept)) == ("CREATED", "CREATED")
    assert remove_orphans() == 0
    for group in (living, kept):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))
