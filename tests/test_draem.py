"""DRAEM: its networks, what it paints, its loss and its schedule."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from small_splits import toy_context
from torch import nn
from two_workers import run_on_two_workers

from harness.contracts import AdgridError, Batch, SampleKey, Share
from harness.stages import train_stage
from harness.workers import Workers
from methods.components.collectives import SharedBatchNorm
from methods.components.losses import focal_loss, structural_similarity
from methods.draem import Config, Draem, _Networks, _Training

SMALL = Config(reconstruction_width=4, discriminative_width=4, epochs=10)


def make(config=SMALL, size=(32, 32), seed=0):
    return Draem(config, toy_context(shapes=(), image_size=size, seed=seed))


def make_stage(config=SMALL, size=(32, 32), seed=0):
    (stage,) = make(config, size, seed).stages()
    return stage


def key(name):
    return SampleKey(path=f"/images/{name}.png", category="toy", sample_id=str(name))


def make_batch(num, size=(32, 32), seed=0):
    images = torch.rand(num, 3, *size, generator=torch.Generator().manual_seed(seed))
    return Batch(samples=tuple(key(i) for i in range(num)), images=images)


def whole(num, epoch=0):
    return Share(epoch=epoch, step=0, num_images=num, positions=tuple(range(num)))


# --- networks ------------------------------------------------------------------------------------------------


def test_the_networks_are_those_of_the_official_code():
    with torch.device("meta"):
        networks = _Networks(Config().reconstruction_width, Config().discriminative_width)

    def count(network):
        return sum(parameter.numel() for parameter in network.parameters())

    # Those of VitjanZ/DRAEM have 69,048,579 and 28,374,146, with biases of convolutions that a batch norm takes away.
    biases = [
        sum(module.num_features for module in network.modules() if isinstance(module, nn.BatchNorm2d))
        for network in (networks.reconstruction, networks.segmentation)
    ]
    assert count(networks.reconstruction) == 69_048_579 - biases[0]
    assert count(networks.segmentation) == 28_374_146 - biases[1]


def test_networks_take_images_of_any_size_from_32_on():
    for size in ((32, 32), (40, 52), (33, 65)):
        prediction = make(size=size).predict(make_batch(2, size))
        assert prediction.anomaly_map.shape == (2, *size)
        assert prediction.image_score is None
        assert prediction.anomaly_map.min() >= 0
        assert prediction.anomaly_map.max() <= 1
    with pytest.raises(AdgridError, match="at least 32"):
        make(size=(31, 64))


def test_nothing_passes_the_reconstruction_beside_its_bottleneck():
    networks = make().networks.eval()
    with torch.no_grad():
        for parameter in networks.reconstruction.down[-1].parameters():
            parameter.zero_()
        rebuilt, _ = networks(make_batch(2).images)
    torch.testing.assert_close(rebuilt[0], rebuilt[1])


def test_the_segmentation_reads_the_image_and_its_reconstruction():
    networks = make().networks.eval()
    pair = torch.rand(1, 6, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = networks.segmentation(pair)
        for channel in range(6):
            changed = pair.clone()
            changed[:, channel, 8:24, 8:24] += 1
            assert not torch.equal(networks.segmentation(changed), plain)


def test_first_weights_are_drawn_by_name_and_leave_other_draws_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = make()
    assert torch.equal(torch.rand(1), expected)
    again, other = make(), make(seed=1)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    name = "segmentation.down.0.0.weight"
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert float(first.state_dict()["reconstruction.down.4.0.weight"].std()) == pytest.approx(0.02, rel=0.1)


# --- painting ------------------------------------------------------------------------------------------------


def test_half_of_the_images_stay_as_they_are():
    stage = make_stage(replace(SMALL, rotation_probability=0.0))
    image = make_batch(1).images[0]
    num_painted = 0
    for index in range(200):
        target, painted, mask = stage.paint(image, key(index), 0)
        assert torch.equal(target, image)
        assert torch.equal(painted[:, ~mask], image[:, ~mask])
        changed = (painted != image).any(dim=0)
        assert not (changed & ~mask).any()
        if mask.any():
            assert changed.sum() > 0.9 * mask.sum()
            num_painted += 1
        else:
            assert torch.equal(painted, image)
    assert 70 <= num_painted <= 120


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 60)])
def test_the_anomaly_probability_rules(probability, expected):
    stage = make_stage(replace(SMALL, anomaly_probability=probability))
    image = make_batch(1).images[0]
    num_painted = sum(bool(stage.paint(image, key(index), 0)[2].any()) for index in range(60))
    assert num_painted <= expected
    assert num_painted >= 0.7 * expected  # masks may come out empty


def test_turned_images_have_black_corners_that_are_no_anomaly():
    stage = make_stage(replace(SMALL, rotation_probability=1.0, anomaly_probability=0.0))
    image = make_batch(1).images[0] + 0.1
    turned = [stage.paint(image, key(index), 0) for index in range(20)]
    assert all(torch.equal(target, painted) and not mask.any() for target, painted, mask in turned)
    assert sum(bool((target[:, 0, 0] == 0).all()) for target, _, _ in turned) > 15
    kept = make_stage(replace(SMALL, rotation_probability=0.0, anomaly_probability=0.0))
    assert torch.equal(kept.paint(image, key(0), 0)[0], image)


def test_what_is_painted_depends_on_image_and_epoch_alone():
    stage = make_stage(replace(SMALL, anomaly_probability=1.0))
    image = make_batch(1).images[0]
    first = stage.paint(image, key(0), 0)[1]
    stage.paint(image, key(5), 3)
    assert torch.equal(stage.paint(image, key(0), 0)[1], first)
    assert not torch.equal(stage.paint(image, key(0), 1)[1], first)
    assert not torch.equal(stage.paint(image, key(1), 0)[1], first)
    assert not torch.equal(make_stage(stage.config, seed=1).paint(image, key(0), 0)[1], first)


def test_textures_come_from_the_folder_that_is_named(tmp_path):
    Image.new("RGB", (8, 8), (200, 100, 50)).save(tmp_path / "one.png")
    stage = make_stage(replace(SMALL, textures=str(tmp_path)))
    assert stage.textures.name == f"{tmp_path.name}, 1 images"
    missing = make(replace(SMALL, textures=str(tmp_path / "dtd")))
    with pytest.raises(AdgridError, match=r"textures: no folder .*dtd"):
        missing.stages()
    assert missing.predict(make_batch(1)).anomaly_map.shape == (1, 32, 32)  # needs none


# --- training ------------------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Answers the painted images themselves and the same logits everywhere."""

    def forward(self, images):
        logits = torch.tensor([0.3, -0.4]).view(1, 2, 1, 1)
        return images, logits.expand(len(images), 2, *images.shape[2:])


