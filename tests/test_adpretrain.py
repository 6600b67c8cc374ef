import pytest
import torch
from reference.adpretrain import plain_residual, plain_step
from small_adpretrain import NUM, SHAPES, Encoder, Images, draw, make_context, normal_images, small_projector, tokens
from two_workers import run_on_two_workers

from harness.contracts import AdgridError, Share
from harness.registry import build_config, method_names
from harness.stages import train_stage
from harness.workers import Workers
from methods import adpretrain
from methods.adpretrain import (
    Config,
    Pretraining,
    ProjectedResiduals,
    ReferencePool,
    SplitReferences,
    angle_loss,
    estimate_centre,
    norm_loss,
    projector_from_state,
)
from methods.adpretrain.labels import label_by_nearest
from methods.adpretrain.pretraining import subtract_references
from methods.adpretrain.references import draw_places
from methods.adpretrain.views import make_view
from methods.components.draws import image_generator

# --- references and centre ------------------------------------------------------------------------------------------


def make(statistics=adpretrain.CLIP_STATISTICS, **changes):
    context = make_context()
    config = Config(**{"epochs": 3, "batch_size": 3, "learning_rate": 1e-3, "milestones": (), **changes})
    return Pretraining(small_projector(), config, context, SplitReferences(normal_images(), context), statistics)


def begun(num=NUM, **changes):
    """A stage in the middle of training, and its images."""
    stage, train = make(**changes), Images(num)
    stage.module.train()
    stage.begin_epoch(train, 0)
    return stage, train


def whole(num):
    return Share(epoch=0, step=0, num_images=num, positions=tuple(range(num)))


def test_references_are_of_the_same_category_and_view_and_drawn_with_replacement():
    images, references = Images(8), SplitReferences(normal_images(), make_context())

    def generator_of(sample):
        return torch.Generator().manual_seed(int(sample.sample_id))

    known = normal_images().samples
    for sample, places in zip(images.samples, draw_places(references, images.samples, 50, generator_of), strict=True):
        own = [i for i, other in enumerate(known) if (other.category, other.view) == (sample.category, sample.view)]
        assert places == own  # 50 draws find all of them, each named once
    alone = draw_places(references, images.samples[3:4], 2, generator_of)
    assert alone == draw_places(references, images.samples, 2, generator_of)[3:4]
    one_generator = torch.Generator().manual_seed(0)
    repeated = draw_places(references, images.samples * 30, 2, lambda _: one_generator)
    assert {len(places) for places in repeated} == {1, 2}


def test_references_as_features_and_as_images_are_the_same():
    context = make_context()
    stored = SplitReferences(normal_images(features=Encoder()), context).levels([3, 0, 5])
    assert context.encode.num_images == 0
    encoded = SplitReferences(normal_images(), context).levels([3, 0, 5])
    assert context.encode.num_images == 3
    for own, other in zip(stored, encoded, strict=True):
        assert torch.equal(own, other)


def test_a_category_without_references_is_named():
    references = SplitReferences(normal_images(num=1), make_context())
    with pytest.raises(AdgridError, match="category 'b', view 'C1' has none"):
        references.places("b", "C1")


def test_a_pool_keeps_a_few_references_and_reads_each_once():
    context, split = make_context(), normal_images(num=24)
    everything = SplitReferences(split, context)
    pool = ReferencePool(everything, 2, context)
    places = pool.places("a", "C1")
    assert len(places) == 2
    assert set(places) < set(everything.places("a", "C1"))
    assert places == ReferencePool(everything, 2, context).places("a", "C1")
    assert ReferencePool(everything, 99, context).places("a", "C1") == everything.places("a", "C1")
    for _ in range(2):
        for own, other in zip(pool.levels(places[::-1]), everything.levels(places[::-1]), strict=True):
            torch.testing.assert_close(own, other)
    first = len(split.taken)
    pool.levels(places)
    assert len(split.taken) == first
    with pytest.raises(ValueError, match="at least 1"):
        ReferencePool(everything, 0, context)


