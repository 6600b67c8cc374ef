"""The training loop on toy stages: order, schedules, clipping, bad losses, checkpoints, several workers."""

import math
from itertools import chain

import pytest
import torch
from small_splits import LevelSplit
from torch import nn
from two_workers import run_on_two_workers

from harness.checkpoints import StoredCheckpoints
from harness.contracts import Trainable
from harness.stages import TrainingError, epoch_batches, train_stage
from harness.store import Store
from harness.workers import Workers

NUM = 23


class Regression(Trainable):
    """Two linear maps that learn one after the other within each batch."""

    name = "regression"

    def __init__(self, epochs=3, batch_size=7, bad=(), **settings):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.module = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 2)])
        self.epochs, self.batch_size, self.bad = epochs, batch_size, set(bad)
        self.seen, self.rates = [], []
        for name, value in settings.items():
            setattr(self, name, value)

    def configure_optimizers(self):
        self.optimizers = [
            torch.optim.Adam(self.module[:2].parameters(), lr=0.01),
            torch.optim.SGD(self.module[2].parameters(), lr=0.1),
        ]
        return self.optimizers

    def losses(self, batch, share):
        self.seen.append((share.epoch, share.step, [image.sample_id for image in batch.samples], share.positions))
        self.rates.append(self.optimizers[1].param_groups[0]["lr"])
        features = batch.levels[0].mean(dim=(2, 3))
        for linear in self.module[:2]:
            loss = linear(features).square().sum() / share.num_images
            is_bad = (share.epoch, share.step) in self.bad and 0 not in share.positions[:1]
            yield loss * math.nan if is_bad or (share.epoch, share.step, 0) in self.bad else loss


def split(num=NUM):
    generator = torch.Generator().manual_seed(0)
    return LevelSplit([torch.randn(num, 6, 2, 2, generator=generator)])


def parameters(stage):
    return torch.cat([parameter.detach().flatten() for parameter in stage.module.parameters()])


@pytest.mark.parametrize(("num", "size"), [(23, 7), (8, 8), (9, 8), (193, 32), (3, 10), (1, 1)])
def test_an_epoch_has_every_image_once_in_batches_of_like_size(num, size):
    batches = epoch_batches(num, size, seed=0, epoch=2)
    assert sorted(chain.from_iterable(batches)) == list(range(num))
    sizes = {len(batch) for batch in batches}
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == math.ceil(num / size)


def test_the_order_depends_on_seed_and_epoch_alone():
    assert epoch_batches(20, 6, 1, 0) == epoch_batches(20, 6, 1, 0)
    assert epoch_batches(20, 6, 1, 0) != epoch_batches(20, 6, 1, 1)
    assert epoch_batches(20, 6, 1, 0) != epoch_batches(20, 6, 2, 0)


def test_a_bounded_epoch_takes_other_images_each_time():
    first, second = (list(chain(*epoch_batches(20, 4, 0, epoch, most=10))) for epoch in (0, 1))
    assert len(first) == len(set(first)) == 10
    assert set(first) != set(second)
    stage = Regression(max_images_per_epoch=10)
    train_stage(stage, split(), seed=0)
    assert [sum(len(ids) for epoch, _, ids, _ in stage.seen if epoch == e) for e in range(3)] == [10, 10, 10]


def test_training_is_the_loop_written_out():
    stage, plain = Regression(clip_norm=0.5), Regression()
    history = train_stage(stage, split(), seed=3)
    adam, sgd = plain.configure_optimizers()
    images = split().levels[0].mean(dim=(2, 3))
    means = []
    for epoch in range(3):
        losses = []
        for places in epoch_batches(NUM, 7, 3, epoch):
            for linear in plain.module[:2]:
                adam.zero_grad()
                sgd.zero_grad()
                loss = linear(images[places]).square().sum() / len(places)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(plain.module.parameters(), 0.5)
                adam.step()
                sgd.step()
                losses.append(loss.item())
        means.append(sum(losses) / len(losses))
    assert history == pytest.approx(means, rel=1e-6)
    torch.testing.assert_close(parameters(stage), parameters(plain))


def test_a_schedule_sets_the_rate_before_each_batch():
    stage = Regression(epochs=2, lr_factor=lambda progress: 1 / (1 + progress))
    train_stage(stage, split(), seed=0)
    expected = [0.1 / (1 + epoch + step / 4) for epoch in range(2) for step in range(4)]
    assert stage.rates == pytest.approx(expected)


