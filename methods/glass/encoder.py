"""From images to the patch features of GLASS: PatchCore's, of a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.contracts import Context
from methods.components.patches import average_and_concatenate, pool_patches
from methods.glass.settings import Config


class PatchEncoder:
    """Images to levels to patch features, in float32 whatever the precision of the training around it.

    Normal and painted images must be encoded alike: the discriminator would tell a difference of precision.
    """

    def __init__(self, config: Config, context: Context) -> None:
        assert context.encode is not None, "the backbone's use is declared as frozen"
        widths = [width for width, _, _ in context.level_shapes]
        wide_enough = min(widths) * config.patch_size**2 >= config.embed_width
        embedding = (
            pool_patches(widths, config.patch_size, config.embed_width, config.target_width)
            if wide_enough
            else average_and_concatenate(widths, config.patch_size)
        )
        self._encode, self._device = context.encode, context.device
        self._embedding = embedding.to(context.device)
        self.width = embedding.width
        """E: numbers per patch."""
        self.grid = context.level_shapes[0][1:]
        """(h, w) of the patches."""

    @torch.no_grad()
    def levels(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] to one (B, D_l, h_l, w_l) map per level, on the context's device."""
        with torch.autocast(self._device.type, enabled=False):
            pixels = images.to(self._device, non_blocking=True)
            return [level.to(self._device) for level in self._encode(pixels)]

    @torch.no_grad()
    def patches(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels to (B, P, E) patch features."""
        with torch.autocast(self._device.type, enabled=False):
            return self._embedding(levels).flatten(1, 2)