def plain_centre(train, references, context, num):
    """Mean over all tokens of normal images, at once."""
    rests = [[] for _ in SHAPES]
    for image, sample, label in zip(train.pixels, train.samples, train.labels, strict=True):
        if label:
            continue
        generator = image_generator(context, "adpretrain centre", sample, 0)
        (places,) = draw_places(references, [sample], num, lambda _, g=generator: g)
        own = [level.permute(0, 2, 3, 1).reshape(-1, level.shape[1]) for level in references.levels(places)]
        for rest, level, reference in zip(rests, context.encode(image[None]), own, strict=True):
            rest.append(plain_residual(level, reference).double())
    return [torch.cat(rest).mean(dim=(0, 2, 3)) for rest in rests]


class Contrasts(Encoder):
    """Without the mean of each map, features point in many directions, and rounding decides no nearest reference."""

    def __call__(self, images):
        return tuple(level - level.mean(dim=(2, 3), keepdim=True) for level in super().__call__(images))


@pytest.mark.parametrize("features", [None, Contrasts()])
def test_the_centre_is_the_mean_residual_of_normal_tokens(features):
    context, train = make_context(Contrasts()), Images(20, features=features)
    references = SplitReferences(normal_images(), context)
    centre = estimate_centre(train, references, Config(), context)
    for own, expected in zip(centre, plain_centre(train, references, context, 4), strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_centre_of_nothing_normal_is_refused():
    train, context = Images(2), make_context()
    train.labels[:] = 1
    with pytest.raises(AdgridError, match="needs normal images"):
        estimate_centre(train, SplitReferences(normal_images(), context), Config(), context)


def test_each_reference_of_a_batch_is_read_once():
    context, split = make_context(), normal_images()
    levels = [level[:, None] for level in context.encode(Images(4).pixels)]
    drawn = [[0, 4], [4], [7, 0], [4, 7]]
    together = subtract_references(levels, drawn, SplitReferences(split, context))
    assert sorted(split.taken) == [0, 4, 7]
    for image, places in enumerate(drawn):
        own = [level.flatten(2).transpose(1, 2).flatten(0, 1) for level in context.encode(split.pixels[places])]
        for rest, level, reference in zip(together, levels, own, strict=True):
            torch.testing.assert_close(rest[image], plain_residual(level[image], reference)[0])


# --- the stage ------------------------------------------------------------------------------------------------------


def test_a_step_is_that_of_the_plain_reference():
    stage, train = begun(reference_counts=(4,))
    batch, share = train.take(range(NUM)), whole(NUM)
    (loss,) = stage.losses(batch, share)
    loss.backward()
    gradients = [parameter.grad for parameter in stage.module.parameters()]
    context, references = stage._context, stage._references
    views, own = [[], []], []
    for image, sample in zip(batch.images, batch.samples, strict=True):
        generator = image_generator(context, "adpretrain views", sample, 0)
        for view in views:
            view.append(make_view(image, generator))
        generator = image_generator(context, "adpretrain references", sample, 0)
        (places,) = draw_places(references, [sample], 4, lambda _, g=generator: g)
        own.append([level.permute(0, 2, 3, 1).reshape(-1, level.shape[1]) for level in references.levels(places)])
    first, second = (Encoder()(torch.stack(view)) for view in views)
    stage.module.zero_grad()
    expected = plain_step(stage.module, first, second, own, batch.masks, stage.centre)
    expected.backward()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-5)
    for own_gradient, parameter in zip(gradients, stage.module.parameters(), strict=True):
        torch.testing.assert_close(own_gradient, parameter.grad, rtol=1e-3, atol=2e-5)


