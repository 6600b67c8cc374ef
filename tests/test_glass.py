import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from reference.glass import plain_judgement, plain_loss
from two_workers import run_on_two_workers

from harness.contracts import AdgridError, Batch, Context, Preprocessing, SampleKey, Share, derive_seed
from harness.datasets.images import load_image
from harness.registry import build_config
from harness.stages import train_stage
from harness.workers import Workers
from methods.glass import Glass, stage
from methods.glass.local_anomalies import Painter, _fit, draw_region
from methods.glass.settings import Config
from methods.glass.spectrum import judge_distribution
from methods.glass.stage import binary_cross_entropy, truncate

SIZE = (32, 32)
SHAPES = ((4, 4, 4), (6, 2, 2))
SMALL = {"epochs": 3, "batch_size": 4, "hidden_width": 8, "adaptor_lr": 1e-3, "discriminator_lr": 1e-2}


class Images:
    """Grey images with some noise."""

    def __init__(self, num, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.pixels = 0.4 + 0.05 * torch.rand(num, 3, *SIZE, generator=generator)
        self.samples = tuple(SampleKey(path=f"/{i}.png", category="toy", sample_id=str(i)) for i in range(num))

    def __len__(self):
        return len(self.samples)

    def take(self, indices):
        rows = list(indices)
        return Batch(samples=tuple(self.samples[i] for i in rows), images=self.pixels[rows])

    def __iter__(self):
        for begin in range(0, len(self), 3):
            yield self.take(range(begin, min(begin + 3, len(self))))


class Encoder:
    """Two levels of random convolutions, with a count of the images they have seen."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.kernels = [torch.randn(width, 3, 32 // side, 32 // side, generator=generator) for width, side, _ in SHAPES]
        self.num_images = 0

    def __call__(self, images):
        self.num_images += len(images)
        return tuple(torch.nn.functional.conv2d(images, kernel, stride=kernel.shape[2]) for kernel in self.kernels)


def make(**changes):
    context = Context(
        level_shapes=SHAPES,
        image_size=SIZE,
        categories=("toy",),
        device=torch.device("cpu"),
        seed_of=lambda name: derive_seed(name, "toy", 0),
        encode=Encoder(),
    )
    return Glass(Config(**{"distribution": "hypersphere", **SMALL, **changes}), context)


def begun(num=6, **changes):
    """A method, its stage in the middle of training, and the images."""
    method, train = make(**changes), Images(num)
    (training,) = method.stages()
    training.module.train()
    training.begin_epoch(train, 0)
    return method, training, train


def whole(num):
    return Share(epoch=0, step=0, num_images=num, positions=tuple(range(num)))


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


# --- truncation -----------------------------------------------------------------------------------------------------


def test_truncation_keeps_what_is_in_range_and_moves_the_rest_along_its_direction():
    origin = tensor(1, 1)
    features = tensor([1, 2.5], [4, 5], [1.3, 1.4], [1, 1])  # 1.5, 5, 0.5 and 0 away
    moved = truncate(features, origin, torch.tensor(1.0), torch.tensor(2.0))
    expected = tensor([1, 2.5], [1 + 1.2, 1 + 1.6], [1.6, 1.8], [1, 1])
    torch.testing.assert_close(moved, expected)


def test_truncation_of_a_feature_at_its_origin_has_a_finite_gradient():
    features = torch.zeros(1, 3, requires_grad=True)
    truncate(features, torch.zeros(3), torch.tensor(1.0), torch.tensor(2.0)).sum().backward()
    assert features.grad.isfinite().all()


# --- ascent ---------------------------------------------------------------------------------------------------------


def ascent_parts(training, train, seed=3):
    """What `ascend` starts from: first layer's outputs of normal features, noisy features, origin."""
    batch = train.take(range(len(train)))
    patches = training.encoder.patches(training.encoder.levels(batch.images))
    normal = training.module.adapt(patches)
    noise = torch.randn(normal.shape, generator=torch.Generator().manual_seed(seed))
    return normal, training.module.first(normal), normal + 0.3 * noise


def anomaly_losses(training, normal, features):
    """(b, P) loss of being found out, by the discriminator as a whole on all rows."""
    module = training.module
    rows = torch.cat([normal, features]).flatten(0, 1)
    scores = module.rest(module.first(rows))[:, 0].sigmoid()[normal.shape[0] * normal.shape[1] :]
    return -scores.log().view(normal.shape[:2])


def test_a_step_of_ascent_has_its_length_and_follows_the_normalised_gradient():
    _, training, train = begun(ascent_steps=1, ascent_rate=0.01)
    normal, known, start = (part.detach() for part in ascent_parts(training, train))
    moved = training.ascend(known, start, normal, torch.tensor(0.5), normal.shape[0] * normal.shape[1])
    here = start.clone().requires_grad_()
    anomaly_losses(training, normal, here).mean().backward()
    direction = here.grad / here.grad.norm(dim=2, keepdim=True)
    torch.testing.assert_close(moved - start, 0.01 * direction, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close((moved - start).norm(dim=2), torch.full((6, 16), 0.01), rtol=1e-3, atol=1e-6)


def test_ascent_raises_the_loss_of_being_found_out():
    _, training, train = begun(ascent_steps=20, ascent_rate=0.02, project_every=100)
    normal, known, start = (part.detach() for part in ascent_parts(training, train))
    moved = training.ascend(known, start, normal, torch.tensor(0.5), normal.shape[0] * normal.shape[1])
    before, after = anomaly_losses(training, normal, start), anomaly_losses(training, normal, moved)
    assert after.mean() > before.mean()
    assert (after > before).float().mean() > 0.8


@pytest.mark.parametrize("steps", [5, 20])
def test_global_anomalies_end_within_r_and_2_r_of_their_origin(steps):
    _, training, train = begun(ascent_steps=steps)
    normal, known, start = (part.detach() for part in ascent_parts(training, train))
    for radius in (0.05, 5.0):  # all start beyond 2 r, or all within r
        moved = training.ascend(known, start, normal, torch.tensor(radius), normal.shape[0] * normal.shape[1])
        distance = (moved - normal).norm(dim=2)
        assert distance.min() >= radius * (1 - 1e-5)
        assert distance.max() <= 2 * radius * (1 + 1e-5)


def test_ascent_leaves_no_gradient_with_the_parameters():
    _, training, train = begun()
    normal, known, start = ascent_parts(training, train)
    training.ascend(known.detach(), start, normal, torch.tensor(0.5), normal.shape[0] * normal.shape[1])
    assert all(parameter.grad is None for parameter in training.module.parameters())


# --- losses ---------------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    logits = torch.log(tensor(1, 3, 1 / 3))  # probabilities 1/2, 3/4, 1/4
    torch.testing.assert_close(binary_cross_entropy(logits, 1), -torch.log(tensor(1 / 2, 3 / 4, 1 / 4)))
    torch.testing.assert_close(binary_cross_entropy(logits, 0), -torch.log(tensor(1 / 2, 1 / 4, 3 / 4)))
    assert binary_cross_entropy(tensor(-200), 1) == 200  # where a sigmoid would be 0


def test_the_radius_of_the_hypersphere_by_hand():
    _, training, _ = begun(radius_quantile=0.75)
    training.centre = torch.zeros(2, 1)
    normal = tensor([[1], [-2]], [[3], [4]])
    local = tensor([[5], [100]], [[-100], [0]])
    defects = torch.tensor([[False, True], [True, False]])
    radius = training.radius(normal, local, defects, 2)
    assert radius == 3.75  # of 0 1 2 3 4 5, a quarter of the way back from 4 to 3 at place 3.75
    training.distribution = "manifold"
    assert training.radius(normal, local, defects, 2) == 0.5


def test_the_local_loss_by_hand():
    _, training, _ = begun(easy_quantile=0.5)
    score = tensor([0.1, 0.2], [0.6, 0.9])
    defects = torch.tensor([[False, True], [False, True]])
    # Errors 0.1, 0.8, 0.6, 0.1: the second and third are the harder half. Their classes have 0.2 and 0.4.
    expected = -(0.8**2 * np.log(0.2) + 0.6**2 * np.log(0.4)) / 2
    assert float(training.local_loss(score.logit(), defects, 2)) == pytest.approx(expected, rel=1e-5)
    _, training, _ = begun(easy_quantile=0.0)
    expected = (2 * expected - 2 * 0.1**2 * np.log(0.9)) / 4
    assert float(training.local_loss(score.logit(), defects, 2)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("hypersphere", [True, False])
@pytest.mark.parametrize("changes", [{}, {"discriminator_layers": 1}, {"discriminator_layers": 3, "ascent_steps": 7}])
def test_a_step_is_that_of_the_plain_reference(hypersphere, changes):
    name = "hypersphere" if hypersphere else "manifold"
    _, training, train = begun(num=4, distribution=name, ascent_rate=0.05, **changes)
    batch = train.take(range(4))
    reference = copy.deepcopy(training.module)
    (loss,) = training.losses(batch, whole(4))
    loss.backward()
    painted, defects = training.painter.paint(batch, 0)
    encode = training.encoder
    noise = training.config.noise * training._draw_noise(batch, 0, torch.Size([16, 10]))
    expected = plain_loss(
        reference,
        encode.patches(encode.levels(batch.images)),
        encode.patches(encode.levels(painted)),
        noise,
        defects,
        training.centre,
        training.config,
        hypersphere,
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for own, plain in zip(training.module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.grad, plain.grad, rtol=1e-3, atol=1e-4)
    for own, plain in zip(training.module.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)


# --- the stage ------------------------------------------------------------------------------------------------------


def test_the_centre_is_the_mean_adapted_feature_of_all_normal_images():
    _, training, train = begun(num=7)
    encode = training.encoder
    patches = torch.cat([encode.patches(encode.levels(image[None])) for image in train.pixels])
    torch.testing.assert_close(training.centre, training.module.adapt(patches).mean(dim=0), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        training.module.adaptor.weight.mul_(2)
    training.begin_epoch(train, 1)
    torch.testing.assert_close(training.centre, training.module.adapt(patches).mean(dim=0), rtol=1e-4, atol=1e-5)


def test_normal_images_are_encoded_once_and_again_where_memory_is_short(monkeypatch):
    method, train = make(), Images(6)
    before = train_stage(method.stages()[0], train, 0)
    assert method.context.encode.num_images == 6 + 3 * 6  # once, and painted in each of 3 epochs
    monkeypatch.setattr(stage, "KEPT_BYTES", 6 * 4 * (4 * 16 + 6 * 4) - 1)
    method = make()
    after = train_stage(method.stages()[0], train, 0)
    assert method.context.encode.num_images == 6 + 3 * 12
    assert after == pytest.approx(before, rel=1e-5)


def test_training_lowers_the_loss_and_finds_a_painted_square():
    method, train = make(epochs=20, hidden_width=32, patch_size=1), Images(8)
    history = train_stage(method.stages()[0], train, 0)
    assert history[-1] < 0.7 * history[0]
    test = Images(4, seed=1)
    normal = method.predict(test.take(range(4)))
    test.pixels[:, :, 8:16, 8:16] = 1.0
    defective = method.predict(test.take(range(4)))
    assert (defective.image_score > normal.image_score).all()
    near, far = defective.anomaly_map[:, :2, :2], defective.anomaly_map[:, 2:, 2:]  # levels of 8 and 16 pixels
    assert (near.amax(dim=(1, 2)) > far.amax(dim=(1, 2))).all()
    torch.testing.assert_close(defective.image_score, defective.anomaly_map.amax(dim=(1, 2)))
    assert 0 <= defective.anomaly_map.min() <= defective.anomaly_map.max() <= 1


def test_training_in_bfloat16_encodes_in_float32_and_comes_out_alike():
    method = make()
    encode, seen = method.encoder._encode, []
    method.encoder._encode = lambda images: [seen.append(level.dtype) or level for level in encode(images)]
    rough = train_stage(method.stages()[0], Images(6), 0, precision="bfloat16")
    assert set(seen) == {torch.float32}
    assert rough == pytest.approx(train_stage(make().stages()[0], Images(6), 0), rel=0.05)


def test_without_an_adaptor_features_are_used_as_they_are():
    method, training, train = begun(adaptor=False)
    patches = method.encoder.patches(method.encoder.levels(train.pixels))
    assert torch.equal(method.network.adapt(patches), patches)
    (optimizer,) = training.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert train_stage(make(adaptor=False).stages()[0], train, 0)[0] > 0


def test_every_parameter_is_trained_by_one_optimiser_at_its_rate():
    _, training, _ = begun()
    judging, adapting = training.configure_optimizers()
    assert (judging.param_groups[0]["lr"], adapting.param_groups[0]["lr"]) == (1e-2, 1e-3)
    assert adapting.param_groups[0]["weight_decay"] == 1e-5
    trained = [id(p) for optimizer in (judging, adapting) for p in optimizer.param_groups[0]["params"]]
    assert sorted(trained) == sorted(id(p) for p in training.module.parameters())


def test_the_network_starts_alike_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = make().state_dict()
    torch.manual_seed(2)
    second = make().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- workers --------------------------------------------------------------------------------------------------------

NUM = 5


def one_batch(positions, changes):
    """Loss and gradients of the first step, as far as these images go."""
    _, training, train = begun(num=NUM, **changes)
    share = Share(epoch=0, step=0, num_images=NUM, positions=tuple(positions))
    (loss,) = training.losses(train.take(positions), share)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in training.module.parameters()]


def train_on(workers):
    method = make(epochs=2)
    history = train_stage(method.stages()[0], Images(NUM), 0, workers=workers)
    return history, method.state_dict()


HYPOTHESES = ({"distribution": "hypersphere"}, {"distribution": "manifold"})


def work(rank):
    steps = [one_batch(range(rank, NUM, 2), changes) for changes in HYPOTHESES]
    return steps, train_on(Workers(rank=rank, size=2))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return run_on_two_workers(work, tmp_path_factory.mktemp("workers"))


@pytest.mark.parametrize("number", [0, 1])
def test_shares_of_two_workers_add_up_to_the_whole_batch(told, number):
    loss, gradients = one_batch(range(NUM), HYPOTHESES[number])
    (first, first_gradients), (second, second_gradients) = (worker[0][number] for worker in told)
    torch.testing.assert_close(first + second, loss, rtol=1e-5, atol=1e-6)
    for one, other, expected in zip(first_gradients, second_gradients, gradients, strict=True):
        torch.testing.assert_close(one + other, expected, rtol=1e-3, atol=1e-4)


def test_two_workers_train_the_network_that_one_does(told):
    history, state = train_on(Workers())
    for _, (own_history, own_state) in told:
        assert own_history == pytest.approx(history, rel=1e-4)
        for name, value in state.items():
            torch.testing.assert_close(own_state[name], value, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(told[0][1][1][name], told[1][1][1][name]) for name in state)


# --- local anomalies ------------------------------------------------------------------------------------------------


def test_a_painted_image_changes_within_its_patches_alone_and_does_not_depend_on_its_batch():
    method, train = make(), Images(6)
    painter = Painter(method.config, method.context, (4, 4))
    painted, defects = painter.paint(train.take(range(6)), epoch=2)
    changed = (painted != train.pixels).any(dim=1)
    touched = torch.nn.functional.max_pool2d(changed.float(), 8) > 0
    assert torch.equal(touched.flatten(1), defects)
    assert defects.any(dim=1).all()
    alone, own_defects = painter.paint(train.take([4]), epoch=2)
    assert torch.equal(alone[0], painted[4])
    assert torch.equal(own_defects[0], defects[4])
    later, _ = painter.paint(train.take([4]), epoch=3)
    assert not torch.equal(later, alone)


def test_a_region_keeps_to_the_foreground_and_stays_empty_without_one():
    foreground = torch.zeros(SIZE, dtype=torch.bool)
    foreground[:8] = True
    for seed in range(20):
        region, patches = draw_region(SIZE, (4, 4), torch.Generator().manual_seed(seed), foreground)
        assert region.any()
        assert not region[8:].any()
        assert patches[0].any()
        assert not patches[1:].any()
    region, patches = draw_region(SIZE, (4, 4), torch.Generator().manual_seed(0), torch.zeros_like(foreground))
    assert not region.any()
    assert not patches.any()


def test_foreground_masks_are_read_by_category_and_name(tmp_path):
    (tmp_path / "toy").mkdir()
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 48:] = 255
    train = Images(2)
    for i in range(2):
        Image.fromarray(mask).save(tmp_path / "toy" / f"{i}.png")
    method = make(foreground_masks=str(tmp_path))
    method.stages()[0].painter.check(train.samples)
    _, defects = method.stages()[0].painter.paint(train.take([0, 1]), 0)
    assert not defects.unflatten(1, (4, 4))[:, :, :2].any()
    assert defects.any()


def test_a_foreground_mask_is_cropped_as_its_image_is(tmp_path):
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 2, (60, 90), np.uint8) * 255)
    mask.save(tmp_path / "mask.png")
    for resize, size in ((40, (32, 32)), (32, (32, 24)), (60, (60, 60))):
        way = Preprocessing(image_size=size, resize=resize, interpolation="bilinear")
        expected = load_image(str(tmp_path / "mask.png"), way)[0] > 0
        assert np.array_equal(np.array(_fit(mask, size, resize)) > 0, expected)
    assert _fit(mask, (32, 20), None).size == (20, 32)


def test_a_missing_foreground_mask_is_named_before_training_starts(tmp_path):
    (training,) = make(foreground_masks=str(tmp_path)).stages()
    with pytest.raises(AdgridError, match=r"foreground_masks: no mask .*toy.0\.png"):
        training.begin_epoch(Images(2), 0)


def test_an_unreadable_foreground_mask_is_named(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "0.png").write_bytes(b"no image")
    (training,) = make(foreground_masks=str(tmp_path)).stages()
    with pytest.raises(AdgridError, match=r"0\.png cannot be read"):
        training.painter.paint(Images(1).take([0]), 0)


# --- hypotheses and settings ----------------------------------------------------------------------------------------


def mean_images():
    """Grey images by what they are taken for."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    distance = torch.hypot(rows, columns)
    noise = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    ring = (distance < 0.8) & (distance > 0.5)
    return {
        "hypersphere": [(distance < 0.7).float(), ring.float(), 0.9 - 0.5 * (distance < 0.3)],
        "manifold": [torch.full((64, 64), 0.5), noise, torch.exp(-50 * distance**2), (rows.abs() < 0.5) * 0.9],
    }


@pytest.mark.parametrize("name", ["hypersphere", "manifold"])
def test_an_object_in_its_place_is_a_hypersphere_and_a_texture_is_a_manifold(name):
    for image in mean_images()[name][:2]:
        assert judge_distribution(image.expand(3, -1, -1)) == name


def test_the_spectrum_is_judged_as_the_plain_reference_does():
    for image in itertools.chain(*mean_images().values()):
        colours = image * torch.tensor([1.0, 0.8, 0.6])[:, None, None]
        assert judge_distribution(colours) == plain_judgement(colours.numpy())


@pytest.mark.data
@pytest.mark.parametrize(("folder", "name"), [("mvtec_ad/bottle", "hypersphere"), ("mpdd/metal_plate", "manifold")])
def test_real_categories_are_judged_as_the_official_table_has_them(data_root, folder, name):
    paths = sorted((data_root / folder / "train" / "good").iterdir())[:60]
    pixels = [np.asarray(Image.open(path).convert("RGB").resize((128, 128)), np.float64) for path in paths]
    mean_image = torch.from_numpy(np.mean(pixels, axis=0) / 255).permute(2, 0, 1)
    assert judge_distribution(mean_image) == name


@pytest.mark.parametrize(("wanted", "found"), [("auto", "manifold"), ("hypersphere", "hypersphere")])
def test_the_hypothesis_is_settled_when_training_begins(wanted, found):
    _, training, _ = begun(distribution=wanted)
    assert training.distribution == found


def test_presets_are_settings():
    for preset in Glass.presets.values():
        config = build_config(Glass, preset)
        assert config.distribution == "hypersphere"
    assert Glass.presets.keys() == {"adpretrain_plain", "adpretrain_projected"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch_size", 2),
        ("distribution", "sphere"),
        ("epochs", 0),
        ("project_every", 0),
        ("max_images_per_epoch", 0),
        ("adaptor_lr", 0.0),
        ("discriminator_lr", float("nan")),
        ("manifold_radius", 0.0),
        ("noise", -0.1),
        ("ascent_steps", -1),
        ("radius_quantile", 1.5),
        ("easy_quantile", 1.0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(Config(), **{field: value})
