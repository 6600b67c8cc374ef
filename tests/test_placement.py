"""Whether trials fit a cluster."""

import dataclasses

import pytest
from runs import SPACE, SmallRun

from harness.contracts import AdgridError, Resources
from harness.placement import check_placement, count_places, max_in_flight, read_cluster_limits, worker_bundle

GIB = 2.0**30


@pytest.fixture
def trials(tmp_path, places):
    """Makes trials that ask for given resources."""
    run = SmallRun(tmp_path, places)

    def make(*resources):
        (trial,) = run.plan(SPACE).trials
        return [dataclasses.replace(trial, resources=wanted) for wanted in resources]

    return make


def test_what_is_not_needed_is_not_asked_for():
    assert worker_bundle(Resources(cpu=2)) == {"CPU": 2}
    assert worker_bundle(Resources(cpu=0, gpu=0.5, memory_gib=1)) == {"GPU": 0.5, "memory": GIB}


def test_places_are_counted_per_node():
    assert count_places({"CPU": 2.0}, [{"CPU": 3.0}, {"CPU": 3.0}]) == 2  # not three of six cores
    assert count_places({"CPU": 1.0, "GPU": 0.1}, [{"CPU": 8.0, "GPU": 0.3}, {"CPU": 8.0}]) == 3
    assert count_places({"CPU": 1.0}, []) == 0


def test_a_trial_that_can_never_be_placed_is_refused(trials):
    with pytest.raises(AdgridError, match=r"resources.cpu.*500 CPU.*largest node has 2"):
        check_placement(trials(Resources(cpu=500)), [{"CPU": 2.0}, {"CPU": 1.0}])
    with pytest.raises(AdgridError, match=r"resources.gpu.*largest node has 0"):
        check_placement(trials(Resources(gpu=1)), [{"CPU": 2.0}])
    with pytest.raises(AdgridError, match=r"resources.memory_gib.*32 GiB of memory.*16.0"):
        check_placement(trials(Resources(memory_gib=32)), [{"CPU": 2.0, "memory": 16 * GIB}])
    check_placement(trials(Resources(cpu=500)), [{"CPU": 500.0}])


def test_a_group_that_can_never_be_placed_is_refused_with_what_is_scarce(trials):
    nodes = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 1.0}]
    check_placement(trials(Resources(cpu=1, workers=6)), nodes)
    with pytest.raises(AdgridError, match=r"resources.workers.*needs 3 workers of 2 CPU each.*places for 2"):
        check_placement(trials(Resources(cpu=2, workers=3)), nodes)
    with pytest.raises(AdgridError, match=r"needs 3 workers of 1 GPU each"):
        check_placement(trials(Resources(cpu=1, gpu=1, workers=3)), nodes)
    check_placement(trials(Resources(cpu=1, gpu=1, workers=3, min_workers=2)), nodes)


def test_no_more_trials_are_in_flight_than_fit(trials):
    assert max_in_flight(trials(Resources(cpu=2, gpu=0.5)), [{"CPU": 8.0, "GPU": 1.0}]) == 2
    assert max_in_flight(trials(Resources(cpu=2, gpu=0.5)), [{"CPU": 2.0, "GPU": 4.0}]) == 1
    assert max_in_flight(trials(Resources(cpu=2, gpu=0.5), Resources()), [{"CPU": 8.0, "GPU": 1.0}]) == 8


def test_groups_are_counted_with_all_their_workers(trials):
    nodes = [{"CPU": 4.0}, {"CPU": 4.0}]
    assert max_in_flight(trials(Resources(cpu=1, workers=2)), nodes) == 4
    assert max_in_flight(trials(Resources(cpu=1, workers=3), Resources(cpu=2, workers=4)), nodes) == 1
    assert max_in_flight(trials(Resources(cpu=4, workers=4)), nodes) == 1  # never none


def test_a_trial_larger_than_any_node_is_refused_by_name_with_its_largest_part(tmp_path, places):
    (trial,) = SmallRun(tmp_path, places).plan(SPACE).trials
    with pytest.raises(
        AdgridError, match=r"toy_features · toy_resnet · toy_squares is expected to need .* GiB of memory "
    ):
        check_placement([trial], [{"CPU": 2.0, "memory": 0.3 * GIB}])
    check_placement([trial], [{"CPU": 2.0, "memory": 0.3 * GIB}, {"CPU": 1.0, "memory": 4 * GIB}])


LAUNCHER = """
cluster_name: c
max_workers: 5
head_node_type: head
available_node_types:
  head: {resources: {CPU: 4, memory: 8000000000}}
  small: {resources: {CPU: 8, memory: 16000000000}, max_workers: 2}
  large: {resources: {CPU: 16, GPU: 1, memory: 64000000000}}
"""


def test_what_an_autoscaler_may_add_counts_as_nodes(tmp_path, trials):
    file = tmp_path / "cluster.yaml"
    file.write_text(LAUNCHER)
    limits = read_cluster_limits(str(file))
    assert [node["CPU"] for node in limits] == [4, 8, 8, 16, 16, 16, 16, 16]
    wanted = trials(Resources(cpu=8, gpu=1, workers=5))
    check_placement(wanted, limits)
    with pytest.raises(AdgridError, match=r"needs 6 workers.*places for 5.*or raise the limits"):
        check_placement(trials(Resources(cpu=8, gpu=1, workers=6)), limits, "raise the limits")


def test_a_launcher_file_that_does_not_say_what_nodes_have_is_an_error(tmp_path):
    file = tmp_path / "cluster.yaml"
    with pytest.raises(AdgridError, match="cannot be read"):
        read_cluster_limits(str(file))
    file.write_text(LAUNCHER.replace(", memory: 16000000000", ""))
    with pytest.raises(AdgridError, match=r"available_node_types.small.resources: has no memory"):
        read_cluster_limits(str(file))
    file.write_text("provider: {type: local, head_ip: a, worker_ips: [b]}\n")
    with pytest.raises(AdgridError, match="available_node_types"):
        read_cluster_limits(str(file))
