"""Rows and numbers of all workers on each of them, with gradients, for losses whose terms meet across images."""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from methods.components.collectives import num_workers, sum_over_workers


def worker_rank() -> int:
    """Number of this worker, in [0, num_workers())."""
    return dist.get_rank() if num_workers() > 1 else 0


def from_each_worker(values: Tensor) -> Tensor:
    """What every worker has, on each of them; gradients flow back to every worker's part.

    Args:
        values: any shape, the same on every worker.

    Returns:
        (workers, ...) in the order of the ranks.
    """
    if num_workers() == 1:
        return values[None]
    everyone = values.new_zeros(num_workers(), *values.shape)
    everyone[worker_rank()] = values
    return sum_over_workers(everyone)


def gather_rows(rows: Tensor) -> tuple[Tensor, slice]:
    """The rows of all workers, however many each has; gradients flow back to every worker's rows.

    Args:
        rows: (n, D) of this worker, n >= 0.

    Returns:
        (sum of n, D) in the order of the ranks, the same numbers on every worker; and where this worker's own are.
    """
    if num_workers() == 1:
        return rows, slice(0, len(rows))
    numbers = from_each_worker(rows.new_full((), len(rows)).double()).int().tolist()
    before = sum(numbers[: worker_rank()])
    own = slice(before, before + len(rows))
    return sum_over_workers(F.pad(rows, (0, 0, before, sum(numbers) - own.stop))), own
