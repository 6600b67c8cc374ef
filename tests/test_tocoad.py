"""ToCoAD: its losses, its two stages and what each depends on, its memory bank."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from small_splits import toy_context
from torch import nn
from two_workers import run_on_two_workers

from harness.contracts import AdgridError, Batch, SampleKey, Share
from harness.stages import train_stage
from harness.workers import Workers
from methods.components.collectives import SharedBatchNorm
from methods.patchcore import Config as PatchCoreConfig
from methods.patchcore import PatchCore
from methods.tocoad import ToCoAD, contrastive
from methods.tocoad.anomalies import Painter
from methods.tocoad.contrastive import agreement_loss, parting_loss, similarity
from methods.tocoad.discriminative import DiscriminativeNetwork
from methods.tocoad.norms import share_batch_norms
from methods.tocoad.settings import CONTRAST_FIELDS, GUIDE_FIELDS, MEMORY_FIELDS, Config, choose_levels
from methods.tocoad.spread import Spread

SIZE = (32, 32)
SHAPES = ((6, 8, 8), (8, 4, 4), (10, 2, 2))
SMALL = Config(
    guide_epochs=2,
    guide_batch_size=4,
    decoder_blocks=1,
    contrast_epochs=2,
    contrast_batch_size=4,
    projector_width=6,
    predictor_width=3,
    backbone_lr=1e-3,
)


class Backbone(nn.Module):
    """Three levels of random convolutions."""

    def __init__(self):
        super().__init__()
        widths = (3, *(shape[0] for shape in SHAPES))
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.steps = nn.ModuleList(
                nn.Conv2d(before, after, kernel, stride=kernel)
                for before, after, kernel in zip(widths, widths[1:], (4, 2, 2), strict=False)
            )
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.2)

    def forward(self, images):
        levels = [4 * images - 1.6]  # grey is in the middle of the range
        for step in self.steps:
            levels.append(torch.tanh(step(levels[-1])))
        return tuple(levels[1:])


class Images:
    """Grey images with a ramp and some noise."""

    def __init__(self, num, seed=0):
        generator = torch.Generator().manual_seed(seed)
        ramp = torch.linspace(0.3, 0.5, SIZE[1])
        self.pixels = (ramp + 0.05 * torch.rand(num, 1, *SIZE, generator=generator)).repeat(1, 3, 1, 1)
        self.samples = tuple(key(f"{seed}-{i}") for i in range(num))

    def __len__(self):
        return len(self.samples)

    def take(self, indices):
        rows = list(indices)
        return Batch(samples=tuple(self.samples[i] for i in rows), images=self.pixels[rows])

    def __iter__(self):
        for begin in range(0, len(self), 3):
            yield self.take(range(begin, min(begin + 3, len(self))))


def key(name):
    return SampleKey(path=f"/{name}.png", category="toy", sample_id=str(name))


def context(shapes=SHAPES, **changes):
    frozen = Backbone()

    @torch.no_grad()
    def encode(images):
        return frozen(images)

    settings = {"image_size": SIZE, "encode": encode, "make_backbone": Backbone}
    return toy_context(shapes=shapes, **(settings | changes))


def make(config=SMALL, **changes):
    return ToCoAD(dataclasses.replace(config, **changes), context())


def whole(num, epoch=0, step=0):
    return Share(epoch=epoch, step=step, num_images=num, positions=tuple(range(num)))


def stage_of(number, **changes):
    """A stage at the beginning of its first epoch, and the images."""
    train, stage = Images(5), make(**changes).stages()[number]
    stage.module.train()
    stage.begin_epoch(train, 0)
    return stage, train


def first_step(stage, train, positions=None):
    """Loss of the first step after its backward pass."""
    positions = range(len(train)) if positions is None else positions
    share = Share(epoch=0, step=0, num_images=len(train), positions=tuple(positions))
    loss = next(stage.losses(train.take(positions), share))
    loss.backward()
    return loss.detach()


def maps(*rows):
    """(1, E, 1, P) from P feature vectors."""
    return torch.tensor(rows, dtype=torch.float32).T[None, :, None]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- settings -------------------------------------------------------------------------------------------------------


def test_every_setting_belongs_to_one_stage_or_to_the_memory_bank():
    named = [*GUIDE_FIELDS, *CONTRAST_FIELDS, *MEMORY_FIELDS]
    assert sorted(named) == sorted(field.name for field in dataclasses.fields(Config))


def test_what_the_paper_states_is_the_default():
    config = Config()
    stated = (config.stages, config.generator, config.guide_loss, config.focal_alpha, config.focal_gamma)
    assert stated == ("I+II", "perlin", "focal", 0.5, 2.0)
    assert config.contrast == "simsiam"
    assert choose_levels(config.contrast_levels, 4) == [2, 3]  # levels 3 and 4, counted from 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": "III"}, "stages must be one of none, I, II, I\\+II"),
        ({"generator": "noise"}, "generator must be one of"),
        ({"guide_lr": 0.0}, "guide_lr must be positive"),
        ({"backbone_lr": float("nan")}, "backbone_lr must be positive"),
        ({"negative_weight": -1.0}, "negative_weight must not be negative"),
        ({"contrast_epochs": 0}, "contrast_epochs must be at least 1"),
        ({"focal_alpha": 1.5}, r"focal_alpha must be in \[0, 1\]"),
        ({"ema_momentum": 1.0}, "ema_momentum"),
        ({"margin": 1.0}, "margin"),
        ({"view_jitter": 0.7}, "view_jitter"),
        ({"coreset_ratio": 0.0}, "coreset_ratio"),
        ({"projection": 0}, "projection"),
        ({"patch_size": 2}, "patch_size"),
        ({"memory_levels": ()}, "memory_levels must be positions"),
        ({"contrast_levels": (0, 1)}, "contrast_levels must be positions"),
        ({"guide_score": 1.0, "stages": "II"}, "guide_score weighs .* needs stages: I\\+II"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_levels_are_counted_from_either_end_and_missing_ones_left_out():
    assert choose_levels((3, 4), 4) == choose_levels((-2, -1), 4) == [2, 3]
    assert choose_levels((-3, -2), 2) == [0]
    assert choose_levels((2, -1), 2) == [1]
    with pytest.raises(AdgridError, match=r"memory_levels \[4\] names none of the 3 levels"):
        make(memory_levels=(4,))
    with pytest.raises(AdgridError, match="contrast_levels"):
        make(contrast_levels=(-5,))


# --- losses by hand -------------------------------------------------------------------------------------------------


def test_the_agreement_is_half_of_either_direction_by_hand():
    first_p, second_z = maps([1, 0], [3, 4]), maps([2, 0], [4, 3])  # cosines 1 and 24/25
    second_p, first_z = maps([0, 1], [1, 1]), maps([0, -5], [2, 0])  # cosines -1 and 1/sqrt 2
    loss = agreement_loss(first_p, first_z, second_p, second_z)
    expected = -0.5 * (1 + 24 / 25) / 2 - 0.5 * (-1 + math.sqrt(0.5)) / 2
    torch.testing.assert_close(loss, torch.tensor([expected]))
    torch.testing.assert_close(agreement_loss(second_p, second_z, first_p, first_z), loss)  # symmetric


def test_the_parting_is_weighted_by_the_guide_by_hand():
    anomalous, normal = maps([1, 0], [3, 4], [0, 1], [1, 0]), maps([1, 0], [4, 3], [0, -1], [1, 0])
    weights = torch.tensor([[[1.0, 0.5, 1.0, 0.0]]])
    # cosines 1, 0.96, -1, 1; the third is far enough and the fourth does not count
    torch.testing.assert_close(parting_loss(anomalous, normal, weights, 0.0), torch.tensor([1 + 0.48]))
    torch.testing.assert_close(parting_loss(anomalous, normal, weights, 0.9), torch.tensor([0.1 + 0.03]))
    torch.testing.assert_close(parting_loss(anomalous, normal, weights, -1.0), torch.tensor([2 + 0.98]))


def test_no_gradient_reaches_a_target():
    predicted, target = (randn(2, 3, 2, 2, seed=seed).requires_grad_() for seed in range(2))
    weights = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(2))
    total = agreement_loss(predicted, target, predicted, target) + parting_loss(predicted, target, weights, 0.0)
    total.sum().backward()
    assert target.grad is None
    assert predicted.grad.abs().sum() > 0
    assert not similarity(predicted.detach(), target).requires_grad


@pytest.mark.parametrize(("loss", "alpha", "gamma"), [("focal", 0.5, 2), ("focal", 0.8, 3), ("cross_entropy", 0.5, 2)])
def test_the_loss_of_stage_one_is_its_formula(loss, alpha, gamma):
    stage, _ = stage_of(0, guide_loss=loss, focal_alpha=alpha, focal_gamma=gamma)
    logits, masks = randn(2, 2, 3, 5), randn(2, 3, 5, seed=1) > 0
    p = logits.double().exp()[:, 1] / logits.double().exp().sum(dim=1)
    p_true, alpha_true = torch.where(masks, p, 1 - p), torch.where(masks, alpha, 1 - alpha)
    expected = -alpha_true * (1 - p_true) ** gamma * p_true.log() if loss == "focal" else -p_true.log()
    torch.testing.assert_close(stage.loss(logits, masks).double(), expected.mean(dim=(1, 2)), rtol=1e-5, atol=1e-7)


# --- stage I --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "size", "finest"),
    [
        (SHAPES, (32, 32), (8, 8)),
        (((6, 10, 13), (8, 5, 7), (10, 3, 4)), (40, 52), (10, 13)),
        (((8, 2, 2),) * 4, (28, 28), (8, 8)),  # a plain ViT: 14 pixels, so 7 and 3.5
        (((8, 4, 4),), (32, 32), (8, 8)),
    ],
)
@pytest.mark.parametrize("skips", [True, False])
def test_the_decoder_goes_from_the_deepest_level_to_four_pixels(shapes, size, finest, skips):
    config = dataclasses.replace(SMALL, decoder_skips=skips)
    network = DiscriminativeNetwork(config, toy_context(shapes=shapes, image_size=size)).eval()
    levels = [randn(2, *shape) for shape in shapes]
    logits = network(levels)
    assert logits.shape == (2, 2, *size)
    assert logits.dtype == torch.float32
    assert network.grids[-1] == finest
    assert [block[0].change[2][0].out_channels for block in network.blocks][: len(shapes)] == [
        max(8, width) for width, _, _ in shapes[::-1]
    ]
    torch.testing.assert_close(network([level[:1] for level in levels]), logits[:1], rtol=1e-4, atol=1e-5)
    for number in range(len(levels)):
        changed = [level + (index == number) for index, level in enumerate(levels)]
        seen = not torch.equal(network(changed), logits)
        assert seen == (skips or number == len(levels) - 1)


def test_stage_one_trains_the_decoder_alone():
    stage, train = stage_of(0)
    loss = first_step(stage, train)
    assert all(parameter.grad is not None for parameter in stage.module.parameters())
    (optimizer,) = stage.configure_optimizers()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in stage.module.parameters()]
    drawn = [stage.painter.draw(*pair, 0) for pair in zip(train.pixels, train.samples, strict=True)]
    images, masks = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    logits = stage.module(stage.context.encode(images))
    torch.testing.assert_close(loss, stage.loss(logits, masks).mean().detach(), rtol=1e-4, atol=1e-6)


def paint_square(image, generator, grey=False):
    """A white square, easier to learn than textures."""
    top, left = torch.randint(3, (2,), generator=generator).tolist()
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[8 * top : 8 * top + 16, 8 * left : 8 * left + 8] = True
    return torch.where(mask, 1.0, image), mask


def test_stage_one_finds_anomalies_in_images_it_has_not_seen():
    method = make(guide_epochs=25, stages="I", guide_lr=3e-3)
    (stage,) = method.stages()
    stage.painter.paint = paint_square
    train_stage(stage, Images(12), 0)
    test = Images(20, seed=1)
    drawn = [stage.painter.draw(*pair, 0) for pair in zip(test.pixels, test.samples, strict=True)]
    images, masks = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    method.fit(Images(12))
    prediction = method.predict(Batch(samples=test.samples, images=images))
    assert prediction.anomaly_map.shape == (20, *SIZE)
    assert prediction.image_score is None
    assert 0 <= prediction.anomaly_map.min() <= prediction.anomaly_map.max() <= 1
    assert roc_auc_score(masks.flatten(), prediction.anomaly_map.flatten()) > 0.95


def test_rates_fall_along_half_a_cosine():
    for stage in make(guide_epochs=8, contrast_epochs=4).stages():
        half = stage.epochs / 2
        assert [stage.lr_factor(x) for x in (0, half, 2 * half)] == pytest.approx([1, 0.5, 0])
        assert stage.lr_factor(half / 2) == pytest.approx(0.5 + math.sqrt(0.5) / 2)


# --- synthetic anomalies and views ----------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", ["perlin", "cutpaste", "seamless"])
def test_draws_belong_to_one_image_and_epoch_and_change_what_the_mask_says(generator):
    train = Images(6)
    train.pixels[3] = randn(3, *SIZE).sigmoid()  # for patches that differ from what they cover
    painter = Painter(dataclasses.replace(SMALL, generator=generator, anomaly_probability=1.0), context())
    painter.sources = train
    num_changed = 0
    for epoch in range(3):
        for image, sample in zip(train.pixels, train.samples, strict=True):
            painted, mask = painter.draw(image, sample, epoch)
            again, again_mask = painter.draw(image, sample, epoch)
            assert torch.equal(painted, again)
            assert torch.equal(mask, again_mask)
            assert torch.equal(painted[:, ~mask], image[:, ~mask])
            num_changed += bool(mask.any() and (painted != image).any())
    assert num_changed > 9
    first, later = (painter.draw(train.pixels[3], train.samples[3], epoch)[0] for epoch in (0, 1))
    assert not torch.equal(first, later)


def test_seamless_patches_come_from_other_images():
    train = Images(2)
    train.pixels[1] = randn(3, *SIZE).sigmoid()
    painter = Painter(dataclasses.replace(SMALL, generator="seamless"), context())
    painter.sources = train
    flat = torch.full((3, *SIZE), 0.5)
    roughness = [(painter.paint(flat, torch.Generator().manual_seed(seed))[0] - flat).abs().max() for seed in range(12)]
    assert max(roughness) > 5 * min(roughness)


def test_half_of_the_images_of_stage_one_stay_as_they_are():
    painter = Painter(dataclasses.replace(SMALL, generator="cutpaste"), context())
    image = randn(3, *SIZE).sigmoid()
    changed = [bool(painter.draw(image, key(i), 0)[1].any()) for i in range(200)]
    assert 70 < sum(changed) < 130


def test_the_anomaly_lies_in_the_second_view():
    painter = Painter(dataclasses.replace(SMALL, generator="cutpaste", view_jitter=0.1), context())
    image = randn(3, *SIZE).sigmoid()
    first, second, anomalous = painter.draw_views(image, key(0), 0, True)
    assert not torch.equal(first, second)
    same = (anomalous == second).all(dim=0)
    assert 0.5 < same.float().mean() < 1
    pair = painter.draw_views(image, key(0), 0, False)
    assert torch.equal(pair[0], first)
    assert torch.equal(pair[1], second)
    assert all(0 <= view.min() <= view.max() <= 1 for view in (first, second, anomalous))


@pytest.mark.parametrize("match_colour", [True, False])
def test_textures_have_no_colour_where_the_image_has_none(match_colour):
    changes = {"match_colour": match_colour, "anomaly_probability": 1.0, "view_noise": 0.0}
    painter = Painter(dataclasses.replace(SMALL, **changes), context())
    grey, coloured = (randn(channels, *SIZE).sigmoid().expand(3, *SIZE) for channels in (1, 3))
    drawn = [(painter.draw(image, key(i), 0)[0], image) for image in (grey, coloured) for i in range(8)]
    drawn += [(painter.draw_views(image, key(i), 0, True)[2], image) for image in (grey, coloured) for i in range(8)]
    for image in (grey, coloured):
        changed = [painted for painted, original in drawn if original is image and not torch.equal(painted, original)]
        assert len(changed) > 4
        assert any(painted.std(dim=0).max() > 0.05 for painted in changed) == (image is coloured or not match_colour)


def test_views_without_jitter_and_noise_are_the_image():
    painter = Painter(dataclasses.replace(SMALL, view_jitter=0.0, view_noise=0.0), context())
    image = Images(1).pixels[0]
    for view in painter.draw_views(image, key(0), 0, False):
        torch.testing.assert_close(view, image, rtol=1e-5, atol=1e-5)


def test_a_missing_folder_of_textures_is_named_before_training():
    with pytest.raises(AdgridError, match="textures: no folder /nowhere"):
        make(textures="/nowhere").stages()


# --- stage II -------------------------------------------------------------------------------------------------------


class FixedGuide:
    """Says of every image that some of its places are anomalous."""

    def __init__(self, value=1.0):
        self.value = value

    def __call__(self, images):
        probability = torch.zeros(len(images), *SIZE)
        probability[:, :16, :8] = self.value
        return probability


def plain_step(stage, batch, detach=True):
    """The first step's loss in plain words, on a copy of the stage's network; and that copy, after backward."""
    network, config = copy.deepcopy(stage.module), stage.config
    pairs = list(zip(batch.images, batch.samples, strict=True))
    views = [torch.stack(part) for part in zip(*(stage.painter.draw_views(*p, 0, True) for p in pairs), strict=True)]
    num = len(pairs)
    levels = network.backbone(torch.cat(views))
    averaged = network.target[0](torch.cat(views)) if config.contrast == "byol" else None
    loss = 0.0
    for number, index in enumerate(choose_levels(config.contrast_levels, len(SHAPES))):
        z = network.projectors[number](levels[index])
        p = network.predictors[number](z)
        target = z.detach() if detach else z
        if averaged is not None:
            target = network.target[1][number](averaged[index][: 2 * num]).detach()
        p, target = p.movedim(1, -1), target.movedim(1, -1)  # (3 b, h, w, E)

        def cos(a, b):
            return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))

        agreement = 0.5 * cos(p[:num], target[num : 2 * num]) + 0.5 * cos(p[num : 2 * num], target[:num])
        loss = loss - config.positive_weight * agreement.mean()
        weight = F.interpolate(stage.guide(views[2])[:, None], p.shape[1:3], mode="area")[:, 0]
        apart = (cos(p[2 * num :], target[:num]) - config.margin).clamp(min=0)
        loss = loss + config.negative_weight * (weight * apart).sum() / max(weight.sum().item(), 1)
    loss = loss / len(network.projectors)
    loss.backward()
    return loss.detach(), network


STEPS = [
    {"contrast": "simsiam"},
    {"contrast": "byol", "margin": 0.2},
    {"contrast": "cosine", "projector_layers": 1},
    {"contrast": "simsiam", "projector_layers": 0, "contrast_levels": (2,), "negative_weight": 3.0},
    {"contrast": "simsiam", "projector_layers": 3, "positive_weight": 0.5, "margin": -0.5},
]


@pytest.mark.parametrize("changes", STEPS)
def test_a_step_of_stage_two_is_its_plain_form(changes):
    stage, train = stage_of(1, **changes)
    expected, reference = plain_step(stage, train.take(range(5)))
    loss = first_step(stage, train)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for (name, own), plain in zip(stage.module.named_parameters(), reference.parameters(), strict=True):
        if name.startswith("target") or plain.grad is None:
            assert own.grad is None
        else:
            torch.testing.assert_close(own.grad, plain.grad, rtol=1e-3, atol=1e-4)


def test_the_target_side_of_a_step_gets_no_gradient():
    stage, train = stage_of(1)
    first_step(stage, train)
    _, leaking = plain_step(stage, train.take(range(5)), detach=False)
    own, leaked = (network.backbone.steps[0].weight.grad for network in (stage.module, leaking))
    assert (own - leaked).norm() > 0.1 * own.norm()  # so the plain form above would have told


def test_the_frozen_guide_gets_no_gradient_and_does_not_change():
    method, train = make(), Images(8)
    _, stage = method.stages()
    before = copy.deepcopy(method.guide.network.state_dict())
    stage.module.train()
    stage.begin_epoch(train, 0)
    assert not stage.guide(train.pixels).requires_grad
    first_step(stage, train)
    assert all(parameter.grad is None for parameter in method.guide.network.parameters())
    assert all(parameter.requires_grad for parameter in method.guide.network.parameters())  # so it is stopped, not off
    train_stage(stage, train, 0)
    after = method.guide.network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    trained = {id(p) for optimizer in stage.configure_optimizers() for g in optimizer.param_groups for p in g["params"]}
    assert trained == {id(p) for p in stage.module.parameters()}


def test_the_guide_weighs_the_negative_term_over_the_whole_batch():
    stage, train = stage_of(1, contrast_levels=(2,), positive_weight=0.0)
    stage.guide = FixedGuide(0.5)
    loss = first_step(stage, train)
    batch = train.take(range(5))
    pairs = zip(batch.images, batch.samples, strict=True)
    views = [torch.stack(part) for part in zip(*(stage.painter.draw_views(*p, 0, True) for p in pairs), strict=True)]
    network = copy.deepcopy(stage.module)
    _, (z,) = network.project(torch.cat(views))
    (p,) = network.predict([z])
    cosine = similarity(p[10:], z[:5]).clamp(min=0)  # (5, 4, 4), places of 8 x 8 pixels
    # Of each image, two rows of one column are anomalous, all with the same weight.
    torch.testing.assert_close(loss, cosine[:, :2, :1].mean().detach(), rtol=1e-4, atol=1e-6)
    stage.guide = FixedGuide(0.01)  # 10 places of 0.01: less than one place together, so they count as they are
    expected = 0.01 * cosine[:, :2, :1].sum().detach()
    torch.testing.assert_close(first_step(stage, train), expected, rtol=1e-3, atol=1e-5)
    stage.guide = FixedGuide(0.0)
    assert first_step(stage, train) == 0


def test_the_moving_average_follows_each_step_by_hand():
    stage, train = stage_of(1, contrast="byol", ema_momentum=0.75)
    network = stage.module
    sources = [*network.backbone.parameters(), *network.projectors.parameters()]
    targets = list(network.target.parameters())
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))
    assert not any(target.requires_grad for target in targets)
    before = [target.clone() for target in targets]
    (optimizer,) = stage.configure_optimizers()
    losses = stage.losses(train.take(range(5)), whole(5))
    next(losses).backward()
    optimizer.step()
    assert all(torch.equal(target, old) for target, old in zip(targets, before, strict=True))
    assert next(losses, None) is None
    for target, old, source in zip(targets, before, sources, strict=True):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * source)
    assert any((target != old).any() for target, old in zip(targets, before, strict=True))


def test_without_a_guide_views_agree_and_nothing_else():
    stage, train = stage_of(0, stages="II")
    assert stage.guide is None
    loss = first_step(stage, train)
    other, _ = stage_of(1, negative_weight=0.0)
    assert other.guide is None
    torch.testing.assert_close(first_step(other, train), loss)
    assert set(stage.fields) == set(CONTRAST_FIELDS)


def test_backbone_and_heads_have_their_own_rates_and_without_heads_there_is_one_group():
    stage, _ = stage_of(1, backbone_lr=1e-4, head_lr=2e-3, weight_decay=0.1)
    (optimizer,) = stage.configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 2e-3]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    stage, train = stage_of(1, contrast="cosine", projector_layers=0)
    (optimizer,) = stage.configure_optimizers()
    assert len(optimizer.param_groups) == 1
    assert first_step(stage, train).isfinite()


def test_training_parts_anomalies_from_normal_features():
    _, stage = make(contrast_epochs=20).stages()
    stage.painter.paint = paint_square
    stage.guide = lambda images: (images == 1).all(dim=1).float()
    history = train_stage(stage, Images(8), 0)
    assert history[-1] < history[0] - 0.3
    assert stage.warnings == []


def test_training_in_bfloat16_comes_out_alike():
    rough, exact = make(), make()
    for number in range(2):
        history = train_stage(rough.stages()[number], Images(8), 0, precision="bfloat16")
        assert history == pytest.approx(train_stage(exact.stages()[number], Images(8), 0), rel=0.05, abs=0.02)


# --- collapse -------------------------------------------------------------------------------------------------------


def test_the_spread_by_hand():
    spread = Spread()
    spread.add(maps([3, 0], [0, 2]))
    spread.add(maps([-1, 0], [0, -4]))
    # Both coordinates are 1, 0, -1, 0 in some order: deviation sqrt(1/2), times sqrt 2.
    assert spread.value().item() == pytest.approx(1)
    skewed = Spread()
    skewed.add(maps([1, 0], [5, 0], [0, 1], [9, 0]))  # 1, 1, 0, 1 and 0, 0, 1, 0
    assert skewed.value().item() == pytest.approx(math.sqrt(3 / 16) * math.sqrt(2))
    equal = Spread()
    equal.add(maps([1, 2], [2, 4], [3, 6]))
    assert equal.value().item() == pytest.approx(0, abs=1e-3)
    even = Spread()
    even.add(randn(50, 16, 8, 8))
    assert even.value().item() == pytest.approx(1, abs=0.01)


def test_the_spread_is_read_once_an_epoch(monkeypatch):
    read = []
    value = Spread.value
    monkeypatch.setattr(contrastive.Spread, "value", lambda self: read.append(self) or value(self))
    stage = make(contrast_epochs=3).stages()[1]
    assert stage.watched == {}
    seen = []
    train_stage(
        stage, Images(9), 0, report=lambda *_: seen.append({name: values[-1] for name, values in stage.watched.items()})
    )
    assert len(read) == 3 * 4  # 3 epochs, 2 levels of features and projections
    assert len(seen) == 3
    assert all(
        set(watch) == {f"{kind}_std_{n}" for kind in ("feature", "projection") for n in (2, 3)} for watch in seen
    )
    assert seen[0] != seen[1] != seen[2]
    assert all(0 < value <= 1.01 for watch in seen for value in watch.values())


def test_a_collapse_is_told_once_for_each_spread():
    stage = make(contrast_epochs=3, collapse_threshold=0.05).stages()[1]
    with torch.no_grad():
        stage.module.backbone.steps[2].weight.zero_()  # the deepest level is the same everywhere
        stage.module.backbone.steps[2].bias.fill_(1)
        stage.module.backbone.requires_grad_(False)
    train_stage(stage, Images(8), 0)
    assert len(stage.warnings) == len({warning.split()[0] for warning in stage.warnings})
    assert any(warning.startswith("feature_std_3 fell to ") for warning in stage.warnings)
    assert not any(warning.startswith("feature_std_2") for warning in stage.warnings)
    assert all("collapse_threshold 0.05" in warning for warning in stage.warnings)


# --- what depends on what -------------------------------------------------------------------------------------------

OTHER_GUIDES = {
    "generator": "cutpaste",
    "largest_beta": 0.1,
    "match_colour": False,
    "anomaly_probability": 1.0,
    "decoder_width": 2.0,
    "decoder_blocks": 2,
    "decoder_skips": False,
    "guide_loss": "cross_entropy",
    "focal_alpha": 0.9,
    "focal_gamma": 0.0,
    "guide_epochs": 1,
    "guide_batch_size": 2,
    "guide_lr": 1e-2,
}
OTHER_CONTRASTS = {
    "contrast": "byol",
    "contrast_levels": (-1,),
    "projector_layers": 1,
    "projector_width": 5,
    "predictor_width": 2,
    "positive_weight": 0.2,
    "negative_weight": 0.2,
    "margin": -0.3,
    "view_jitter": 0.2,
    "view_noise": 0.1,
    "contrast_epochs": 1,
    "contrast_batch_size": 2,
    "backbone_lr": 1e-2,
    "head_lr": 1e-2,
    "weight_decay": 10.0,
}
OTHER_MEMORIES = {
    "memory_levels": (1,),
    "coreset_ratio": 0.5,
    "projection": 4,
    "patch_size": 1,
    "embed_width": 8,
    "target_width": 8,
    "num_neighbours": 2,
    "distance": "euclidean",
    "reweighting": True,
    "guide_score": 2.0,
    "aggregation": "concat",
    "num_starting_points": 2,
    "num_reweighting_neighbours": 3,
}


def trained(**changes):
    """State of each stage after its training."""
    states = []
    for stage in make(**changes).stages():
        train_stage(stage, Images(6), 0)
        states.append({name: value.clone() for name, value in stage.state_dict().items()})
    return states


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def usual():
    return trained()


def test_no_setting_of_stage_two_changes_a_number_of_stage_one(usual):
    rest = {"freeze_batch_norm": False, "ema_momentum": 0.5, "collapse_threshold": 0.5}
    assert set(OTHER_CONTRASTS) | set(rest) | {"stages"} == set(CONTRAST_FIELDS)
    assert set(OTHER_MEMORIES) == set(MEMORY_FIELDS)
    assert same(trained(**OTHER_CONTRASTS, **rest, **OTHER_MEMORIES)[0], usual[0])
    assert same(trained(stages="I")[0], usual[0])
    assert make().stages()[0].fields == GUIDE_FIELDS


def test_no_setting_of_the_memory_bank_changes_a_number_of_stage_two(usual):
    assert same(trained(**OTHER_MEMORIES)[1], usual[1])
    assert set(make().stages()[1].fields) == {*GUIDE_FIELDS, *CONTRAST_FIELDS}


@pytest.mark.parametrize("field", OTHER_GUIDES)
def test_every_setting_of_stage_one_matters_to_both(field, usual):
    guide, contrast = trained(**{field: OTHER_GUIDES[field]})
    assert not same(guide, usual[0])
    assert not same(contrast, usual[1])


@pytest.mark.parametrize("field", OTHER_CONTRASTS)
def test_every_setting_of_stage_two_matters_to_it(field, usual):
    assert not same(trained(**{field: OTHER_CONTRASTS[field]})[1], usual[1])


def test_a_stage_two_goes_on_from_a_stored_stage_one(usual):
    method = make(margin=0.1)
    first, second = method.stages()
    first.load_state_dict(usual[0])
    train_stage(second, Images(6), 0)
    assert same(second.state_dict(), trained(margin=0.1)[1])


def test_first_weights_are_drawn_by_name_and_leave_other_draws_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = make()
    assert torch.equal(torch.rand(1), expected)
    second = make()
    for one, other in zip(first.stages(), second.stages(), strict=True):
        assert same(one.state_dict(), other.state_dict())


# --- workers --------------------------------------------------------------------------------------------------------

CASES = [(0, {}), (0, {"generator": "seamless"}), (1, {}), (1, {"contrast": "byol"}), (1, {"margin": -0.5})]


def one_share(number, changes, positions):
    """Loss and gradients of the first step, as far as these images go."""
    stage, train = stage_of(number, **changes)
    loss = first_step(stage, train, positions)
    return loss, [parameter.grad for parameter in stage.module.parameters() if parameter.grad is not None]


def train_on(workers):
    method, train = make(contrast="byol"), Images(6)
    histories = [train_stage(stage, train, 0, workers=workers) for stage in method.stages()]
    states = [stage.state_dict() for stage in method.stages()]
    return histories, states, method.stages()[1].watched


def work(rank):
    steps = [one_share(number, changes, range(rank, 5, 2)) for number, changes in CASES]
    return steps, train_on(Workers(rank=rank, size=2))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return run_on_two_workers(work, tmp_path_factory.mktemp("workers"))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_shares_of_two_workers_add_up_to_the_whole_batch(told, case):
    loss, gradients = one_share(*CASES[case], range(5))
    (first, first_gradients), (second, second_gradients) = (worker[0][case] for worker in told)
    torch.testing.assert_close(first + second, loss, rtol=1e-5, atol=1e-6)
    for one, other, expected in zip(first_gradients, second_gradients, gradients, strict=True):
        torch.testing.assert_close(one + other, expected, rtol=1e-3, atol=1e-4)


def test_two_workers_train_what_one_does(told):
    begun, (histories, states, watch) = make(contrast="byol"), train_on(Workers())
    for _, (own_histories, own_states, own_watch) in told:
        for own, history in zip(own_histories, histories, strict=True):
            assert own == pytest.approx(history, rel=1e-3, abs=1e-4)
        for own, state, start in zip(own_states, states, (stage.state_dict() for stage in begun.stages()), strict=True):
            names = [name for name, value in start.items() if value.is_floating_point()]
            off, moved = (
                torch.cat([(first[name] - second[name]).flatten() for name in names]).norm()
                for first, second in ((own, state), (state, start))
            )
            assert off < 0.02 * moved
        assert own_watch.keys() == watch.keys()
        for name, values in watch.items():
            assert own_watch[name] == pytest.approx(values, rel=1e-3)
    for one, other in zip(told[0][1][1], told[1][1][1], strict=True):
        assert same(one, other)


# --- batch norms of the backbone ------------------------------------------------------------------------------------


class BatchNormAct2d(nn.BatchNorm2d):
    """As in timm: the activation is part of the norm."""

    def __init__(self, width):
        super().__init__(width)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, values):
        return self.act(self.drop(super().forward(values)))


class Normed(Backbone):
    """The backbone with batch norms of both kinds, frozen as the harness freezes them."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), BatchNormAct2d(3)])
        self.freeze_batch_norm = True
        self.train()

    def forward(self, images):
        return super().forward(self.norms[1](self.norms[0](images)))

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_batch_norm:
            self.norms.eval()
        return self