def test_the_loss_is_squared_error_plus_dissimilarity_plus_focal():
    config = replace(SMALL, anomaly_probability=1.0, gamma=1.5)
    stage = _Training(Fixed(), config, toy_context(shapes=()), make_stage().textures)
    batch = make_batch(3)
    (loss,) = stage.losses(batch, whole(3, epoch=2))
    drawn = [stage.paint(image, sample, 2) for image, sample in zip(batch.images, batch.samples, strict=True)]
    targets, painted, masks = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    assert masks.any()
    logits = Fixed()(painted)[1]
    expected = (
        (painted - targets).square().mean()
        + 1
        - structural_similarity(painted, targets).mean()
        + focal_loss(logits, masks, gamma=1.5).mean()
    )
    torch.testing.assert_close(loss, expected)


def test_shares_of_a_batch_add_up_to_the_whole():
    stage = make_stage()
    stage.module.eval()  # fixed statistics
    batch = make_batch(5)
    (together,) = stage.losses(batch, whole(5))
    parts = []
    for positions in ((0, 2, 4), (1, 3)):
        part = Batch(samples=tuple(batch.samples[i] for i in positions), images=batch.images[list(positions)])
        parts += stage.losses(part, Share(epoch=0, step=0, num_images=5, positions=positions))
    torch.testing.assert_close(sum(parts), together)


