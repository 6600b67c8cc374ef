import copy
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from small_splits import SHAPES, LevelSplit, normal_maps, painted, toy_context

from harness.contracts import Batch, SampleKey, Share, TransductiveMethod
from harness.stages import epoch_batches, train_stage
from methods.cflow import Cflow, Config, draw_fibres, encode_positions, rotate
from methods.components.draws import step_generator

SMALL = Config(
    meta_epochs=3,
    sub_epochs=2,
    batch_size=5,
    fibres=48,
    learning_rate=3e-3,
    coupling_blocks=2,
    condition_width=8,
    rotation_degrees=0,
)


def small(**changes):
    return Config(**({**SMALL.__dict__, **changes}))


def trained(config=SMALL, context=None, num=20):
    method, train = Cflow(config, context or toy_context()), LevelSplit(normal_maps(num, seed=1))
    history = train_stage(method.stages()[0], train, seed=0)
    method.fit(train)
    return method, history


def share_of(positions, num_images=5, epoch=0, step=0):
    return Share(epoch=epoch, step=step, num_images=num_images, positions=tuple(positions))


def test_a_painted_defect_scores_highest_where_it_is():
    method, history = trained(small(meta_epochs=10))
    normal = normal_maps(4, seed=2)
    without = method.predict(LevelSplit(normal).take(range(4))).anomaly_map
    within = method.predict(LevelSplit(painted(normal)).take(range(4))).anomaly_map
    assert within.shape == (4, 32, 32)
    assert within.dtype == torch.float32
    assert (within.amax(dim=(1, 2)) > without.amax(dim=(1, 2))).all()
    row, column = divmod(int((within - without).mean(dim=0).argmax()), 32)
    assert 6 <= row < 18
    assert 6 <= column < 18
    assert history[-1] < history[0]


