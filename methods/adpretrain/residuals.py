"""Residual features (ADPretrain, arXiv 2511.05245): what is left of a token without its nearest normal reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_FLOATS = 2**23
"""Similarities held at once, tokens times references."""


@torch.no_grad()
def residual(features: Tensor, reference: Tensor) -> Tensor:
    """Subtracts from every token the reference of largest cosine similarity, wherever in an image that comes from.

    The signed difference of the vectors as they are; only the search normalises them. The lowest index wins a tie. The
    result for an image does not depend on the others in the batch.

    Args:
        features: (B, C, h, w) features of a frozen backbone; no gradient flows through.
        reference: (R, C) tokens of normal images, same backbone and level, R >= 1.

    Returns:
        (B, C, h, w), of the type of `features`.

    Raises:
        ValueError: if widths differ or there is no reference.
    """
    if reference.ndim != 2 or len(reference) == 0 or reference.shape[1] != features.shape[1]:
        raise ValueError(
            f"reference must be (R, {features.shape[1]}) tokens, R >= 1, for features of shape "
            f"{tuple(features.shape)}, got shape {tuple(reference.shape)}"
        )
    step = max(1, BLOCK_FLOATS // len(reference))
    with torch.autocast(features.device.type, enabled=False):
        reference = reference.to(features)
        precise = torch.promote_types(features.dtype, torch.float32)
        directions = F.normalize(reference.to(precise), dim=1).T
        result = torch.empty_like(features, memory_format=torch.contiguous_format)
        # One image at a time: a product's rounding may depend on its shape, and a near tie on rounding.
        for image, rest in zip(features, result, strict=True):
            tokens = image.flatten(1).T  # (P, C)
            blocks = F.normalize(tokens.to(precise), dim=1).split(step)
            nearest = torch.cat([(block @ directions).argmax(dim=1) for block in blocks])
            rest.copy_((tokens - reference[nearest]).T.view_as(rest))
    return result
