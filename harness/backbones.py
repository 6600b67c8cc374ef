"""Pretrained networks as feature extractors: names, weights and their whereabouts, layers.

Every model of timm works by its name; `harness/backbone_table.py` gives the backbones of the papers their published
weights and input scale. Weights come from an installed package, a file, a folder or the hub's cache on this machine.
They are never random unless asked for by `weights: random`, and nothing is fetched from a network unless the caller
says `download`.

This is the only module that imports timm.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.backbone_table import BACKBONES, BackboneRow, ResolvedBackbone, official_position_offset
from harness.contracts import AdgridError, LevelChoice, derive_seed
from harness.identity import content_id
from harness.positions import resample_positions
from harness.registry import did_you_mean, plugin_backbones
from harness.taps import (
    PixelNorm,
    TrainableBackbone,
    default_layers,
    feature_taps,
    fold_batch_norms,
    freeze_unused_parameters,
    run_to_taps,
    survives_folding,
)
from harness.weights import (
    WeightSource,
    find_weight_file,
    find_weights,
    load_weights,
    match_checkpoint,
    weight_sources,
    weights_fingerprint,
)

Precision = Literal["float32", "bfloat16"]

MAX_PRECISION_ERROR = 0.05
"""Largest relative error of a level in bfloat16 against float32 on a sample of images."""


# --- names ---------------------------------------------------------------------------------------------------------


@cache
def import_timm() -> Any:
    """timm, also beside a torchvision whose compiled part does not fit this torch.

    timm needs torchvision for image transforms alone, but importing torchvision fails when its extension cannot be
    loaded, as with the CPU build of torch beside the torchvision of the Python index: it describes two operators that
    the extension would have brought. They are declared here, without an implementation, only after that failure.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
    import timm

    return timm


_DECLARED: list[torch.library.Library] = []
"""Operators last as long as the library object that declared them."""


def backbone_names() -> tuple[str, ...]:
    """Every named backbone, those of installed packages included, sorted. Any model of timm works besides."""
    return tuple(sorted({*BACKBONES, *plugin_backbones()}))


def describe_backbone(name: str) -> str:
    """One line on a backbone. Raises AdgridError if it is unknown."""
    return _find_row(name).summary


def missing_weights(name: str, weights: str = "auto", cache_dir: str | None = None) -> str | None:
    """Why a backbone cannot be used on this machine, with the remedy, or None when it can."""
    try:
        resolve_backbone(name, weights, cache_dir)
    except AdgridError as error:
        return str(error)
    return None


def _find_row(name: str) -> BackboneRow:
    if name in BACKBONES:
        return BACKBONES[name]
    point = plugin_backbones().get(name)
    if point is not None:
        try:
            row = point.load()
        except Exception as error:
            raise AdgridError(
                f"backbone {name!r} comes from the entry point {point.value!r}, which cannot be loaded: "
                f"{type(error).__name__}: {error}; repair or uninstall that package"
            ) from error
        if not isinstance(row, BackboneRow):
            raise AdgridError(
                f"backbone {name!r} comes from the entry point {point.value!r}, which is a {type(row).__name__}; "
                "it must be a harness.backbones.BackboneRow"
            )
        return row
    timm = import_timm()
    if timm.is_model(name):
        offset = official_position_offset(name)
        return BackboneRow(architecture=name, summary="model of timm", position_offset=offset)
    everything = {*backbone_names(), *timm.list_models(), *timm.list_models(pretrained=True)}
    raise AdgridError(
        f"unknown backbone {name!r}{did_you_mean(name, everything, num=3)}; "
        f"named backbones: {', '.join(backbone_names())}; "
        "any other model of timm works by its name"
    )


def _pretrained_config(architecture: str, name: str) -> Any:
    """timm's configuration of the weights, or None for a model that has none. Raises AdgridError on an unknown tag."""
    timm = import_timm()
    try:
        return timm.get_pretrained_cfg(architecture)
    except RuntimeError as error:
        bare = architecture.split(".")[0]
        tags = ", ".join(timm.list_models(f"{bare}.*", pretrained=True)) or "none"
        raise AdgridError(f"backbone {name!r}: {bare} has no weights of that tag; known: {tags}") from error