def test_every_step_draws_its_number_of_references_and_every_epoch_its_views():
    stage, train = begun()
    batch = train.take(range(NUM))
    first = stage.residuals(batch, whole(NUM))
    again = stage.residuals(batch, whole(NUM))
    other = stage.residuals(batch, Share(epoch=1, step=0, num_images=NUM, positions=tuple(range(NUM))))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (2 * NUM, *SHAPES[0])
    numbers = set()
    stage._references = Spy(stage._references)
    for step in range(20):
        stage.residuals(batch, Share(epoch=0, step=step, num_images=NUM, positions=tuple(range(NUM))))
        numbers.add(stage._references.most)
    assert len(numbers) > 1


class Spy:
    """Notes how many references a step reads."""

    def __init__(self, references):
        self.references = references

    def places(self, category, view):
        return self.references.places(category, view)

    def levels(self, places):
        self.most = len(places)
        return self.references.levels(places)


def test_views_have_the_input_scale_of_clip_unless_told_otherwise():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    batch = Images().take(range(2))
    scaled, plain = (
        make(statistics=(mean, std), view_statistics=name)._two_views(batch.images, batch.samples, 0)
        for name in ("clip", "backbone")
    )
    column = [torch.tensor(numbers)[:, None, None] for numbers in (mean, std, *adpretrain.CLIP_STATISTICS)]
    torch.testing.assert_close((scaled - column[0]) / column[1], (plain - column[2]) / column[3], rtol=1e-4, atol=1e-5)
    same = make()._two_views(batch.images, batch.samples, 0)
    assert torch.equal(same, plain)


def test_training_tells_anomalous_patches_by_size():
    stage, train = make(epochs=20, batch_size=6), Images(12)
    history = train_stage(stage, train, 0)
    assert history[-1] < history[0] - 1
    representation = ProjectedResiduals(projector_from_state(stage.state_dict(), "stage"))
    test = Images(6, seed=9)
    context, references = stage._context, stage._references
    for index, sample in enumerate(test.samples):
        maps = references.levels(references.places(sample.category, sample.view))
        reference = tuple(level.flatten(2).transpose(1, 2).flatten(0, 1) for level in maps)
        plain = context.encode(test.pixels[index : index + 1])
        for level in representation.apply(plain, reference):
            size = level.norm(dim=1)[0]
            anomalous = label_by_nearest(test.masks[index : index + 1], size.shape)[0]
            if anomalous.any():
                assert size[anomalous].mean() > 2 * size[~anomalous].mean()


def test_projected_residuals_do_not_depend_on_the_batch_and_need_references():
    representation = ProjectedResiduals(small_projector())
    levels = tuple(draw(4, *shape) for shape in SHAPES)
    reference = tuple(draw(9, shape[0], seed=1) for shape in SHAPES)
    together = representation.apply(levels, reference)
    alone = representation.apply(tuple(level[2:3] for level in levels), reference)
    for one, all_of_them in zip(alone, together, strict=True):
        assert one.shape[1:] == all_of_them.shape[1:]
        torch.testing.assert_close(one[0], all_of_them[2], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="need reference tokens"):
        representation.apply(levels, None)


def test_a_representation_of_some_levels_is_that_part_of_the_whole():
    projector = small_projector()
    levels = tuple(draw(2, *shape) for shape in SHAPES)
    reference = tuple(draw(9, shape[0], seed=1) for shape in SHAPES)
    whole_one = ProjectedResiduals(projector).apply(levels, reference)
    part = ProjectedResiduals.from_state(Config(), projector.state_dict(), [1], "state")
    assert torch.equal(part.apply(levels[1:], reference[1:])[0], whole_one[1])
    with pytest.raises(AdgridError, match="state: it has 2 levels, and level 3 is wanted"):
        ProjectedResiduals.from_state(Config(), projector.state_dict(), [2], "state")


def test_plain_features_are_projected_without_references():
    projector = small_projector()
    levels = tuple(draw(2, *shape) for shape in SHAPES)
    plain = ProjectedResiduals.from_state(Config(features="plain"), projector.state_dict(), [0, 1], "state")
    for one, other in zip(plain.apply(levels, None), projector(levels), strict=True):
        assert torch.equal(one, other)
    stage, train = begun(features="plain")
    batch = train.take(range(NUM))
    for one, other in zip(
        stage.residuals(batch, whole(NUM)), stage._encode(stage._two_views(batch.images, batch.samples, 0)), strict=True
    ):
        assert torch.equal(one, other)


