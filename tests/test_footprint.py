"""What a trial is expected to take, against what it takes; what happens when memory runs out."""

import dataclasses
import multiprocessing

import pytest
import torch
from runs import SPACE, SmallRun

from harness.backbones import FrozenBackbone, resolve_backbone
from harness.contracts import Footprint
from harness.datasets.generated import Generated
from harness.footprint import FACTOR
from harness.store import Store
from harness.trial import memory_key, run_trial

MEMORY = """
name: memory
methods: [{name: padim, params: {num_channels: 160}}, {name: patchcore, params: {coreset_ratio: 0.05}}]
backbones: [{name: resnet18, layers: [layer2, layer3]}]
datasets: [generated]
categories: [%s]
protocol: {image_size: 224}
resources: {cpu: 2}
"""


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


def peak_mib(trial, settings, queue):
    torch.set_num_threads(2)
    queue.put([dict(row.costs, status=row.status) for row in run_trial(trial, settings)])


@pytest.mark.slow
def test_the_expected_memory_is_near_the_measured_peak(run):
    category = Generated("generated", None, run.places).category_names()[0]
    plan = run.plan(MEMORY % category)
    context = multiprocessing.get_context("spawn")
    for trial in plan.trials:
        queue = context.Queue()
        process = context.Process(target=peak_mib, args=(trial, run.settings(plan), queue))
        process.start()
        ((costs),) = queue.get(timeout=250)
        process.join()
        assert costs["status"] == "ok"
        expected = sum(trial.footprint.parts.values()) / 2**20
        assert expected / FACTOR < costs["peak_rss_mib"] < expected * FACTOR, (trial.method, trial.footprint.parts)


def test_feature_bytes_are_those_of_what_the_backbone_gives(run):
    (trial,) = run.plan(SPACE).trials
    resolved = resolve_backbone(trial.backbone, trial.weights, run.places.cache_dir)
    levels = FrozenBackbone(resolved, trial.layers, "cpu", image_size=(64, 64)).encode(torch.zeros(14, 3, 64, 64))
    assert trial.footprint.feature_bytes == 3 * 2 * sum(level.numel() for level in levels)


def test_memory_grows_with_images_and_bank(run):
    def expected(space, **changes):
        (trial,) = run.plan(space, **changes).trials
        return sum(trial.footprint.parts.values())

    bank = SPACE.replace("[toy_features]", "[{name: patchcore, params: {coreset_ratio: %s, projection: null}}]")
    bank = bank.replace("toy_resnet]", "{name: resnet18, layers: [layer2]}]")
    few, all_ = expected(bank % 0.1, overrides=("shots=2",)), expected(bank % 0.1)
    assert few < all_
    assert expected(bank % 1.0) > all_


def test_what_is_expected_is_asked_for_unless_the_space_says_otherwise(run):
    (trial,) = run.plan(SPACE).trials
    assert trial.resources.memory_gib == trial.footprint.memory_gib > 0.5
    (told,) = run.plan(SPACE + "resources: {memory_gib: 0.25}\n").trials
    assert told.resources.memory_gib == 0.25
    assert told.trial_id == trial.trial_id


def test_a_footprint_names_its_largest_part():
    footprint = Footprint(feature_bytes=0, parts={"a": 2**30, "b": 3 * 2**30 + 1})
    assert footprint.memory_gib == 4.1
    assert footprint.largest == "b 3.0 GiB"


@pytest.fixture
def scarce(monkeypatch):
    """Predicting more than two images at once takes more memory than there is."""
    from adgrid_example.methods import FeatureMean

    predict, batches = FeatureMean.predict, []

    def greedy(self, batch):
        batches.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, batch)

    monkeypatch.setattr(FeatureMean, "predict", greedy)
    return batches


def test_out_of_memory_is_tried_once_more_in_smaller_batches_and_the_row_says_so(run, scarce):
    plan = run.plan(SPACE, overrides=("categories=small",))
    (row,) = run.run_plan(plan, batch_size=8).values()
    assert row.status == "ok"
    assert "run again in batches of 2, out of memory before" in row.stamps
    assert scarce == [8, 2, 2, 2, 2]


def test_out_of_memory_twice_is_a_failed_row(run, scarce):
    plan = run.plan(SPACE, overrides=("categories=small",))
    (row,) = run.run_plan(plan, batch_size=16).values()
    assert row.status == "failed"
    assert "OutOfMemoryError" in row.reason
    assert scarce == [8, 4]


def test_a_trial_whose_worker_was_killed_for_memory_goes_on_in_smaller_batches(run, scarce):
    plan = run.plan(SPACE, overrides=("categories=small",))
    settings = run.settings(plan, batch_size=8)
    Store(run.root).publish(memory_key(plan.trials[0], settings), b"")
    (row,) = run_trial(plan.trials[0], settings)
    assert row.status == "ok"
    assert "run again in batches of 2, out of memory before" in row.stamps
    assert scarce == [2, 2, 2, 2]


def test_a_worker_killed_for_memory_is_noted_and_one_that_died_otherwise_is_not(run):
    pytest.importorskip("ray")
    from harness.sweep import Relay

    plan = run.plan(SPACE)
    settings = run.settings(plan)
    relay = Relay([], lambda config: plan.trials[0], run.store, settings)

    @dataclasses.dataclass
    class Lost:
        config: dict
        error: str

        def get_error(self):
            return self.error

    relay.on_trial_recover(0, [], Lost({}, "ray.exceptions.RayActorError: The actor died unexpectedly"))
    assert not run.store.exists(memory_key(plan.trials[0], settings))
    relay.on_trial_recover(0, [], Lost({}, "ray.exceptions.OutOfMemoryError: Task was killed due to low memory"))
    assert run.store.exists(memory_key(plan.trials[0], settings))