# --- weights -------------------------------------------------------------------------------------------------------


def resolve_backbone(
    name: str, weights: str = "auto", cache_dir: str | None = None, *, download: bool = False
) -> ResolvedBackbone:
    """Finds a backbone and its weights on this machine. Builds no model, reads no weights, uses no network.

    Args:
        name: a named backbone or any model of timm, with or without tag.
        weights: `auto` (installed package, then the caches of the hub and of torch), a file, a folder with
            `<name>.safetensors` or `.pth`, or `random` (seeded by the name; for plumbing tests).
        cache_dir: folder of this node in which the hash of the weight file is remembered.
        download: fetch missing weights from the hub into its cache.

    Raises:
        AdgridError: an unknown name, or weights that are not here; names what was looked for and the remedy.
    """
    row = _find_row(name)
    config = _pretrained_config(row.architecture, name)
    path: str | None = None
    source: Literal["package", "file", "hub", "random"]
    if weights == "random":
        source = "random"
    elif weights == "auto":
        source, path = find_weights(name, row, config, download)
    else:
        source = "file"
        path, published = find_weight_file(name, row, config, weights)
        if not published:
            row = dataclasses.replace(row, **row.file_changes)
    # A row with an address of its own has other weights than those of timm's tag.
    tag = None if config is None or row.url else config.tag
    interpolation: Any = row.interpolation or getattr(config, "interpolation", "bilinear")
    return ResolvedBackbone(
        name=name,
        architecture=f"{config.architecture}.{tag}" if tag else row.architecture,
        source=source,
        weights_path=path,
        mean=row.mean or tuple(getattr(config, "mean", (0.485, 0.456, 0.406))),
        std=row.std or tuple(getattr(config, "std", (0.229, 0.224, 0.225))),
        interpolation=interpolation if interpolation in ("bilinear", "bicubic", "nearest") else "bilinear",
        model_args=row.model_args,
        rename_keys=row.rename_keys,
        position_offset=row.position_offset,
        cache_dir=cache_dir,
    )


def backbone_fingerprint(resolved: ResolvedBackbone, precision: Precision = "float32") -> str:
    """Id of everything that decides the features of given pixels: weights, architecture, input scale, precision."""
    return content_id(
        [
            weights_fingerprint(resolved),
            resolved.architecture,
            resolved.model_args,
            resolved.position_offset,
            resolved.mean,
            resolved.std,
            precision,
            version("timm"),
        ]
    )


def published_sources(name: str) -> tuple[WeightSource, ...]:
    """Where the weights of a backbone are published, in the order in which `auto` looks."""
    row = _find_row(name)
    return weight_sources(row, _pretrained_config(row.architecture, name))


def published_stem(name: str) -> str:
    """File name, without its ending, under which published weights are found in a folder and read as published."""
    row = _find_row(name)
    return row.architecture if row.file_changes else name


def num_parameters(name: str) -> int:
    """About how many numbers the published weight file holds, by the architecture with its classifier."""
    row = _find_row(name)
    if row.num_parameters is not None:
        return row.num_parameters
    with torch.device("meta"):
        network = import_timm().create_model(row.architecture, pretrained=False, **dict(row.model_args))
    return sum(tensor.numel() for tensor in network.state_dict().values())


def check_weights_fit(resolved: ResolvedBackbone) -> None:
    """Compares the names and shapes in a weight file with the network's; builds no network.

    Raises:
        AdgridError: the file cannot be read or does not fit; says what is missing, left over or of another shape.
    """
    if resolved.weights_path is not None:
        match_checkpoint(_meta_network(resolved, _native_size(resolved)), resolved)


# --- networks ------------------------------------------------------------------------------------------------------


def _create(architecture: str, model_args: tuple[tuple[str, Any], ...], device: str) -> nn.Module:
    """An unfilled network without classifier, in eval mode."""
    with torch.device(device):
        return import_timm().create_model(architecture, pretrained=False, num_classes=0, **dict(model_args)).eval()


