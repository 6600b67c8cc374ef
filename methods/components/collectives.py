"""What workers that share a training step must tell each other so that its numbers do not depend on how many they are.

Sums over a batch need nothing of this: a stage yields its share of them. Quantiles and batch statistics do. Without an
initialised process group, or with one worker, everything here is the identity. All workers must call these functions
equally often and in the same order, as they do when they run the same code on their parts of a batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def num_workers() -> int:
    """Workers that share the training of this process; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_workers(values: Tensor) -> Tensor:
    """The sum of a tensor over all workers, on each of them; gradients flow back to every worker's part.

    Args:
        values: any shape, the same on every worker.

    Returns:
        The same shape. Its gradient is that of the sum of all workers' losses.
    """
    if num_workers() == 1:
        return values
    return _Sum.apply(values)


def gather_images(values: Tensor, num_images: int) -> Tensor:
    """One row for every image of the whole batch, on every worker; no gradient flows through.

    Args:
        values: (b, ...) float, a row for each image of this worker, which has its even share of them.
        num_images: images of the whole batch.

    Returns:
        (n, ...) rows of all workers, n >= num_images; rows of NaN make up for workers with an image less.
    """
    values = values.detach()
    if num_workers() == 1:
        return values
    most = -(-num_images // num_workers())
    padded = values.new_full((most, *values.shape[1:]), torch.nan)
    padded[: len(values)] = values
    everyone = [torch.empty_like(padded) for _ in range(num_workers())]
    dist.all_gather(everyone, padded)
    return torch.cat(everyone)


class SharedBatchNorm(nn.BatchNorm2d):
    """A batch norm whose statistics are those of the whole batch over all workers, on any device.

    The same numbers as torch's on one worker, in training and after it. `torch.nn.SyncBatchNorm` does this for
    accelerators alone. Takes (N, D) rows as well as (N, D, ...) maps.
    """

    def forward(self, values: Tensor) -> Tensor:
        """(N, D, ...) to the same shape; in training every worker must call it."""
        if num_workers() == 1 or not self.training:
            return super().forward(values)
        values = values.float()
        others = (0, *range(2, values.ndim))  # all dimensions but the channel's
        shape = (1, -1) + (1,) * (values.ndim - 2)
        here = values.new_full((1,), values.numel() // values.shape[1])
        sums = sum_over_workers(torch.cat([values.sum(dim=others), here]))
        count = sums[-1]
        mean = sums[:-1] / count
        centred = values - mean.view(shape)
        variance = sum_over_workers(centred.square().sum(dim=others)) / count
        self._follow(mean.detach(), (variance * count / (count - 1)).detach())
        normed = centred * torch.rsqrt(variance + self.eps).view(shape)
        return normed * self.weight.view(shape) + self.bias.view(shape)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics towards those of a batch."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked += 1

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (N, D, ...), got shape {tuple(input.shape)}")


class _Sum(torch.autograd.Function):
    """An all-reduce whose backward pass is one, too: the sum reaches the loss of every worker."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total
