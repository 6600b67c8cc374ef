"""Projected residual features in place of plain ones, for any detector (ADPretrain, arXiv 2511.05245)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from harness.contracts import AdgridError, Context, InputScale, LevelChoice, Split
from methods.adpretrain.checkpoint import load_checkpoint, projector_from_state
from methods.adpretrain.pretraining import Pretraining
from methods.adpretrain.projector import Projector
from methods.adpretrain.references import SplitReferences, pool_of
from methods.adpretrain.residuals import residual
from methods.adpretrain.settings import Config, Features

REPRESENTATION_VERSION = 1

_Config = Config  # inside the class below, `Config` is its attribute


class ProjectedResiduals:
    """A frozen projector over residuals to normal references; satisfies `harness.contracts.Representation`."""

    summary = "projected residuals to normal references (ADPretrain, arXiv 2511.05245)"
    levels = LevelChoice(strides=(4, 8, 16, 32), taps=(0, 1, 2, 3))
    Config = Config

    def __init__(
        self, projector: Projector, levels: Sequence[int] | None = None, features: Features = "residual"
    ) -> None:
        """Args: the projector; which of its levels will be given, None for all; what it was trained on."""
        self.projector, self._features = projector.eval(), features
        parts = list(projector.children())
        self._parts = parts if levels is None else [parts[number] for number in levels]

    @classmethod
    def pretraining(
        cls, config: _Config, context: Context, references: Split, input_scale: InputScale, pool: int | None = None
    ) -> Pretraining:
        """The stage that trains a fresh projector, see `harness.contracts.Representation`.

        Args:
            pool: so many references of each category and view, kept in memory; None for all of them.
        """
        widths = [width for width, _, _ in context.level_shapes]
        projector = Projector(
            widths, num_references=config.num_references, seed=context.seed_of("adpretrain projector")
        )
        source = pool_of(SplitReferences(references, context), pool, context)
        return Pretraining(projector.to(context.device), config, context, source, input_scale)

    @classmethod
    def from_state(
        cls, config: _Config, state: Mapping[str, Tensor], levels: Sequence[int], where: str
    ) -> ProjectedResiduals:
        """See `harness.contracts.Representation`."""
        projector = projector_from_state(state, where)
        known = len(projector.channels)
        if max(levels) >= known:
            raise AdgridError(f"{where}: it has {known} levels, and level {max(levels) + 1} is wanted")
        return cls(projector, levels, config.features)

    @classmethod
    def read_checkpoint(cls, path: str) -> Mapping[str, Tensor]:
        """The projector in a file of the official code or of `export_checkpoint`."""
        return load_checkpoint(path).state_dict()

    def to(self, device: torch.device) -> ProjectedResiduals:
        """Moves the projector to where the features are."""
        self.projector.to(device)
        return self

    @torch.no_grad()
    def apply(self, levels: tuple[Tensor, ...], reference: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Replaces features of images by their projected residuals.

        Args:
            levels: (B, C, h, w) features per level.
            reference: (R, C) tokens per level of normal images of the category; needed here.

        Returns:
            (B, C, h, w) float32 per level; the result for an image does not depend on the others in the batch.
        """
        rests = [level.float() for level in levels]
        if self._features == "residual":
            if reference is None:
                raise ValueError("projected residuals need reference tokens of normal images, got none")
            rests = [residual(rest, tokens) for rest, tokens in zip(rests, reference, strict=True)]
        return tuple(part(rest).float() for part, rest in zip(self._parts, rests, strict=True))
