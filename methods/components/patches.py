"""Patch features from feature maps: what PatchCore (arXiv 2106.08265, section 3.1) stores and compares.

Official code (amazon-science/patchcore-inspection): every patch_size x patch_size neighbourhood of a level is flattened,
(D, row, column) in that order, and average-pooled adaptively to `embed_width` numbers; deeper levels are resized
bilinearly to the grid of the first; the levels of a patch are laid end to end and pooled again to `target_width`.
Each step is linear and the resize acts on space alone, so all of it is one fixed convolution per level, then a resize,
then a concatenation: that is how it is computed here, and a linear projection of the result folds into the
convolutions as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Aggregation = Literal["official", "concat"]


class PatchEmbedding:
    """A fixed linear map from feature maps to one vector per patch of the first level's grid."""

    def __init__(self, kernels: Sequence[Tensor], spread: Sequence[Tensor] | None = None) -> None:
        """Args: kernels (E_l, D_l, p, p) per level."""
