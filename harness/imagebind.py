"""The vision trunk of ImageBind (Girdhar et al., arXiv 2305.05665) in the names of timm's ViT-H/14.

The published checkpoint holds six modalities. Its image network is a plain ViT with a norm before the blocks, so it
needs other names and one other shape: an image enters as a video of two equal frames, through a 3-D convolution over
both, which is the 2-D convolution whose kernel is the sum over the two time slices. timm's final norm is the norm at
the start of ImageBind's head; block outputs do not pass it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_STEM = "modality_preprocessors.vision.rgbt_stem.proj.1.weight"
_OUTSIDE = {
    "modality_preprocessors.vision.cls_token": "cls_token",
    "modality_preprocessors.vision.pos_embedding_helper.pos_embed": "pos_embed",
    "modality_trunks.vision.pre_transformer_layer.0.weight": "norm_pre.weight",
    "modality_trunks.vision.pre_transformer_layer.0.bias": "norm_pre.bias",
    "modality_heads.vision.0.weight": "norm.weight",
    "modality_heads.vision.0.bias": "norm.bias",
}
_BLOCKS = "modality_trunks.vision.blocks."
_IN_BLOCK = {
    "attn.in_proj_": "attn.qkv.",  # one matrix for queries, keys and values in both
    "attn.out_proj.": "attn.proj.",
    "norm_1.": "norm1.",
    "norm_2.": "norm2.",
    "mlp.": "mlp.",
}


def rename_imagebind(checkpoint: dict[str, Tensor], model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision part of a published ImageBind checkpoint as the state of timm's ViT.

    Args:
        checkpoint: the published names; the stem is (D, 3, 2, p, p). Other modalities are left out.
        model_state: not needed; the names follow from the checkpoint alone.

    Returns:
        timm's names, the stem as (D, 3, p, p). A checkpoint without that stem is returned as it is.
    """
    if _STEM not in checkpoint:
        return checkpoint
    renamed = {"patch_embed.proj.weight": checkpoint[_STEM].sum(dim=2)}
    for key, tensor in checkpoint.items():
        if key in _OUTSIDE:
            renamed[_OUTSIDE[key]] = tensor
        elif key.startswith(_BLOCKS):
            number, _, inner = key.removeprefix(_BLOCKS).partition(".")
            old = next((part for part in _IN_BLOCK if inner.startswith(part)), "")
            renamed[f"blocks.{number}.{_IN_BLOCK.get(old, '')}{inner.removeprefix(old)}"] = tensor
    return renamed