@cache
def _full_model_args(resolved: ResolvedBackbone) -> tuple[tuple[str, Any], ...]:
    """Adds the option by which transformers interpolate their position embedding to any grid, where there is one.

    A backbone with a rule of its own for that is fitted to one size instead.
    """
    model_args = resolved.model_args
    family = type(_create(resolved.architecture, model_args, "meta"))
    dynamic = "dynamic_img_size" in inspect.signature(family.__init__).parameters and "img_size" not in dict(model_args)
    return (("dynamic_img_size", True), *model_args) if dynamic and resolved.position_offset is None else model_args


def _fit_image_size(network: Any, resolved: ResolvedBackbone, image_size: tuple[int, int]) -> None:
    """Prepares transformers that know one size only for another. Raises ValueError if it is no multiple of a patch."""
    config = getattr(network, "pretrained_cfg", {})
    fixed = hasattr(network, "set_input_size") and "dynamic_img_size" not in dict(_full_model_args(resolved))
    if not fixed or tuple(config["input_size"][1:]) == tuple(image_size):
        return
    positions: Any = getattr(network, "pos_embed", None)
    network.set_input_size(img_size=image_size)
    if resolved.position_offset is not None:
        patch = network.patch_embed.patch_size
        if image_size[0] % patch[0] or image_size[1] % patch[1]:
            raise ValueError(f"no multiple of the patch size {patch[0]}")
        grid = image_size[0] // patch[0], image_size[1] // patch[1]
        with torch.no_grad():
            resampled = resample_positions(positions, grid, network.num_prefix_tokens, resolved.position_offset)
        network.pos_embed = nn.Parameter(resampled)


@lru_cache(maxsize=8)
def _meta_network(resolved: ResolvedBackbone, image_size: tuple[int, int]) -> nn.Module:
    """The network without numbers: enough for names and shapes, at no memory."""
    network = _create(resolved.architecture, _full_model_args(resolved), "meta")
    _fit_image_size(network, resolved, image_size)
    return network


