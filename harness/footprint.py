"""What a trial will take: the memory of its process and the bytes of its features, from shapes alone.

An estimate for admission, not a bound: what a method keeps is counted where the method says it (`fit_bytes`), the
network by its parameters, features and maps by their shapes; libraries and everything small are a constant. It lies
within a factor of `FACTOR` of the peak that rows report.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.backbones import count_parameters, level_shapes
from harness.contracts import Footprint
from harness.resolve import CategoryData, ResolvedTrial

FACTOR = 2.5
"""Between an estimate and the peak of a fresh process; one that has run other trials keeps some of their memory."""
BASE_BYTES = 600 * 2**20
"""Interpreter, torch, the harness, buffers of decoding and of one forward pass."""
TRAINING_BYTES = 600 * 2**20
"""Parameters of a trained part with gradients, moments and activations, where a method does not say more."""
PIXEL_BYTES = 16
"""Of each pixel of a chunk of test maps: at full resolution in float32, smoothed, and its mask."""


def predict_footprint(resolved: ResolvedTrial, data: Mapping[str, CategoryData]) -> Footprint:
    """What a trial takes: its memory is that of the largest fit, its features those of all categories.

    Args:
        resolved: the trial.
        data: the images of each of its categories.
    """
    method, config, trial = resolved.method, resolved.config, resolved.trial
    height, width = resolved.preprocessing.image_size
    groups = [list(data.values())] if method.scope == "dataset" else [[one] for one in data.values()]
    parts: dict[str, int] = {"libraries and buffers": BASE_BYTES}
    feature_bytes, per_image = 0, 3 * height * width
    shapes: tuple[tuple[int, int, int], ...] = ()
    if resolved.backbone is not None:
        size = resolved.preprocessing.image_size
        shapes = level_shapes(resolved.backbone, trial.layers, size)
        parts["backbone"] = 2 * 4 * count_parameters(resolved.backbone)  # once more while weights are loaded
        if method.inputs(config) == "features":
            per_image = 2 * sum(depth * rows * columns for depth, rows, columns in shapes)
            feature_bytes = per_image * sum(len(one.train) + len(one.test) for one in data.values())
    most: dict[str, int] = {}
    for group in groups:
        num_train = sum(len(one.train) for one in group)
        num_test = max(len(one.test) for one in group)
        taken = {
            "images or features read": per_image * (num_train + num_test),
            "what the method keeps": _fit_bytes(method, config, shapes, num_train),
            "test maps": num_test * height * width * 4 + 32 * height * width * PIXEL_BYTES,
        }
        if sum(taken.values()) > sum(most.values()):
            most = taken
    return Footprint(feature_bytes=feature_bytes, parts=parts | most)


def _fit_bytes(method: Any, config: Any, shapes: tuple[tuple[int, int, int], ...], num_images: int) -> int:
    if hasattr(method, "fit_bytes"):
        return int(method.fit_bytes(config, shapes, num_images))
    return TRAINING_BYTES if hasattr(method, "stages") else 0
