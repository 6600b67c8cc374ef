"""Whether learned features collapse: the standard deviation of normalised features, as SimSiam watches it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.components.collectives import sum_over_workers
from methods.components.levels import float64_device


class Spread:
    """Standard deviation of features of length 1 over all places of all images, times the root of their dimensions.

    0 where all are equal, 1 where they point evenly in all directions (SimSiam, arXiv 2011.10566, section 4.1, where
    1 / sqrt(D) is the value without collapse).
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (2 D + 1,) float64: of features, of their squares, and how many

    @torch.no_grad()
    def add(self, maps: Tensor) -> None:
        """Counts (B, D, h, w) maps in; nobody waits for the device."""
        rows = F.normalize(maps.float(), dim=1)
        count = rows.new_full((1,), rows.numel() // rows.shape[1])
        sums = torch.cat([rows.sum(dim=(0, 2, 3)), rows.square().sum(dim=(0, 2, 3)), count])
        sums = sums.to(float64_device(sums.device), torch.float64)
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def value(self) -> Tensor:
        """() float64 over what all workers have added; every worker must ask."""
        assert self._sums is not None, "something was added"
        sums = sum_over_workers(self._sums)
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        return deviation.mean() * deviation.numel() ** 0.5