def test_frozen_batch_norms_keep_their_statistics_and_others_follow_the_images():
    for freeze in (True, False):
        config = dataclasses.replace(SMALL, freeze_batch_norm=freeze, stages="II")
        method = ToCoAD(config, context(make_backbone=Normed))
        train_stage(method.stages()[0], Images(8), 0)
        for norm in method.network.backbone.norms:
            assert (norm.running_mean.abs().max() == 0) == freeze
        assert not method.network.backbone.training


def test_shared_batch_norms_give_what_the_backbones_own_would():
    plain, shared = Normed(), Normed()
    plain.freeze_batch_norm = False
    plain.train()
    share_batch_norms(shared)
    images = Images(4).pixels
    for _ in range(2):
        for one, other in zip(plain(images), shared(images), strict=True):
            torch.testing.assert_close(one, other)
    assert all(isinstance(norm, SharedBatchNorm) for norm in shared.norms)
    assert plain.state_dict().keys() == shared.state_dict().keys()
    for one, other in zip(plain.state_dict().values(), shared.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)
    assert set(map(id, shared.norms.parameters())) <= set(map(id, shared.parameters()))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.BatchNorm2d(3, affine=False)])
def test_a_batch_norm_of_an_unknown_kind_is_refused(norm):
    with pytest.raises(AdgridError, match=r"norm '0' \(BatchNorm.d\) cannot be shared"):
        share_batch_norms(nn.Sequential(norm))


