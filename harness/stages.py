"""The training loop: runs one stage over its images, alone or as one of several workers.

The numbers of a stage do not depend on how many workers share it: batches are those of one worker, cut into shares, and
gradients are summed over workers. Nothing here knows Ray; whoever starts the workers has set up `torch.distributed`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.contracts import Batch, Share, Split, Trainable, derive_seed
from harness.workers import ALONE, Workers

Precision = Literal["float32", "bfloat16"]
EpochReport = Callable[[int, int, float], None]
"""Called after each epoch with (epochs done, epochs in all, mean loss)."""


Judge = Callable[[int, float], float | None]
"""Called after each epoch with (epochs done, mean loss): how good the state is, or None for no opinion."""


class TrainingError(RuntimeError):
    """A stage cannot go on: no step of an epoch had finite gradients."""


class Checkpoints(Protocol):
    """Where the state of a running stage is kept between epochs."""

    def load(self) -> dict[str, Any] | None:
        """The newest state, the same on every worker; None at the beginning."""

    def save(self, make_state: Callable[[], dict[str, Any]], last: bool) -> None:
        """Keeps a state, or passes where one was kept a moment ago. Called by every worker after every epoch."""


def train_stage(
    stage: Trainable,
    train: Split,
    seed: int,
    *,
    workers: Workers = ALONE,
    device: torch.device | None = None,
    precision: Precision = "float32",
    checkpoints: Checkpoints | None = None,
    judge: Judge | None = None,
    report: EpochReport = lambda *_: None,
) -> list[float]:
    """Trains one stage; with several workers, all of them call this at the same time.

    A step whose gradients are not finite on any worker becomes a step with zero gradients on all of them, as if its
    loss were zero times the sum of the parameters.

    Args:
        stage: what to train; one optimiser step follows each loss it yields.
        train: normal training images, the same on every worker.
        seed: fixes the order of the images and every global draw.
        workers: this worker's place among all; more than one need an initialised process group.
        device: where the module is; None for the processor.
        precision: of the forward pass; parameters, gradients and optimisers are float32.
        checkpoints: makes the stage go on where it was interrupted; None starts anew.
        judge: picks the state that is kept: the best one, the earliest of equals. None keeps the last.
        report: called after every epoch.

    Returns:
        The mean loss of each epoch, over its steps with finite gradients.

    Raises:
        TrainingError: an epoch without a single finite step.
        ValueError: a batch with fewer images than workers.
    """
    smallest = min(map(len, epoch_batches(len(train), stage.batch_size, seed, 0, stage.max_images_per_epoch)))
    if smallest < workers.size:
        raise ValueError(
            f"stage {stage.name!r}: {workers.size} workers cannot share a batch of {smallest} images; use fewer "
            f"workers or a larger batch size"
        )
    device = device or torch.device("cpu")
    optimizers = list(stage.configure_optimizers())
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    history: list[float] = []
    best: tuple[float, dict[str, Tensor]] | None = None
    state = checkpoints.load() if checkpoints is not None else None
    if state is not None:
        stage.load_state_dict(state["stage"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        history, best = list(state["history"]), state["best"]
        if state["watched"]:
            stage.watched = state["watched"]
    next_loss = _NextLoss(stage.module, device, precision)
    ask = _distribute(next_loss, workers)
    for epoch in range(len(history), stage.epochs):
        # Seeded anew each epoch, so that a stage that goes on draws what an undisturbed one would have drawn.
        seed_everything(derive_seed("epoch", seed, stage.name, epoch, workers.rank))
        stage.module.train()
        stage.begin_epoch(train, epoch)
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, finite steps, all steps
        batches = epoch_batches(len(train), stage.batch_size, seed, epoch, stage.max_images_per_epoch)
        own = [places[workers.rank :: workers.size] for places in batches]
        for step, batch in enumerate(_read_ahead(train, own, device)):
            size = len(batches[step])
            positions = tuple(range(workers.rank, size, workers.size))
            share = Share(epoch=epoch, step=step, num_images=size, positions=positions)
            _set_rates(optimizers, rates, stage.lr_factor(epoch + step / len(batches)))
            losses = stage.losses(batch, share)
            while True:
                try:
                    loss = ask(losses)
                except _Exhausted:
                    break
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                (loss * workers.size).backward()  # several workers' gradients are averaged, and a sum is wanted
                finite = _tame_gradients(stage.module, stage.clip_norm)
                for optimizer in optimizers:
                    optimizer.step()
                sums += torch.stack(
                    [torch.where(finite, loss.detach().double(), 0.0), finite.double(), sums.new_ones(())]
                )
        mean = _mean_loss(sums, workers, stage.name, epoch)
        history.append(mean)
        report(epoch + 1, stage.epochs, mean)
        merit = None if judge is None else judge(epoch + 1, mean)
        if merit is not None and (best is None or merit > best[0]):
            best = merit, {name: tensor.detach().cpu().clone() for name, tensor in stage.state_dict().items()}
        if checkpoints is not None:
            make_state = partial(_make_state, stage, optimizers, history, best)
            checkpoints.save(make_state, last=epoch + 1 == stage.epochs)
    if best is not None:
        stage.load_state_dict(best[1])
    stage.module.eval()
    return history


def epoch_batches(num_images: int, batch_size: int, seed: int, epoch: int, most: int | None = None) -> list[list[int]]:
    """Every image once, in an order that depends on seed and epoch alone, in batches that differ by one image at most.

    Args:
        num_images: images of the split.
        batch_size: the most images of a batch.
        seed: of the stage.
        epoch: counted from 0.
        most: images of an epoch; None for all.
    """
    generator = torch.Generator().manual_seed(derive_seed("epoch order", seed, epoch))
    order = torch.randperm(num_images, generator=generator).tolist()[:most]
    number = math.ceil(len(order) / batch_size)
    bounds = [i * len(order) // number for i in range(number + 1)]
    return [order[start:stop] for start, stop in itertools.pairwise(bounds)]


def _read_ahead(train: Split, groups: Sequence[Sequence[int]], device: torch.device) -> Iterator[Batch]:
    """The images of each group; a thread reads the next while one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        reading = pool.submit(_read, train, groups[0], device)
        for places in groups[1:]:
            batch = reading.result()
            reading = pool.submit(_read, train, places, device)
            yield batch
        yield reading.result()


