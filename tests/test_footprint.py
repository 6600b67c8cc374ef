"""What a trial is expected to take; what happens when memory runs out."""

import dataclasses

import pytest
import torch
from runs import SPACE, SmallRun

from harness.backbones import FrozenBackbone, resolve_backbone
from harness.contracts import Footprint
from harness.footprint import FACTOR, predict_footprint
from harness.resolve import open_dataset, read_category, resolve_trial
from harness.store import Store
from harness.trial import memory_key, run_trial


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


def test_feature_bytes_are_those_of_what_the_backbone_gives(run):
    (trial,) = run.plan(SPACE).trials
    resolved = resolve_backbone(trial.backbone, trial.weights, run.places.cache_dir)
    levels = FrozenBackbone(resolved, trial.layers, "cpu", image_size=(64, 64)).encode(torch.zeros(14, 3, 64, 64))
    assert trial.footprint.feature_bytes == 3 * 2 * sum(level.numel() for level in levels)


MEASURED = [
    # method, backbone, training images, test images, side, lowest and highest `peak_rss_mib` of rows on real images
    ("padim", "tf_efficientnet_lite0", 60, 489, 224, 833, 1028),
    ("padim", "tf_efficientnet_lite0", 40, 48, 224, 808, 1232),
    ("padim", "tf_efficientnet_lite0", 209, 83, 224, 815, 815),
    ("padim", "tf_efficientnet_lite1", 60, 489, 224, 865, 1029),
    ("padim", "tf_efficientnet_lite2", 40, 48, 224, 1113, 1336),
    ("padim", "mobilenetv2_100", 304, 329, 224, 2013, 2013),
    ("patchcore", "tf_efficientnet_lite0", 60, 489, 224, 1788, 1862),
    ("patchcore", "tf_efficientnet_lite0", 209, 83, 224, 1155, 1155),
    ("patchcore", "tf_efficientnet_lite2", 209, 83, 224, 1541, 1541),
    ("patchcore", "tf_efficientnet_lite0", 54, 97, 128, 710, 763),
    ("feature_norm", "tf_efficientnet_lite0", 209, 83, 128, 606, 657),
]


@pytest.mark.parametrize(("method", "backbone", "num_train", "num_test", "side", "low", "high"), MEASURED)
def test_the_expected_memory_is_near_measured_peaks(run, method, backbone, num_train, num_test, side, low, high):
    space = (
        SPACE.replace("toy_features", method)
        .replace("toy_resnet", backbone)
        .replace("image_size: 64", f"image_size: {side}")
    )
    (trial,) = run.plan(space, overrides=("categories=small",)).trials
    resolved = resolve_trial(trial, open_dataset(trial.dataset, run.places), run.places.cache_dir)
    data = read_category(resolved.dataset, "small", None, 0, run.places.cache_dir)
    images = {"train": data.train[:1] * num_train, "test": data.test[:1] * num_test}
    footprint = predict_footprint(resolved, {"small": dataclasses.replace(data, **images)})
    expected = sum(footprint.parts.values()) / 2**20
    assert high / FACTOR < expected < low * FACTOR


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