def test_a_loss_without_weight_is_left_out():
    def loss(**changes):
        stage, train = begun(**changes)
        return next(stage.losses(train.take(range(NUM)), whole(NUM)))

    both, angle, norm = loss(), loss(norm_weight=0.0), loss(angle_weight=0.0)
    torch.testing.assert_close(angle + norm, both)
    torch.testing.assert_close(loss(angle_weight=2.0), both + angle)


def test_a_batch_without_anomalies_is_no_step_or_one_of_zero():
    normal = Images(4, normal=True).take(range(4))
    stage, _ = begun()
    assert list(stage.losses(normal, whole(4))) == []
    stage, _ = begun(normal_batches="zero")
    (loss,) = stage.losses(normal, whole(4))
    loss.backward()
    assert loss == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in stage.module.parameters())


def test_training_in_bfloat16_comes_out_alike():
    rough = train_stage(make(), Images(6), 0, precision="bfloat16")
    assert rough == pytest.approx(train_stage(make(), Images(6), 0), rel=0.1, abs=0.1)


def test_a_stage_comes_back_with_its_centre():
    stage, train = begun()
    state = {key: value.clone() for key, value in stage.state_dict().items()}
    assert {"centre.1", "centre.2", "l1_proj.x_ref"} <= set(state)
    other = make()
    assert other.centre == []
    other.load_state_dict(state)
    encoded = other._context.encode.num_images
    other.begin_epoch(train, 1)  # is not computed again
    assert other._context.encode.num_images == encoded
    assert all(torch.equal(a, b) for a, b in zip(other.centre, stage.centre, strict=True))