def _read(train: Split, places: Sequence[int], device: torch.device) -> Batch:
    batch = train.take(places)
    if device.type != "cuda":
        return batch
    # From pinned memory the copy to the device does not wait for what it computes.
    levels = None if batch.levels is None else tuple(map(_pin, batch.levels))
    return replace(batch, levels=levels, images=None if batch.images is None else _pin(batch.images))


def _pin(values: Tensor) -> Tensor:
    return values.pin_memory() if values.device.type == "cpu" else values


def seed_everything(seed: int) -> None:
    """Seeds the global generators: what is drawn without a name depends on its place, not on what ran before."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (libraries still draw from it)
    random.seed(seed)


class _Exhausted(Exception):
    """A batch has no further loss."""


class _NextLoss(nn.Module):
    """The next loss of a batch as a forward pass, which is where distributed training prepares its reductions."""

    def __init__(self, module: nn.Module, device: torch.device, precision: Precision) -> None:
        super().__init__()
        self.module, self._device_type, self._lower = module, device.type, precision != "float32"

    def forward(self, losses: Iterator[Tensor]) -> Tensor:
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._lower):
            loss = next(losses, None)
        if loss is None:
            raise _Exhausted
        return loss.float()


def _make_state(
    stage: Trainable, optimizers: list[torch.optim.Optimizer], history: list[float], best: Any
) -> dict[str, Any]:
    return {
        "stage": stage.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "history": history,
        "best": best,
        "watched": dict(stage.watched),
    }


def _distribute(next_loss: _NextLoss, workers: Workers) -> nn.Module:
    # A loss may reach some of the parameters only (one flow of several), hence the search for unused ones. Batch norms
    # are frozen or synchronised, so no buffer needs to be sent.
    if workers.size == 1:
        return next_loss
    return DistributedDataParallel(next_loss, forward_sync_buffers=False, find_unused_parameters=True)


def _set_rates(optimizers: list[torch.optim.Optimizer], rates: list[list[float]], factor: float) -> None:
    for optimizer, base in zip(optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * factor


def _tame_gradients(module: nn.Module, clip_norm: float | None) -> Tensor:
    """Clips the gradients to a norm, or zeroes them all if one is not finite; whether they were finite, on the device.

    Gradients are summed over workers by now, so all decide alike without asking each other, and nobody waits for the
    device.
    """
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    finite = norm.isfinite()
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(module.parameters(), clip_norm, norm)
    for gradient in gradients:
        gradient.masked_fill_(~finite, 0.0)
    return finite


def _mean_loss(sums: Tensor, workers: Workers, name: str, epoch: int) -> float:
    """Mean loss of an epoch over all workers. Raises TrainingError if no step was finite."""
    if workers.size > 1:
        dist.all_reduce(sums[0])  # every worker counts the same steps
    total, finite, steps = sums.tolist()
    if steps and not finite:
        raise TrainingError(f"stage {name!r}, epoch {epoch + 1}: no step has finite gradients; lower the learning rate")
    return total / max(finite, 1.0)
