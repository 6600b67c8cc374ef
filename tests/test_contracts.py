"""What every method promises, for every method found: a new one gets these tests for free."""

import dataclasses

import pytest
import torch
from small_configs import SMALL_CONFIGS
from torch import nn

from harness.contracts import AdgridError, Batch, Context, SampleKey, derive_seed
from harness.registry import build_config, load_method, method_names, method_version
from harness.stages import train_stage

SIZE = (32, 32)
SHAPES = ((8, 8, 8), (12, 4, 4))
METHODS = [name for name in method_names() if name != "toy_broken"]


class TinyBackbone(nn.Module):
    """Two levels of random convolutions."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, SHAPES[0][0], 4, stride=4)
            self.second = nn.Conv2d(SHAPES[0][0], SHAPES[1][0], 2, stride=2)

    def forward(self, images):
        first = torch.relu(self.first(images))
        return first, torch.relu(self.second(first))


class TinySplit:
    """Grey noise images, as features or as pixels."""

    def __init__(self, num, inputs, seed):
        self.images = torch.rand(num, 3, *SIZE, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.4
        self.inputs = inputs
        self.backbone = (
            TinyBackbone()
        )  # not in `take`, which the loop calls from a thread: it seeds the global generator
        self.samples = tuple(
            SampleKey(path=f"/images/{seed}/{i}.png", category="c", sample_id=f"{seed}-{i}") for i in range(num)
        )

    def __len__(self):
        return len(self.samples)

    def __iter__(self):
        for start in range(0, len(self), 4):
            yield self.take(range(start, min(start + 4, len(self))))

    def take(self, indices):
        indices = list(indices)
        images = self.images[indices]
        samples = tuple(self.samples[i] for i in indices)
        if self.inputs == "images":
            return Batch(samples=samples, images=images)
        with torch.no_grad():
            return Batch(samples=samples, levels=self.backbone(images))


def small_config(name):
    method = load_method(name)
    return build_config(method, SMALL_CONFIGS.get(name, {}))


def make_method(name):
    method = load_method(name)
    backbone = TinyBackbone()

    @torch.no_grad()
    def encode(images):
        return backbone(images)

    context = Context(
        level_shapes=() if method.backbone_use == "none" else SHAPES,
        image_size=SIZE,
        categories=("c",),
        device=torch.device("cpu"),
        seed_of=lambda draw: derive_seed(draw, "dataset", "c", None, 0),
        encode=None if method.backbone_use == "none" else encode,
        make_backbone=TinyBackbone if method.backbone_use == "trained" else None,
    )
    return method(small_config(name), context)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With several threads sums may be cut differently from call to call, and a training amplifies the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fitted():
    """Builds, trains and fits a method once per module."""
    made = {}

    def get(name):
        if name not in made:
            method = make_method(name)
            train = TinySplit(12, method.inputs(small_config(name)), seed=0)
            for stage in method.stages() if hasattr(method, "stages") else []:
                train_stage(stage, train, seed=0)
            method.fit(train)
            made[name] = method
        return made[name]

    return get


def query_images(name):
    return TinySplit(5, load_method(name).inputs(small_config(name)), seed=1)


def test_methods_are_found():
    assert {"padim", "patchcore", "toy_features", "toy_pixels", "toy_dataset", "toy_tuned", "toy_encoder"} <= set(
        METHODS
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_method_declares_itself(name):
    method = load_method(name)
    assert method.summary
    assert "\n" not in method.summary
    assert method.scope in ("category", "dataset")
    assert method.backbone_use in ("none", "frozen", "trained")
    assert method.score_reduction in ("max", "mean_pool_16", "mean_pool_21")
    assert method.smoothing >= 0
    assert method_version(name) >= 1
    assert dataclasses.is_dataclass(method.Config)
    config = method.Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.anything = 1
    assert method.inputs(config) in ("features", "images")


@pytest.mark.parametrize("name", METHODS)
def test_a_prediction_has_the_promised_shape(name, fitted):
    method = fitted(name)
    prediction = method.predict(query_images(name).take(range(5)))
    assert prediction.anomaly_map.shape[0] == 5
    assert prediction.anomaly_map.ndim == 3
    assert prediction.anomaly_map.dtype == torch.float32
    assert prediction.anomaly_map.isfinite().all()
    if prediction.image_score is not None:
        assert prediction.image_score.shape == (5,)
        assert prediction.image_score.dtype == torch.float32


@pytest.mark.parametrize("name", METHODS)
def test_prediction_does_not_depend_on_the_batch(name, fitted):
    method = fitted(name)
    split = query_images(name)
    together = method.predict(split.take(range(5)))
    for index in range(5):
        alone = method.predict(split.take([index]))
        torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[index], rtol=1e-4, atol=1e-5)
        if together.image_score is not None:
            torch.testing.assert_close(alone.image_score[0], together.image_score[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_painted_defect_scores_higher(name, fitted):
    method = fitted(name)
    split = query_images(name)
    before = method.predict(split.take(range(5))).anomaly_map.flatten(1).amax(dim=1)
    split.images[:, :, 8:20, 8:20] = 1.0
    after = method.predict(split.take(range(5))).anomaly_map.flatten(1).amax(dim=1)
    assert (after > before).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_method_predicts_the_same(name, fitted):
    method = fitted(name)
    state = method.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    restored = make_method(name)
    restored.load_state_dict({key: value.clone() for key, value in state.items()})
    batch = query_images(name).take(range(5))
    torch.testing.assert_close(restored.predict(batch).anomaly_map, method.predict(batch).anomaly_map)


@pytest.mark.parametrize("name", METHODS)
def test_fitting_twice_gives_the_same_numbers(name, fitted):
    first, second = fitted(name), make_method(name)
    train = TinySplit(12, second.inputs(small_config(name)), seed=0)
    for stage in second.stages() if hasattr(second, "stages") else []:
        train_stage(stage, train, seed=0)
    second.fit(train)
    batch = query_images(name).take(range(5))
    torch.testing.assert_close(second.predict(batch).anomaly_map, first.predict(batch).anomaly_map)


def test_a_method_without_a_trained_backbone_is_refused_one():
    context = make_method("toy_features").context
    with pytest.raises(AdgridError, match="backbone_use"):
        _ = context.backbone


def test_named_draws_repeat_and_differ_by_name():
    context = make_method("toy_features").context
    draw = [torch.rand(3, generator=context.generator(name)) for name in ("coreset", "coreset", "channels")]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert derive_seed("a", "bc") != derive_seed("ab", "c")
    assert 0 <= derive_seed("a") < 2**63
