"""Whether trials fit a cluster."""

import dataclasses

import pytest
from runs import SPACE, SmallRun

from harness.contracts import AdgridError, Resources
from harness.placement import check_placement, count_places, max_in_flight, worker_bundle

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
    with pytest.raises(AdgridError, match=r"resources.memory_gib.*32 memory GiB.*16"):
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
