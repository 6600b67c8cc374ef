"""Projected residual features in place of plain ones, for any detector (ADPretrain, arXiv 2511.05245)."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.contracts import Trainable
from methods.adpretrain.pretraining import Pretraining
from methods.adpretrain.projector import Projector
from methods.adpretrain.residuals import residual


class ProjectedResiduals:
    """A frozen projector over residuals to normal references; satisfies `harness.contracts.Representation`."""

    name = "adpretrain"

    def __init__(self, projector: Projector, stage: Pretraining | None = None) -> None:
        """Args: the projector, on the device of the features; the stage that trains it, None for a trained one."""
        self.projector, self._stage = projector, stage

    @torch.no_grad()
    def apply(self, levels: tuple[Tensor, ...], reference: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Replaces features of images by their projected residuals.

        Args:
            levels: (B, C, h, w) features per level, in the order the projector was trained on.
            reference: (R, C) tokens per level of normal images of the category; needed here.

        Returns:
            (B, C, h, w) float32 per level; the result for an image does not depend on the others in the batch.
        """
        if reference is None:
            raise ValueError("projected residuals need reference tokens of normal images, got none")
        rests = [residual(level.float(), tokens) for level, tokens in zip(levels, reference, strict=True)]
        self.projector.eval()
        return tuple(level.float() for level in self.projector(rests))

    def stages(self) -> list[Trainable]:
        """The pretraining, if the projector is still to be trained."""
        return [] if self._stage is None else [self._stage]