def _build_network(resolved: ResolvedBackbone, image_size: tuple[int, int]) -> nn.Module:
    """The network with its weights, in eval mode, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("random weights", resolved.architecture))
        network = _create(resolved.architecture, _full_model_args(resolved), "cpu")
    if resolved.weights_path is not None:
        load_weights(network, resolved)
    _fit_image_size(network, resolved, image_size)
    return network


def _is_convolutional(network: nn.Module) -> bool:
    """Whether channels-last memory makes it faster: it helps convolutions, not attention."""
    return not hasattr(network, "patch_embed")


def _place(network: nn.Module, device: torch.device | str) -> nn.Module:
    network = network.to(device)
    if _is_convolutional(network):
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


@lru_cache(maxsize=1)
def _shared_network(
    resolved: ResolvedBackbone, image_size: tuple[int, int], device: str, fold: bool, file_state: tuple[int, int]
) -> nn.Module:
    """A frozen network, kept for the next category, trial or choice of layers."""
    network = _build_network(resolved, image_size)
    if fold:
        example = torch.rand(1, 3, *image_size, generator=torch.Generator().manual_seed(0))
        try:
            fold_batch_norms(network, example)
        except RuntimeError:  # a network of an unusual kind runs as it is
            network = _build_network(resolved, image_size)
    return _place(network.requires_grad_(False), device)


class FrozenBackbone:
    """A pretrained network that gives the outputs of chosen layers; satisfies `harness.contracts.Backbone`.

    Batch norms are folded into the convolutions before them, which changes features by float32 rounding only.
    """

    def __init__(
        self,
        resolved: ResolvedBackbone,
        layers: Sequence[str],
        device: torch.device | str = "cpu",
        precision: Precision = "float32",
        image_size: tuple[int, int] = (224, 224),
    ) -> None:
        """Loads the weights, unless the last backbone of this process was the same.

        Args:
            resolved: the backbone.
            layers: names of its modules.
            device: where it runs.
            precision: `bfloat16` about doubles the speed on CPUs and GPUs that know it. The first images are encoded
                in float32 as well, and levels further apart than `MAX_PRECISION_ERROR` are refused.
            image_size: (H, W) of the images.

        Raises:
            AdgridError: the weights cannot be read or do not fit, a layer is unknown or gives no map.
        """
        self.resolved = resolved
        self.layers = check_layers(resolved, layers)
        self.level_shapes = level_shapes(resolved, self.layers, image_size)
        self.precision = precision
        self.precision_error: tuple[float, ...] | None = None
        """Relative error of each level in bfloat16, after the first batch."""
        self._device = torch.device(device)
        stat = os.stat(resolved.weights_path) if resolved.weights_path else None
        file_state = (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)
        size = _build_size(resolved, image_size)
        example = torch.empty(1, 3, *size, device="meta")
        fold = survives_folding(_meta_network(resolved, size), self.layers, example)
        self._network = _shared_network(resolved, size, str(self._device), fold, file_state)
        self._pixel_norm = PixelNorm(resolved.mean, resolved.std).to(self._device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features of a batch.

        Args:
            images: (B, 3, H, W) RGB, float in [0, 1] or uint8 in [0, 255], on any device.

        Returns:
            One (B, D, h, w) float32 map per layer on the backbone's device, in the memory layout of the network.

        Raises:
            ValueError: bfloat16 is too coarse for this network.
        """
        pixels = self._pixel_norm(images)
        if _is_convolutional(self._network):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        if self.precision == "float32":
            return tuple(level.float() for level in run_to_taps(self._network, self.layers, pixels))
        with torch.autocast(self._device.type, torch.bfloat16):
            levels = tuple(level.float() for level in run_to_taps(self._network, self.layers, pixels))
        if self.precision_error is None:
            self._check_precision(pixels[:2], levels)
        return levels

    def _check_precision(self, pixels: Tensor, levels: Sequence[Tensor]) -> None:
        exact = [level.float() for level in run_to_taps(self._network, self.layers, pixels)]
        errors = tuple(
            float((level[: len(pixels)] - reference).norm() / reference.norm().clamp_min(1e-12))
            for level, reference in zip(levels, exact, strict=True)
        )
        worst = max(range(len(errors)), key=errors.__getitem__)
        if not errors[worst] <= MAX_PRECISION_ERROR:
            raise ValueError(
                f"backbone {self.resolved.name!r} layer {self.layers[worst]!r}: bfloat16 differs from float32 by "
                f"{errors[worst]:.1%} on the first images (at most {MAX_PRECISION_ERROR:.0%}); use float32"
            )
        self.precision_error = errors


def trainable_backbone(
    resolved: ResolvedBackbone,
    layers: Sequence[str],
    device: torch.device | str = "cpu",
    image_size: tuple[int, int] = (224, 224),
    freeze_batch_norm: bool = True,
) -> TrainableBackbone:
    """A private copy of the backbone that may be trained: (B, 3, H, W) images in [0, 1] to levels.

    Parameters that no level depends on do not require gradients. Batch norms keep their pretrained statistics unless
    `freeze_batch_norm` is False; their scale and shift are trained either way.
    """
    layers = check_layers(resolved, layers)
    size = _build_size(resolved, image_size)

    def wrap(network: nn.Module, where: torch.device | str) -> TrainableBackbone:
        norm = PixelNorm(resolved.mean, resolved.std).to(where)
        return TrainableBackbone(network, layers, norm, freeze_batch_norm)

    backbone = wrap(_place(_build_network(resolved, size), device), device)
    freeze_unused_parameters(backbone, wrap(_meta_network(resolved, size), "meta"), image_size)
    return backbone.train()


# --- layers --------------------------------------------------------------------------------------------------------


def _native_size(resolved: ResolvedBackbone) -> tuple[int, int]:
    config = _pretrained_config(resolved.architecture, resolved.name)
    height, width = getattr(config, "input_size", (3, 224, 224))[1:]
    return (height, width)