# --- the memory bank ------------------------------------------------------------------------------------------------


class Levels:
    """Images as levels of the frozen backbone, all or some."""

    def __init__(self, images, some):
        self.images, self.some, self.samples = images, some, images.samples

    def __len__(self):
        return len(self.images)

    def __iter__(self):
        for batch in self.images:
            yield self.batch(batch.images)

    def batch(self, images):
        with torch.no_grad():
            levels = Backbone()(images)
        return Batch(samples=self.samples[: len(images)], levels=tuple(levels[index] for index in self.some))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reweighting": True, "distance": "euclidean", "num_neighbours": 3},
        {"embed_width": 32, "target_width": 16, "projection": 4},
        {"coreset_ratio": 1.0},
    ],
)
def test_without_stages_it_is_patchcore(changes):
    config = dataclasses.replace(SMALL, stages="none", **changes)
    assert (ToCoAD.inputs(config), ToCoAD.inputs(SMALL)) == ("features", "images")
    method = ToCoAD(config, context())
    assert method.stages() == []
    other = PatchCore(PatchCoreConfig(**changes), context(shapes=SHAPES[:2]))
    train, test = Images(8), Images(3, seed=1)
    method.fit(Levels(train, (0, 1, 2)))
    other.fit(Levels(train, (0, 1)))
    own = method.predict(Levels(test, (0, 1, 2)).batch(test.pixels))
    theirs = other.predict(Levels(test, (0, 1)).batch(test.pixels))
    assert torch.equal(own.anomaly_map, theirs.anomaly_map)
    assert torch.equal(own.image_score, theirs.image_score)


