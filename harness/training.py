"""The home of gradient training: runs the stages of a method over its training images.

With one worker a stage runs in the trial's own process, by the loop below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from harness.contracts import Batch, Split, Trainable, derive_seed

EpochReport = Callable[[int, int, float], None]
"""Called after each epoch with (epochs done, epochs in all, mean loss)."""


class TrainingError(RuntimeError):
    """A stage cannot go on: its loss is not finite."""


class ShuffledLoader:
    """Batches of a split in an order that depends on seed and epoch alone."""

    def __init__(self, split: Split, batch_size: int, seed: int, epoch: int) -> None:
        """Args: images per batch (the last one may be smaller); seed and epoch that fix the order."""
        self._split = split
        self._batch_size = batch_size
        generator = torch.Generator().manual_seed(derive_seed("epoch order", seed, epoch))
        self._order = torch.randperm(len(split), generator=generator).tolist()

    def __len__(self) -> int:
        """Batches per epoch."""
        return math.ceil(len(self._order) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Each image once."""
        for start in range(0, len(self._order), self._batch_size):
            yield self._split.take(self._order[start : start + self._batch_size])


def train_stage(stage: Trainable, train: Split, seed: int, report: EpochReport = lambda *_: None) -> list[float]:
    """Trains one stage in this process.

    Args:
        stage: what to train; one optimiser step follows each loss it yields.
        train: normal training images.
        seed: fixes the order of the images.
        report: called after every epoch.

    Returns:
        The mean loss of each epoch.

    Raises:
        TrainingError: a loss is NaN or infinite.
    """
    optimizer = stage.configure_optimizers()
    history = []
    for epoch in range(stage.epochs):
        loader = ShuffledLoader(train, stage.batch_size, seed, epoch)
        stage.begin_epoch(loader, epoch)
        # Sums stay on the device: reading a value back every step would wait for it.
        total, steps = torch.zeros((), dtype=torch.float64), 0
        for batch in loader:
            for loss in stage.losses(batch):
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total, steps = total.to(loss.device) + loss.detach().double(), steps + 1
        mean = float(total) / max(steps, 1)
        if not math.isfinite(mean):
            raise TrainingError(f"stage {stage.name!r}, epoch {epoch + 1}: the loss is {mean}; lower the learning rate")
        history.append(mean)
        report(epoch + 1, stage.epochs, mean)
    return history
