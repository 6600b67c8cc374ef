"""The feature maps of a whole split in memory, and where to compute on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.contracts import Split


def collect_levels(split: Split, channels: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Feature maps of all images of a split, each number held once.

    Args:
        split: images as features of a backbone.
        channels: per level the int64 channels wanted; None for all.

    Returns:
        (N, D_l, h_l, w_l) float32 per level, on the device where the split gives them.
    """
    levels: list[Tensor] = []
    begin = 0
    for batch in split:
        assert batch.levels is not None, "the method asked for features"
        chosen = (
            batch.levels
            if channels is None
            else [level[:, some.to(level.device)] for level, some in zip(batch.levels, channels, strict=True)]
        )
        if not levels:
            # Patch vectors contiguous, as the store and channels-last networks give them.
            levels = [
                torch.empty((len(split), *maps.shape[1:]), device=maps.device, memory_format=torch.channels_last)
                for maps in chosen
            ]
        for level, maps in zip(levels, chosen, strict=True):
            level[begin : begin + len(maps)] = maps
        begin += len(batch)
    if begin != len(split) or not levels:
        raise ValueError(f"the split holds {len(split)} images but gave {begin}")
    return levels


def float64_device(device: torch.device) -> torch.device:
    """The device itself, or the CPU for a device without float64 (Apple's)."""
    return torch.device("cpu") if device.type == "mps" else device
