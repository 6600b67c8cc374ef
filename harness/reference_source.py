"""Where a pretraining has the features of its references from: stored on this node's disk, or encoded at every use.

The numbers are the same. Stored is faster as long as the features fit and the disk delivers them faster than the
backbone makes them; both are measured here, on this machine, when a plan or a pretraining asks.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch

from harness.backbone_table import ResolvedBackbone
from harness.backbones import FrozenBackbone, level_shapes
from harness.contracts import Pretraining

STORED_BYTES, KEPT_BYTES = 2, 4
"""Of a number in the store, float16, and in a pool in memory, float32."""
PROBE_BYTES = 2**26
PROBE_IMAGES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceChoice:
    """Where references come from, and why."""

    source: Literal["store", "encode"]
    reason: str


def choose_source(
    pretraining: Pretraining,
    backbone: ResolvedBackbone,
    cache_dir: str,
    cache_gib: float,
    device: torch.device,
) -> SourceChoice:
    """Store or encode, as the space says or as is faster; the images of a pool are few and encoded once.

    Args:
        pretraining: what is trained.
        backbone: its backbone, with weights at hand.
        cache_dir: the feature store's folder.
        cache_gib: its bound.
        device: where the backbone runs.
    """
    if pretraining.reference_source != "auto":
        source = pretraining.reference_source
        return SourceChoice(source=source, reason=f"references: {source}, as the space says")
    shapes = level_shapes(backbone, pretraining.layers, pretraining.protocol.image_size)
    numbers = sum(math.prod(shape) for shape in shapes)
    if pretraining.pool is not None:
        gib = pretraining.num_references * KEPT_BYTES * numbers / 2**30
        return SourceChoice(
            source="encode",
            reason=f"references: a pool of {pretraining.num_references}, each encoded once; its features take "
            f"{gib:.3g} GiB in the memory of each worker",
        )
    image_bytes = STORED_BYTES * numbers
    gib = pretraining.num_references * image_bytes / 2**30
    size = f"features of {pretraining.num_references} references take {gib:.3g} GiB"
    if gib > cache_gib:
        return SourceChoice(
            source="encode",
            reason=f"references: encoded at every use; {size}, more than the cache's bound of {cache_gib:g} GiB",
        )
    read = measure_storage(cache_dir) / image_bytes
    encode = measure_encoding(pretraining, backbone, device)
    faster: Literal["store", "encode"] = "store" if read >= encode else "encode"
    return SourceChoice(
        source=faster,
        reason=f"references: {faster}; {size}, the disk gives {read:,.0f} images/s, the backbone {encode:,.0f}",
    )


def measure_storage(folder: str) -> float:
    """Bytes per second that are read from a file that is not in memory; infinite where nothing can be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            start = time.perf_counter()
            while file.read(2**22):
                pass
            return PROBE_BYTES / (time.perf_counter() - start)
    except OSError:
        return math.inf


def measure_encoding(pretraining: Pretraining, backbone: ResolvedBackbone, device: torch.device) -> float:
    """Images per second through the frozen backbone."""
    size = pretraining.protocol.image_size
    encoder = FrozenBackbone(backbone, pretraining.layers, device, image_size=size)
    images = torch.rand(PROBE_IMAGES, 3, *size, generator=torch.Generator().manual_seed(0))
    encoder.encode(images)  # the first pass makes plans and buffers
    start = time.perf_counter()
    for level in encoder.encode(images):
        level.sum().item()  # waits for the device
    return PROBE_IMAGES / (time.perf_counter() - start)