class Images:
    """Noise images as a split."""

    def __init__(self, num):
        self.batch = make_batch(num)
        self.samples = self.batch.samples

    def __len__(self):
        return len(self.samples)

    def take(self, indices):
        rows = list(indices)
        return Batch(samples=tuple(self.samples[i] for i in rows), images=self.batch.images[rows])


def first_loss(rank, num_workers):
    """This worker's part of the loss of one batch."""
    stage, images, positions = make_stage(), Images(7), tuple(range(rank, 7, num_workers))
    stage.module.train()
    (loss,) = stage.losses(images.take(positions), Share(epoch=0, step=0, num_images=7, positions=positions))
    return float(loss.detach())


def train_on(workers):
    """Mean losses of the epochs."""
    (stage,) = make(replace(SMALL, epochs=2, batch_size=4)).stages()
    return train_stage(stage, Images(7), seed=0, workers=workers)


def work(rank):
    return first_loss(rank, 2), train_on(Workers(rank=rank, size=2))


def test_two_workers_learn_what_one_does(tmp_path):
    # Losses and not gradients: at random weights, fifty batch norms in a row enlarge a rounding error to a tenth of the
    # gradient. That the norms themselves share their gradients has a test of its own.
    loss, history = first_loss(0, 1), train_on(Workers())
    (first, first_history), (second, second_history) = run_on_two_workers(work, tmp_path)
    assert first + second == pytest.approx(loss, rel=1e-5)
    assert first_history == second_history == pytest.approx(history, rel=1e-3)
    norms = [module for module in make().networks.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(isinstance(norm, SharedBatchNorm) for norm in norms)


def test_a_step_reaches_every_parameter():
    stage = make_stage()
    stage.module.train()
    (loss,) = stage.losses(make_batch(4), whole(4))
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in stage.module.parameters())
    (optimizer,) = stage.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    optimised = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert optimised == {id(parameter) for parameter in stage.module.parameters()}


def test_lower_precision_is_for_the_networks_alone():
    config = replace(SMALL, anomaly_probability=1.0, rotation_probability=1.0)
    stage, image = make_stage(config), make_batch(1).images[0]
    with torch.autocast("cpu", torch.bfloat16):
        lower = [stage.paint(image, key(index), 0) for index in range(20)]
    for index, parts in enumerate(lower):
        assert all(torch.equal(*pair) for pair in zip(parts, stage.paint(image, key(index), 0), strict=True))
    (plain,), (rough,) = (
        train_stage(make_stage(replace(config, epochs=1)), Images(4), seed=0, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    assert plain != rough
    assert rough == pytest.approx(plain, rel=0.05)


def test_the_learning_rate_falls_at_80_and_at_90_percent():
    stage = make_stage(replace(SMALL, epochs=700))
    factors = {0.0: 1.0, 559.9: 1.0, 560.0: 0.2, 629.9: 0.2, 630.0: 0.04, 699.9: 0.04}
    assert {progress: stage.lr_factor(progress) for progress in factors} == pytest.approx(factors)


def test_running_statistics_are_part_of_the_state():
    trained = make()
    trained.networks.train()
    trained.networks(make_batch(4).images)  # moves the running statistics
    restored = make(seed=3)
    restored.load_state_dict(trained.state_dict())
    batch = make_batch(2, seed=9)
    assert torch.equal(restored.predict(batch).anomaly_map, trained.predict(batch).anomaly_map)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reconstruction_width", 0),
        ("discriminative_width", 0),
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("rotation_probability", 1.5),
        ("anomaly_probability", -0.1),
        ("largest_beta", 1.01),
        ("gamma", -1.0),
    ],
)
def test_impossible_settings_are_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} .*got {value}"):
        Config(**{name: value})