def test_prediction_is_minus_the_sum_of_relative_likelihoods():
    method, _ = trained()
    batch = LevelSplit(normal_maps(2, seed=2)).take(range(2))
    expected = torch.zeros(2, 32, 32)
    for level, flow, largest in zip(batch.levels, method.flows, method.max_log_likelihood, strict=True):
        _, width, height, breadth = level.shape
        position = encode_positions(8, height, breadth)
        relative = torch.empty(2, height, breadth)
        for image in range(2):
            for row in range(height):
                for column in range(breadth):
                    vector, condition = level[image, :, row, column], position[:, row, column]
                    value = flow.log_likelihood(vector[None], condition[None]) / width
                    relative[image, row, column] = (value - largest).exp()[0]
        expected -= F.interpolate(relative[:, None], (32, 32), mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(method.predict(batch).anomaly_map, expected.detach(), rtol=1e-4, atol=1e-5)


def test_the_most_likely_training_patch_of_each_level_has_the_value_one():
    method, _ = trained()
    split = LevelSplit(normal_maps(20, seed=1))
    likelihoods = [values.exp() for values in method._log_likelihoods(split.take(range(20)))]
    for values, largest in zip(likelihoods, method.max_log_likelihood, strict=True):
        assert values.max().item() == pytest.approx(largest.exp().item(), rel=1e-5)
    assert method.predict(split.take(range(20))).anomaly_map.min() >= -len(SHAPES)


def test_what_is_very_unlikely_is_still_told_apart():
    method, _ = trained()
    normal = normal_maps(1, seed=2)
    worse = [
        method.predict(LevelSplit([level + shift for level in normal]).take([0])).anomaly_map.max().item()
        for shift in (4.0, 8.0, 9.0)
    ]
    assert worse[0] < worse[1] < worse[2] < 0


# --- training ----------------------------------------------------------------------------------------------------


def test_the_loss_of_a_set_of_fibres_by_hand():
    method, split = Cflow(SMALL, toy_context()), LevelSplit(normal_maps(5, seed=1))
    batch, share = split.take(range(5)), share_of(range(5))
    losses = list(method.stages()[0].losses(batch, share))
    assert len(losses) == 5 * 64 // 48 + 5 * 16 // 48
    order = torch.randperm(5 * 64, generator=step_generator(method.context, "fibres 0", share))
    total = 0.0
    for fibre in order[48:96].tolist():  # the second set of the first level
        image, row, column = fibre // 64, fibre % 64 // 8, fibre % 8
        vector = batch.levels[0][image, :, row, column]
        condition = encode_positions(8, 8, 8)[:, row, column]
        density = method.flows[0].log_likelihood(vector[None], condition[None]).item() / 6
        total += math.log1p(math.exp(-density))
    assert losses[1].item() == pytest.approx(total / 48, rel=1e-5)


@pytest.mark.parametrize("shares", [[(0, 2, 4), (1, 3)], [(0, 3), (1, 4), (2,)]])
def test_losses_and_gradients_of_the_workers_sum_up_to_those_of_one(shares):
    split = LevelSplit(normal_maps(5, seed=1))
    method = Cflow(SMALL, toy_context())

    def gradients(positions):
        """Loss and gradients of each step."""
        for loss in method.stages()[0].losses(split.take(positions), share_of(positions)):
            method.module.zero_grad()
            loss.backward()
            yield loss.item(), [None if p.grad is None else p.grad.clone() for p in method.module.parameters()]

    whole = list(gradients(range(5)))
    parts = [list(gradients(positions)) for positions in shares]
    for (loss, expected), *others in zip(whole, *parts, strict=True):
        assert sum(other for other, _ in others) == pytest.approx(loss, rel=1e-5)
        for number, gradient in enumerate(expected):
            found = [grads[number] for _, grads in others]
            if gradient is None:
                assert found == [None] * len(shares)
            else:
                torch.testing.assert_close(sum(found), gradient, rtol=1e-4, atol=1e-6)


def test_two_workers_end_with_the_weights_of_one():
    split = LevelSplit(normal_maps(5, seed=1))
    alone, together = Cflow(SMALL, toy_context()), Cflow(SMALL, toy_context())
    train_stage(alone.stages()[0], split, seed=0)
    stage = together.stages()[0]
    (optimizer,) = stage.configure_optimizers()
    for epoch in range(stage.epochs):
        for step, places in enumerate(epoch_batches(5, 5, 0, epoch)):
            optimizer.param_groups[0]["lr"] = SMALL.learning_rate * stage.lr_factor(epoch + step)
            parts = [
                stage.losses(split.take(places[rank::2]), share_of(range(rank, 5, 2), epoch=epoch, step=step))
                for rank in range(2)
            ]
            for losses in zip(*parts, strict=True):
                optimizer.zero_grad()
                sum(losses).backward()
                optimizer.step()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_step_moves_the_flow_of_its_level_alone():
    method, split = Cflow(SMALL, toy_context()), LevelSplit(normal_maps(5, seed=1))
    stage = method.stages()[0]
    (optimizer,) = stage.configure_optimizers()
    before = copy.deepcopy(method.flows)
    for number, loss in enumerate(stage.losses(split.take(range(5)), share_of(range(5)))):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number == 5:  # the last set of the first level
            break
    moved = [
        any(not torch.equal(a, b) for a, b in zip(flow.parameters(), old.parameters(), strict=True))
        for flow, old in zip(method.flows, before, strict=True)
    ]
    assert moved == [True, False]


@pytest.mark.parametrize(("num_fibres", "sizes"), [(10, [10, 10, 10]), (35, [35]), (36, [35])])
def test_fibres_of_all_workers_are_those_of_one_and_none_comes_twice(num_fibres, sizes):
    def fibres(positions):
        """Sets of (image, patch)."""
        sets = draw_fibres(share_of(positions), 7, num_fibres, torch.Generator().manual_seed(3))
        return [[(positions[row // 7], row % 7) for row in some.tolist()] for some in sets]

    whole, first, second = fibres([0, 1, 2, 3, 4]), fibres([0, 2, 4]), fibres([1, 3])
    assert [len(some) for some in whole] == sizes
    assert len({fibre for some in whole for fibre in some}) == sum(sizes)
    for all_of_it, own, others in zip(whole, first, second, strict=True):
        assert sorted(own + others) == sorted(all_of_it)
        assert [fibre for fibre in all_of_it if fibre[0] % 2 == 0] == own


def test_fibres_differ_between_steps_epochs_and_levels():
    method = Cflow(SMALL, toy_context())
    shares = [share_of(range(5)), share_of(range(5), step=1), share_of(range(5), epoch=1)]
    draws = [draw_fibres(s, 7, 10, step_generator(method.context, "fibres 0", s))[0].tolist() for s in shares]
    draws.append(draw_fibres(shares[0], 7, 10, step_generator(method.context, "fibres 1", shares[0]))[0].tolist())
    assert len({tuple(draw) for draw in draws}) == 4


def test_learning_rate_warms_up_and_falls_in_a_cosine_of_meta_epochs():
    stage = Cflow(Config(), toy_context()).stages()[0]
    assert stage.epochs == 200

    def cosine(meta):
        return 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * meta / 25)) / 2

    assert stage.lr_factor(0) == pytest.approx(0.1)
    assert stage.lr_factor(8) == pytest.approx((0.1 + cosine(2)) / 2)
    assert stage.lr_factor(12.5) == pytest.approx(0.1 + 12.5 / 16 * (cosine(2) - 0.1))
    assert stage.lr_factor(16) == pytest.approx(cosine(2))
    assert stage.lr_factor(23.9) == stage.lr_factor(16)
    assert stage.lr_factor(24) == pytest.approx(cosine(3))
    assert stage.lr_factor(199.5) == pytest.approx(cosine(24))
    assert Cflow(Config(warm_up_meta_epochs=0), toy_context()).stages()[0].lr_factor(0) == 1


# --- positions and rotation --------------------------------------------------------------------------------------


def test_positions_by_their_formula():
    found = encode_positions(12, 4, 5)
    assert found.shape == (12, 4, 5)
    for row in range(4):
        for column in range(5):
            for wave in range(3):
                frequency = 10000 ** (-2 * wave / 6)
                expected = [f(x * frequency) for x in (column, row) for f in (math.sin, math.cos)]
                values = [found[place, row, column].item() for place in (2 * wave, 2 * wave + 1)]
                values += [found[6 + place, row, column].item() for place in (2 * wave, 2 * wave + 1)]
                assert values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [(20, 20), (16, 27)])
def test_rotation_is_that_of_scipy(size):
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(0))
    angles = [0.0, 5.0, -33.0]
    found = rotate(images, torch.tensor(angles))
    for image, angle, rotated in zip(images, angles, found, strict=True):
        # The axes in the order that makes a positive angle counter-clockwise, as rot90 does.
        expected = ndimage.rotate(image.numpy(), angle, axes=(2, 1), reshape=False, order=0, mode="grid-constant")
        assert (rotated == torch.from_numpy(expected)).float().mean() > 0.99  # between two pixels either may be taken
    assert torch.equal(found[0], images[0])


def test_a_quarter_turn():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(rotate(image, torch.tensor([90.0])), image.rot90(1, dims=(2, 3)))


class ImageSplit(LevelSplit):
    """Random images; `encode` below makes features of them."""

    def __init__(self, num):
        super().__init__([torch.rand(num, 3, 32, 32, generator=torch.Generator().manual_seed(num))])

    def take(self, indices):
        batch = super().take(indices)
        return Batch(samples=batch.samples, images=batch.levels[0])


def encode(images):
    return F.avg_pool2d(images, 4).repeat(1, 2, 1, 1), F.avg_pool2d(images, 8).repeat(1, 3, 1, 1)


IMAGE_CONTEXT = {"level_shapes": ((6, 8, 8), (9, 4, 4)), "encode": encode}


def test_training_images_are_rotated_anew_in_every_epoch_and_test_images_are_not():
    method = Cflow(small(rotation_degrees=20), toy_context(**IMAGE_CONTEXT))
    batch = ImageSplit(4).take([0, 1, 2, 3])
    first, again, second = (method.encode(batch, epoch)[0] for epoch in (0, 0, 1))
    plain = method.encode(batch)[0]
    assert torch.equal(plain, encode(batch.images)[0])
    assert torch.equal(first, again)
    assert (first - second).abs().max() > 0.1
    assert (first - plain).abs().max() > 0.1
    assert len({*method._draw_angles(batch, 0).tolist(), *method._draw_angles(batch, 1).tolist()}) == 8
    alone = method.encode(Batch(samples=batch.samples[2:3], images=batch.images[2:3]), 0)[0]
    torch.testing.assert_close(alone, first[2:3])  # the angle is the image's, whatever its batch


def test_angles_lie_within_the_bounds_and_on_both_sides():
    method = Cflow(Config(), toy_context(**IMAGE_CONTEXT))
    samples = tuple(SampleKey(path="", category="c", sample_id=str(i)) for i in range(200))
    angles = method._draw_angles(Batch(samples=samples, images=torch.zeros(200, 3, 1, 1)), 0)
    assert 4.5 < angles.max() <= 5
    assert -5 <= angles.min() < -4.5


def test_images_train_like_features_where_nothing_is_rotated():
    context = toy_context(**IMAGE_CONTEXT)
    images = ImageSplit(6)
    features = LevelSplit(list(encode(images.levels[0])))
    states = []
    for split in (images, features):
        method = Cflow(SMALL, context)
        train_stage(method.stages()[0], split, seed=0)
        method.fit(split)
        states.append(method.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, msg=name)


def test_a_training_with_rotation_learns():
    method = Cflow(small(rotation_degrees=5), toy_context(**IMAGE_CONTEXT))
    history = train_stage(method.stages()[0], ImageSplit(10), seed=0)
    assert history[-1] < history[0]


def test_images_are_asked_for_only_where_they_are_rotated():
    assert Cflow.inputs(Config()) == "images"
    assert Cflow.inputs(small()) == "features"


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"meta_epochs": 0},
        {"sub_epochs": 0},
        {"batch_size": 0},
        {"fibres": 0},
        {"coupling_blocks": 0},
        {"learning_rate": 0.0},
        {"clamp": -1.0},
        {"warm_up_meta_epochs": -1},
        {"condition_width": 6},
        {"rotation_degrees": -5.0},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)


