"""The settings of ToCoAD, and which of them each stage depends on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from methods.components.memory_bank import BankSettings


@dataclass(frozen=True, kw_only=True)
class Config(BankSettings):
    """Settings of ToCoAD, with those of PatchCore's memory bank. What the paper states is marked so; all other defaults
    are ours, with their reason."""

    stages: Literal["none", "I", "II", "I+II"] = "I+II"
    """Which stages are trained; both in the paper. `none`: the memory bank of the pretrained backbone. `I`: the
    discriminative network alone, whose segmentation is the anomaly map. `II`: contrastive learning without a guide, so
    without its negative term."""

    # Synthetic anomalies, in both stages.
    generator: Literal["perlin", "cutpaste", "seamless"] = "perlin"
    """How normal images are made anomalous: textures in Perlin masks (DRAEM; the paper's choice), pasted patches and
    strips, half each (CutPaste), or patches blended in seamlessly (NSA)."""
    textures: str | None = None
    """Folder of texture images, such as DTD's, for `perlin`; None for generated ones, which need no data."""
    largest_beta: float = 0.8
    """The image shows through a texture with a share drawn from [0, largest_beta), in [0, 1]; DRAEM's."""
    match_colour: bool = True
    """Whether textures lose their colour on images that have none, those of grey-level cameras. Otherwise colour alone
    tells anomalies there, and defects without colour go unseen."""

    # Stage I: the discriminative network.
    anomaly_probability: float = 0.5
    """Share of training images that get an anomaly in stage I, in [0, 1]; DRAEM's. In stage II all get one."""
    decoder_width: float = 1.0
    """Channels of the decoder at each level, as a multiple of the backbone's there, > 0; 1 mirrors them."""
    decoder_blocks: int = 2
    """Residual blocks per level, >= 1; less than the backbone's 3 to 6, as the encoder is pretrained and frozen."""
    decoder_skips: bool = True
    """Whether the decoder sees every level of the backbone. Without, only the deepest one, too coarse for thin
    defects."""
    guide_loss: Literal["focal", "cross_entropy"] = "focal"
    """Loss of a pixel; focal in the paper, cross-entropy in its ablation."""
    focal_alpha: float = 0.5
    """Weight of anomalous pixels in the focal loss, in [0, 1]; the paper's."""
    focal_gamma: float = 2.0
    """How much less the focal loss counts well classified pixels, >= 0; the paper's."""
    guide_epochs: int = 100
    """Passes over the training images; the decoder alone learns, so less than DRAEM's 700."""
    guide_batch_size: int = 8
    """Images per step; DRAEM's."""
    guide_lr: float = 1e-3
    """Of Adam, falling to 0 along half a cosine; Adam's own default, for a network that starts anew."""

    # Stage II: negative-guided bootstrap contrastive learning.
    contrast: Literal["simsiam", "byol", "cosine"] = "simsiam"
    """Form of the loss. `simsiam`: a predictor and a stopped gradient (the paper's best). `byol`: the target comes from
    a moving average of the network. `cosine`: neither predictor nor moving average."""
    contrast_levels: tuple[int, ...] = (-2, -1)
    """Positions among the levels that are read, shallow to deep; negative ones count from the end. The paper's best are
    3 and 4 of 4. One that a backbone lacks is left out."""
    projector_layers: int = 2
    """Layers between a level and the space where views are compared, >= 0; SimSiam has 3 for training from scratch."""
    projector_width: int = 256
    """Dimensions of that space; SimSiam's 2048 are for whole images of 1000 classes."""
    predictor_width: int = 64
    """Hidden width of the predictor, a quarter of its input as in SimSiam."""
    ema_momentum: float = 0.99
    """Share of the target that stays in a step of `byol`, in [0, 1); BYOL's base value for short trainings."""
    positive_weight: float = 1.0
    """Weight of the agreement of two views of a normal image, >= 0."""
    negative_weight: float = 1.0
    """Weight of the term that parts anomalous from normal features, >= 0."""
    margin: float = 0.0
    """Cosine up to which an anomalous feature is far enough from the normal one at its place, in [-1, 1); projected
    features are centred by a batch norm, so that unrelated ones have a cosine of about 0."""
    view_jitter: float = 0.05
    """Largest change of brightness, contrast, saturation and hue between views, in [0, 0.5]; small, as a wrong colour
    can be the defect. Views are not moved, since features are compared at the same place."""
    view_noise: float = 0.01
    """Standard deviation of the noise on every pixel of a view, >= 0; that of a decent camera."""
    freeze_batch_norm: bool = True
    """Whether the backbone's batch norms keep their pretrained statistics, as usual for small batches."""
    contrast_epochs: int = 20
    """Passes over the training images; few, since the features are to be adapted and not learned anew."""
    contrast_batch_size: int = 16
    """Images per step; each counts three times, as two views and an anomaly."""
    backbone_lr: float = 1e-5
    """Of AdamW for the backbone, falling to 0 along half a cosine; a hundredth of the heads'."""
    head_lr: float = 1e-3
    """The same for projectors and predictors, which start anew."""
    weight_decay: float = 1e-4
    """Of AdamW, >= 0; SimSiam's."""
    collapse_threshold: float = 0.1
    """Spread of normalised features (0: all equal, 1: evenly in all directions) below which a collapse is warned of."""

    # Inference.
    memory_levels: tuple[int, ...] = (-3, -2)
    """Levels of the memory bank, counted like `contrast_levels`; PatchCore's second and third."""
    guide_score: float = 0.0
    """A patch's score is multiplied by 1 + guide_score times the guide's probability there, >= 0; 0 is the paper's
    memory bank alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("decoder_width", "guide_lr", "backbone_lr", "head_lr")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        unsigned = ("projector_layers", "focal_gamma", "positive_weight", "negative_weight", "view_noise")
        for name in (*unsigned, "weight_decay", "collapse_threshold", "guide_score"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        whole = ("decoder_blocks", "guide_epochs", "guide_batch_size", "projector_width", "predictor_width")
        for name in (*whole, "contrast_epochs", "contrast_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("largest_beta", "anomaly_probability", "focal_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.ema_momentum < 1:
            raise ValueError(f"ema_momentum must be in [0, 1), got {self.ema_momentum}")
        if not -1 <= self.margin < 1:
            raise ValueError(f"margin must be in [-1, 1), got {self.margin}")
        if not 0 <= self.view_jitter <= 0.5:
            raise ValueError(f"view_jitter must be in [0, 0.5], got {self.view_jitter}")
        for name in ("contrast_levels", "memory_levels"):
            if not getattr(self, name) or 0 in getattr(self, name):
                raise ValueError(f"{name} must be positions from 1, or from -1 backwards, got {getattr(self, name)}")
        choices = {
            "stages": ("none", "I", "II", "I+II"),
            "generator": ("perlin", "cutpaste", "seamless"),
            "guide_loss": ("focal", "cross_entropy"),
            "contrast": ("simsiam", "byol", "cosine"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.guide_score > 0 and self.stages != "I+II":
            raise ValueError("guide_score weighs the memory bank by the guide, which needs stages: I+II; set it to 0")

    @property
    def guided(self) -> bool:
        """Whether the discriminative network is trained."""
        return self.stages in ("I", "I+II")

    @property
    def tuned(self) -> bool:
        """Whether the backbone is trained."""
        return self.stages in ("II", "I+II")


GUIDE_FIELDS = (
    "generator",
    "textures",
    "largest_beta",
    "match_colour",
    "anomaly_probability",
    "decoder_width",
    "decoder_blocks",
    "decoder_skips",
    "guide_loss",
    "focal_alpha",
    "focal_gamma",
    "guide_epochs",
    "guide_batch_size",
    "guide_lr",
)
"""What the result of stage I depends on."""
CONTRAST_FIELDS = (
    "stages",
    "contrast",
    "contrast_levels",
    "projector_layers",
    "projector_width",
    "predictor_width",
    "ema_momentum",
    "positive_weight",
    "negative_weight",
    "margin",
    "view_jitter",
    "view_noise",
    "freeze_batch_norm",
    "contrast_epochs",
    "contrast_batch_size",
    "backbone_lr",
    "head_lr",
    "weight_decay",
    "collapse_threshold",
)
"""What the result of stage II depends on besides those of stage I, if that is its guide."""
MEMORY_FIELDS = ("memory_levels", "guide_score", *(field.name for field in fields(BankSettings)))
"""What is read after training only."""


def choose_levels(positions: tuple[int, ...], num_levels: int) -> list[int]:
    """Indices from 0 of the wanted levels among those that are read, without the ones that are not there.

    Args:
        positions: counted from 1, or from -1 backwards.
        num_levels: how many there are.
    """
    wanted = [position - 1 if position > 0 else num_levels + position for position in positions]
    return [index for index in dict.fromkeys(wanted) if 0 <= index < num_levels]