def _build_size(resolved: ResolvedBackbone, image_size: tuple[int, int]) -> tuple[int, int]:
    """The size a network is built for: the images' where it knows only one, otherwise its own."""
    native = _native_size(resolved)
    fixed = hasattr(_meta_network(resolved, native), "set_input_size")
    dynamic = "dynamic_img_size" in dict(_full_model_args(resolved))
    return tuple(image_size) if fixed and not dynamic else native  # type: ignore[return-value]


def check_layers(resolved: ResolvedBackbone, layers: Sequence[str | int]) -> tuple[str, ...]:
    """Module names of the layers a user asked for.

    Args:
        resolved: the backbone.
        layers: names of modules (`layer2`, `blocks.2`, `blocks.1.0`), or positions in timm's list of feature levels,
            as in `out_indices`; negative ones count from the deepest.

    Raises:
        AdgridError: an unknown name or position (with the nearest names), a repetition, or a layer without a map.
    """
    size = _native_size(resolved)
    network = _meta_network(resolved, size)
    known = [tap["module"] for tap in feature_taps(network)]
    modules = dict(network.named_modules())
    names = []
    for layer in layers:
        text = str(layer)
        if text.removeprefix("-").isdigit() and text not in modules:
            if not -len(known) <= int(text) < len(known):
                raise AdgridError(
                    f"backbone {resolved.name!r} has no feature level {text}; it has {len(known)}: {', '.join(known)}"
                )
            names.append(known[int(text)])
        elif text in modules and text:
            names.append(text)
        else:
            raise AdgridError(
                f"backbone {resolved.name!r} has no layer {text!r}{did_you_mean(text, modules, num=3)}; "
                f"its feature levels: {', '.join(known)}"
            )
    if not names or len(set(names)) < len(names):
        raise AdgridError(f"backbone {resolved.name!r}: layers {list(layers)} must name each layer once, at least one")
    level_shapes(resolved, names, size)
    return tuple(names)


def choose_layers(resolved: ResolvedBackbone, choice: LevelChoice) -> tuple[str, ...]:
    """The layers a method reads when the search space names none; `harness.taps.default_layers` has the rule.

    Raises:
        AdgridError: the backbone has none of the strides, not that tap, or no list of feature levels at all.
    """
    try:
        return check_layers(resolved, default_layers(_meta_network(resolved, _native_size(resolved)), choice))
    except AdgridError as error:
        reason = str(error).removeprefix(f"backbone {resolved.name!r}").lstrip(": ")
        raise AdgridError(f"backbone {resolved.name!r} {reason}; name its `layers`") from None


def level_shapes(
    resolved: ResolvedBackbone, layers: Sequence[str], image_size: tuple[int, int]
) -> tuple[tuple[int, int, int], ...]:
    """(D, h, w) of each layer for images of (H, W), without reading weights.

    Raises:
        AdgridError: the network does not take images of this size, or a layer gives no map.
    """
    return _level_shapes(resolved, tuple(layers), (image_size[0], image_size[1]))


@lru_cache(maxsize=256)
def count_parameters(resolved: ResolvedBackbone) -> int:
    """Numbers that the network holds, without reading weights."""
    return sum(parameter.numel() for parameter in _meta_network(resolved, _native_size(resolved)).parameters())


@lru_cache(maxsize=256)
def _level_shapes(
    resolved: ResolvedBackbone, layers: tuple[str, ...], image_size: tuple[int, int]
) -> tuple[tuple[int, int, int], ...]:
    try:
        network = _meta_network(resolved, _build_size(resolved, image_size))
        with torch.no_grad():
            levels = run_to_taps(network, layers, torch.empty(1, 3, *image_size, device="meta"))
    except AdgridError as error:
        raise AdgridError(f"backbone {resolved.name!r}: {error}") from None
    except (AssertionError, RuntimeError, ValueError) as error:
        raise AdgridError(
            f"backbone {resolved.name!r} does not take images of {image_size[0]} x {image_size[1]} pixels "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); choose another "
            f"protocol.image_size (it was trained at {' x '.join(map(str, _native_size(resolved)))})"
        ) from error
    return tuple((level.shape[1], level.shape[2], level.shape[3]) for level in levels)
