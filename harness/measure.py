"""Clocks and memory of one cell. A clock stops only after the device has finished."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


class Meter:
    """Adds up seconds per stage and knows the peak memory since it was made."""

    def __init__(self, device: torch.device) -> None:
        """Starts counting peak memory afresh on `device` and, where the system allows, in this process."""
        self._device = device
        self._seconds: dict[str, float] = {}
        _reset_peak_rss()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def copy(self) -> Meter:
        """A meter that goes on from the same sums, for one of several cells that share a fit."""
        twin = object.__new__(Meter)
        twin._device, twin._seconds = self._device, dict(self._seconds)
        return twin

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds of the block to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start

    def costs(self) -> dict[str, float]:
        """Seconds per stage, `peak_rss_mib`, and `peak_gpu_mib` on an accelerator."""
        costs = {name: round(seconds, 4) for name, seconds in self._seconds.items()}
        costs["peak_rss_mib"] = round(_peak_rss_bytes() / 2**20, 1)
        if self._device.type == "cuda":
            costs["peak_gpu_mib"] = round(torch.cuda.max_memory_allocated(self._device) / 2**20, 1)
        return costs


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the processor or of an accelerator ran out."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(error)


def free_memory() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reset_peak_rss() -> None:
    # Linux forgets its high-water mark on request; elsewhere the peak is that of the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_rss_bytes() -> int:
    with contextlib.suppress(OSError, StopIteration, IndexError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))
