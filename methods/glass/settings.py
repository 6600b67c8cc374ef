"""The settings of GLASS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of GLASS; the defaults are those of the official code for MVTec AD."""

    patch_size: int = 3
    """Side of the neighbourhood that makes a patch, odd, >= 1."""
    embed_width: int = 1536
    """Numbers that a level's patch is pooled to (`pretrain_embed_dimension`)."""
    target_width: int = 1536
    """Numbers that all levels of a patch are pooled to (`target_embed_dimension`)."""
    adaptor: bool = True
    """Trains a linear map of the patch features (`pre_proj` 1); without it they are used as they are."""
    discriminator_layers: int = 2
    """Linear layers of the discriminator, >= 1."""
    hidden_width: int = 1024
    """Width between the discriminator's layers."""
    epochs: int = 640
    batch_size: int = 8
    """Images per step."""
    max_images_per_epoch: int | None = 400
    """Images an epoch sees at most, drawn anew each time; None for all. The code's `limit` of 392 is checked after a
    batch has passed it, which is 50 batches of 8."""
    adaptor_lr: float = 1e-4
    """Learning rate of Adam, > 0."""
    adaptor_weight_decay: float = 1e-5
    discriminator_lr: float = 2e-4
    """Learning rate of AdamW, > 0."""
    noise: float = 0.015
    """Standard deviation of the noise that a global anomaly starts from."""
    ascent_steps: int = 20
    """Steps of gradient ascent, >= 0."""
    ascent_rate: float = 0.001
    """Length of such a step."""
    project_every: int = 5
    """Steps after which the distance is put right, >= 1."""
    distribution: Literal["auto", "manifold", "hypersphere"] = "auto"
    """`manifold`: a global anomaly keeps a distance to its own normal feature. `hypersphere`: every anomaly keeps one
    to the class centre. `auto`: judged by the spectrum of the mean training image."""
    manifold_radius: float = 0.5
    """r of the manifold hypothesis: global anomalies are r to 2 r away."""
    radius_quantile: float = 0.75
    """Quantile of normal features' distances to the centre that is r of the hypersphere hypothesis, in [0, 1]."""
    easy_quantile: float = 0.5
    """Patches with errors below this quantile are left out of the loss of local anomalies (`p`), in [0, 1)."""
    focal_gamma: float = 2.0
    beta_mean: float = 0.5
    """Mean of the share of the image that shows through a painted texture."""
    beta_std: float = 0.1
    """Its standard deviation; what is drawn is clipped to [0.2, 0.8]."""
    textures: str | None = None
    """Folder with texture images, such as DTD's `images`; None for generated textures."""
    foreground_masks: str | None = None
    """Folder with a mask `<category>/<image name>` for each training image, non-zero on the object; None to paint
    anywhere. A mask is resized straight to the image size: give no protocol that crops."""

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.patch_size % 2 == 0:
            raise ValueError(f"patch_size must be odd and positive, got {self.patch_size}")
        if self.distribution not in ("auto", "manifold", "hypersphere"):
            raise ValueError(f"distribution must be 'auto', 'manifold' or 'hypersphere', got {self.distribution!r}")
        whole = ("embed_width", "target_width", "discriminator_layers", "hidden_width", "epochs", "batch_size")
        for name in (*whole, "project_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_images_per_epoch is not None and self.max_images_per_epoch < 1:
            raise ValueError(f"max_images_per_epoch must be positive, or null, got {self.max_images_per_epoch}")
        for name in ("adaptor_lr", "discriminator_lr", "manifold_radius"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        unsigned = ("adaptor_weight_decay", "noise", "ascent_steps", "ascent_rate", "focal_gamma", "beta_std")
        for name in unsigned:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.radius_quantile <= 1:
            raise ValueError(f"radius_quantile must be in [0, 1], got {self.radius_quantile}")
        if not 0 <= self.easy_quantile < 1:
            raise ValueError(f"easy_quantile must be in [0, 1), got {self.easy_quantile}")