def test_the_rate_falls_to_a_tenth_after_epochs_7_and_9():
    stage = Pretraining(small_projector(), Config(), make_context(), SplitReferences(normal_images(), make_context()))
    assert (stage.epochs, stage.batch_size, stage.name) == (10, 32, "adpretrain")
    (optimizer,) = stage.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-4, 5e-4)
    factors = [stage.lr_factor(progress) for progress in (0, 6.9, 7, 8.9, 9, 9.9)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_config_refuses_what_cannot_be():
    for field, value in (
        ("epochs", 0), ("learning_rate", 0.0), ("weight_decay", -1.0), ("decay", 0.0), ("milestones", (9, 7)),
        ("reference_counts", ()), ("reference_counts", (0,)), ("norm_form", "huber"), ("negatives", "none"),
        ("view_statistics", "mine"), ("normal_batches", "drop"), ("temperature", 0.0), ("centre_references", 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=field):
            Config(**{field: value})


def test_config_is_made_of_plain_values():
    class Owner:
        Config = Config

    made = build_config(Owner, {"milestones": [3], "reference_counts": [2, 4], "norm_form": "pseudo_huber"})
    assert made == Config(milestones=(3,), reference_counts=(2, 4), norm_form="pseudo_huber")


def test_adpretrain_is_no_detector():
    assert "adpretrain" not in method_names()


# --- workers --------------------------------------------------------------------------------------------------------

LOSSES = 40


def one_batch(positions, **changes):
    """Loss and gradients of the first step, as far as these images go."""
    stage, train = begun(**changes)
    share = Share(epoch=0, step=0, num_images=NUM, positions=tuple(positions))
    (loss,) = stage.losses(train.take(positions), share)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in stage.module.parameters()]


def of_part(rows, label=None, gathered=True, dtype=torch.float64):
    """Both losses of some of the tokens, with the gradients of the tokens."""
    view1, view2, own_label, center = tokens(LOSSES, 6, 11, dtype=dtype)
    label = own_label if label is None else label
    parts = [(0.4 * view[rows]).requires_grad_() for view in (view1, view2)]
    angle = angle_loss(*parts, label[rows], center, gathered=gathered)
    size = norm_loss(parts[0], label[rows], gathered=gathered)
    (angle + size).backward()
    return angle.detach(), size.detach(), [part.grad for part in parts]


def split_label():
    """All anomalous tokens are with the second worker."""
    label = torch.zeros(LOSSES, dtype=torch.int64)
    label[-9:] = 1
    return label


ROWS = (slice(0, 23), slice(23, LOSSES))


def work(rank):
    rows, workers = ROWS[rank], Workers(rank=rank, size=2)
    stage = make()
    history = train_stage(stage, Images(6), 0, workers=workers)
    return {
        "gathered": of_part(rows),
        "apart": of_part(rows, split_label()),
        "normal": of_part(rows, torch.zeros(LOSSES, dtype=torch.int64)),
        "local": of_part(rows, gathered=False),
        "local apart": of_part(rows, split_label(), gathered=False),
        "step": one_batch(range(rank, NUM, 2)),
        "local step": one_batch(range(rank, NUM, 2), negatives="local"),
        "centre": begun()[0].centre,
        "trained": (history, stage.state_dict()),
    }


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return run_on_two_workers(work, tmp_path_factory.mktemp("workers"))


@pytest.mark.parametrize(
    ("name", "label"), [("gathered", None), ("apart", split_label()), ("normal", torch.zeros(LOSSES).long())]
)
def test_gathered_losses_of_two_workers_add_up_with_the_gradients_of_the_whole(told, name, label):
    angle, size, gradients = of_part(slice(0, LOSSES), label)
    for index, expected in enumerate((angle, size)):
        torch.testing.assert_close(told[0][name][index] + told[1][name][index], expected)
    for view, expected in enumerate(gradients):
        found = torch.cat([worker[name][2][view] for worker in told])
        torch.testing.assert_close(found, expected)


def test_local_losses_are_those_of_each_worker_weighted_by_its_tokens(told):
    for rank, rows in enumerate(ROWS):
        share = (rows.stop - rows.start) / LOSSES
        angle, size, gradients = of_part(rows)
        own_angle, own_size, own_gradients = told[rank]["local"]
        torch.testing.assert_close(own_angle, share * angle)
        torch.testing.assert_close(own_size, share * size)
        torch.testing.assert_close(own_gradients, [share * gradient for gradient in gradients])
    assert [float(worker["local apart"][0]) != 0 for worker in told] == [False, True]  # only one has both labels


def test_shares_of_two_workers_add_up_to_the_whole_batch(told):
    loss, gradients = one_batch(range(NUM))
    (first, first_gradients), (second, second_gradients) = (worker["step"] for worker in told)
    torch.testing.assert_close(first + second, loss, rtol=1e-5, atol=1e-5)
    for one, other, expected in zip(first_gradients, second_gradients, gradients, strict=True):
        torch.testing.assert_close(one + other, expected, rtol=1e-3, atol=1e-5)


def test_local_negatives_change_the_step(told):
    loss, _ = one_batch(range(NUM))
    assert abs(sum(worker["local step"][0] for worker in told) - loss) > 1e-3


def test_the_centre_does_not_depend_on_the_number_of_workers(told):
    for worker in told:
        torch.testing.assert_close(worker["centre"], begun()[0].centre, rtol=1e-6, atol=1e-8)


def test_two_workers_train_the_projector_of_one(told):
    stage = make()
    history = train_stage(stage, Images(6), 0)
    (first, first_state), (second, second_state) = (worker["trained"] for worker in told)
    assert first == pytest.approx(history, rel=1e-4, abs=1e-4)
    assert second == first
    for key, expected in stage.state_dict().items():
        torch.testing.assert_close(first_state[key], second_state[key])
        torch.testing.assert_close(first_state[key], expected, rtol=1e-2, atol=2e-3)