def test_presets_are_settings():
    assert Config(**Cflow.presets["adpretrain"]).fibres == 4096
    assert Cflow.inputs(Config(**Cflow.presets["adpretrain"])) == "features"


def test_other_seeds_start_from_other_flows():
    first, same, other = (Cflow(SMALL, toy_context(seed=seed)).state_dict() for seed in (0, 0, 1))
    for name in ("flows.0.blocks.0.rotation", "flows.1.blocks.1.subnet.0.weight"):
        assert torch.equal(first[name], same[name])
        assert not torch.equal(first[name], other[name])


def test_normalising_by_test_images_is_the_official_form_and_the_same_training():
    usual, (official, _) = trained()[0], trained(small(normalise="test_max"))
    assert isinstance(usual, TransductiveMethod)
    assert (usual.observes_test(), official.observes_test()) == (False, True)
    for one, other in zip(usual.module.parameters(), official.module.parameters(), strict=True):
        assert torch.equal(one, other)
    assert "normalise" not in official.stages()[0].fields
    test = LevelSplit(painted(normal_maps(6, seed=2)))
    official.observe_test(test)
    batch = test.take(range(6))
    likelihoods = list(official._log_likelihoods(batch))
    expected = torch.zeros(6, 32, 32)
    for values in likelihoods:
        relative = (values - values.max()).exp()
        assert relative.max() == 1
        expected += F.interpolate(relative[:, None], (32, 32), mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(official.predict(batch).anomaly_map, -expected.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="normalise must be 'train_max' or 'test_max', got 'max'"):
        small(normalise="max")