def test_a_step_without_finite_gradients_is_a_step_with_zero_gradients():
    stage = Regression(epochs=1, bad=[(0, 1, 0)])
    history = train_stage(stage, split(), seed=0)
    assert parameters(stage).isfinite().all()
    assert math.isfinite(history[0])


def test_an_epoch_without_a_finite_step_is_an_error():
    stage = Regression(epochs=2, bad=[(1, step, 0) for step in range(4)])
    with pytest.raises(TrainingError, match=r"'regression', epoch 2.*learning rate"):
        train_stage(stage, split(), seed=0)


def test_the_state_that_a_judge_prefers_is_kept():
    states = []
    stage = Regression(epochs=4)

    def judge(done, loss):
        states.append(parameters(stage).clone())
        return {1: None, 2: 0.7, 3: 0.9, 4: 0.9}[done]

    train_stage(stage, split(), seed=0, judge=judge)
    torch.testing.assert_close(parameters(stage), states[2], rtol=0, atol=0)


class Stop(Exception):
    """Somebody pulled the plug."""


@pytest.mark.parametrize("judged", [False, True])
def test_an_interrupted_stage_goes_on_as_if_nothing_had_happened(tmp_path, judged):
    store = Store(str(tmp_path))
    judge = (lambda done, loss: {1: 1.0}.get(done, 0.0)) if judged else None
    whole, again = Regression(epochs=5), Regression(epochs=5)
    history = train_stage(whole, split(), seed=0, judge=judge)

    def report(done, total, loss):
        if done == 3:
            raise Stop

    interrupted = Regression(epochs=5)
    checkpoints = StoredCheckpoints(store, "a", every_seconds=0)
    with pytest.raises(Stop):
        train_stage(interrupted, split(), seed=0, checkpoints=checkpoints, report=report, judge=judge)
    checkpoints = StoredCheckpoints(store, "a", every_seconds=0)
    assert train_stage(again, split(), seed=0, checkpoints=checkpoints, judge=judge) == history
    assert {epoch for epoch, *_ in again.seen} == {2, 3, 4}
    torch.testing.assert_close(parameters(again), parameters(whole), rtol=0, atol=0)
    checkpoints.discard()
    assert checkpoints.load() is None


def test_checkpoints_keep_their_distance_in_time(tmp_path):
    store = Store(str(tmp_path))
    rare = StoredCheckpoints(store, "a", every_seconds=3600)
    rare.save(lambda: {"history": [1.0]}, last=False)
    assert rare.load() is None
    often = StoredCheckpoints(store, "a", every_seconds=0)
    often.save(lambda: {"history": [1.0]}, last=True)
    assert often.load() is None  # the finished artifact follows
    often.save(lambda: {"history": [1.0]}, last=False)
    assert often.load() == {"history": [1.0]}


def test_bfloat16_is_used_in_the_forward_pass_alone():
    stage = Regression(epochs=1)
    dtypes = []
    stage.module[0].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    train_stage(stage, split(), seed=0, precision="bfloat16")
    assert set(dtypes) == {torch.bfloat16}
    assert parameters(stage).dtype == torch.float32


def train_shared(rank):
    stage = Regression(clip_norm=0.5, bad=[(1, 2)])
    history = train_stage(stage, split(), seed=3, workers=Workers(rank=rank, size=2))
    return {"history": history, "parameters": parameters(stage), "seen": stage.seen}


def test_two_workers_share_each_step(tmp_path):
    results = run_on_two_workers(train_shared, tmp_path)
    alone = Regression(clip_norm=0.5, bad=[(1, 2, 0)])
    history = train_stage(alone, split(), seed=3)
    for result in results:
        assert result["history"] == pytest.approx(history, rel=1e-5)
        torch.testing.assert_close(result["parameters"], parameters(alone), rtol=1e-5, atol=1e-6)
    for ours, first, second in zip(alone.seen, *(result["seen"] for result in results), strict=True):
        assert sorted(first[2] + second[2]) == sorted(ours[2])  # nobody sees an image twice
        assert ours[2] == [name for pair in zip(first[2], [*second[2], None], strict=False) for name in pair if name]


def test_more_workers_than_images_are_refused():
    with pytest.raises(ValueError, match=r"3 workers cannot share a batch of 2 images"):
        train_stage(Regression(epochs=1, batch_size=2), split(2), seed=0, workers=Workers(rank=2, size=3))