def test_the_memory_bank_holds_features_of_the_tuned_backbone():
    method, train = make(stages="II", coreset_ratio=1.0, patch_size=1), Images(4)
    train_stage(method.stages()[0], train, 0)
    method.fit(train)
    prediction = method.predict(train.take(range(4)))
    assert prediction.anomaly_map.shape == (4, 8, 8)
    assert prediction.anomaly_map.max() < 1e-10  # each patch is in the bank
    with torch.no_grad():
        levels = method.network.backbone(train.pixels)
    torch.testing.assert_close(method.memory.entries[:, :6], levels[0].movedim(1, -1).flatten(0, 2))
    assert not torch.allclose(levels[0], Backbone()(train.pixels)[0])


def test_a_guide_may_weigh_the_scores_by_hand():
    plain, weighted = make(), make(guide_score=2.0)
    test = Images(3, seed=1).take(range(3))
    for method in (plain, weighted):
        method.fit(Images(6))
    weighted.guide = FixedGuide(0.5)  # the upper half of the leftmost quarter
    before, after = plain.predict(test), weighted.predict(test)
    factor = torch.ones(8, 8)
    factor[:4, :2] = 2.0  # 1 + 2 * 0.5
    torch.testing.assert_close(after.anomaly_map, before.anomaly_map * factor)
    torch.testing.assert_close(after.image_score, after.anomaly_map.amax(dim=(1, 2)))


@pytest.mark.parametrize("changes", [{}, {"stages": "I"}, {"stages": "II"}, {"guide_score": 1.0}])
def test_a_saved_method_predicts_the_same(changes):
    method, train = make(**changes), Images(6)
    for stage in method.stages():
        train_stage(stage, train, 0)
    method.fit(train)
    test = Images(3, seed=1).take(range(3))
    restored = make(**changes)
    restored.load_state_dict({name: value.clone() for name, value in method.state_dict().items()})
    assert torch.equal(restored.predict(test).anomaly_map, method.predict(test).anomaly_map)
    parts = {name.split(".")[0] for name in method.state_dict()}
    expected = {"memory_bank", "backbone", "discriminative"}
    if "guide_score" not in changes:
        expected -= {"memory_bank", "backbone"} if changes.get("stages") == "I" else {"discriminative"}
    assert parts == expected


def test_predicting_before_fitting_is_refused():
    with pytest.raises(RuntimeError, match="fit the method"):
        make().predict(Images(1).take([0]))
