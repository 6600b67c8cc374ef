"""Settings of the pretraining; the defaults are those of the official code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from methods.adpretrain.losses import NormForm
from methods.adpretrain.projector import NUM_REFERENCES

Features = Literal["residual", "plain"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of ADPretrain's training; the defaults are those of the official code unless said otherwise."""

    features: Features = "residual"
    """What is projected: residuals to the references, or, for comparison, the features as they are."""
    num_references: int = NUM_REFERENCES
    """Learned tokens of the projector per level, >= 1."""
    epochs: int = 10
    """Passes over the auxiliary images, >= 1."""
    batch_size: int = 32
    """Images per step over all workers together, >= 1."""
    learning_rate: float = 1e-4
    """Of Adam, > 0."""
    weight_decay: float = 5e-4
    """Of Adam, as an L2 term of the gradient, >= 0."""
    milestones: tuple[int, ...] = (7, 9)
    """Epochs after which the learning rate falls by `decay`, ascending."""
    decay: float = 0.1
    """Factor of the learning rate at every milestone, in (0, 1]."""
    angle_weight: float = 1.0
    """Of the angle loss, >= 0; the ablation of the paper has 0 or 1."""
    norm_weight: float = 1.0
    """Of the norm losses, >= 0."""
    temperature: float = 0.15
    """Of the angle loss, > 0."""
    norm_form: NormForm = "root"
    """Size of a token in the norm loss: `root` as in the code, `pseudo_huber` as the paper writes."""
    negatives: Literal["gathered", "local"] = "gathered"
    """`gathered`: the losses are those of the whole batch, however many workers share it. `local`: every worker has
    only its own images as negatives and for the radius of the norm loss."""
    reference_counts: tuple[int, ...] = (1, 4, 8)
    """Each step draws one of these numbers of references per image."""
    centre_references: int = 4
    """References per image from which the centre of the angle loss is computed, >= 1."""
    view_statistics: Literal["clip", "backbone"] = "clip"
    """Input scale of the two views: `clip`, as in the code, whatever the backbone's own is that references, centre and
    later use have; `backbone` has its own scale for all."""
    normal_batches: Literal["skip", "zero"] = "skip"
    """What becomes of a batch without an anomalous image: no step, as in the code, or a step with zero loss, in which
    weight decay and the momentum of Adam still act."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "centre_references", "num_references"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "angle_weight", "norm_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.angle_weight == self.norm_weight == 0:
            raise ValueError("angle_weight and norm_weight are both 0, which leaves nothing to learn; raise one")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {self.decay}")
        if any(milestone < 1 for milestone in self.milestones) or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must be epochs from 1 on, ascending, got {list(self.milestones)}")
        if not self.reference_counts or min(self.reference_counts) < 1:
            raise ValueError(f"reference_counts must be numbers from 1 on, got {list(self.reference_counts)}")
        for name, known in (
            ("features", ("residual", "plain")),
            ("norm_form", ("root", "pseudo_huber")),
            ("negatives", ("gathered", "local")),
            ("view_statistics", ("clip", "backbone")),
            ("normal_batches", ("skip", "zero")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, got {getattr(self, name)!r}")
