"""Reading feature maps from the middle of a network, whatever its family.

A tap is a named module. Its output becomes a (B, D, h, w) map: convolutional maps as they are, channels-last maps
turned round, token sequences folded into their grid without class and register tokens. Outputs are raw: no final norm
follows. Modules after the deepest tap are not executed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.contracts import AdgridError, LevelChoice


class _AllTapsReached(Exception):
    """Ends a forward pass once the deepest tap has its output."""


def run_to_taps(network: nn.Module, layers: Sequence[str], pixels: Tensor) -> tuple[Tensor, ...]:
    """One forward pass that ends at the deepest of the layers.

    Hooks are attached for this call alone, so one network serves any choice of layers; it must not run in two threads
    at once.

    Args:
        network: a model of timm, or one with `forward_features`.
        layers: names of its modules; the output order is theirs. Of a module that runs twice the first output counts.
        pixels: (B, 3, H, W) normalised images.

    Returns:
        One (B, D, h, w) map per layer, in the network's precision.

    Raises:
        AdgridError: a layer is never reached, or its output is no feature map.
    """
    channels = {tap["module"]: tap["num_chs"] for tap in feature_taps(network)}
    levels: dict[str, Tensor] = {}

    def attach(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if name in levels:
                return
            level = _as_map(network, name, output, channels.get(name), pixels.shape[-2:])
            if len(levels) == len(layers) - 1:
                levels[name] = level
                raise _AllTapsReached
            # What follows may work in place (an activation after a norm), so earlier taps keep a copy.
            levels[name] = level.clone()

        return network.get_submodule(name).register_forward_hook(hook)

    handles = [attach(name) for name in layers]
    try:
        getattr(network, "forward_features", network)(pixels)
    except _AllTapsReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in levels:
            raise AdgridError(f"layer {name!r} is not executed when features are computed; {_advice(network)}")
    return tuple(levels[name] for name in layers)


def feature_taps(network: nn.Module) -> list[Mapping[str, Any]]:
    """timm's own list of feature levels, shallow to deep: `module`, `num_chs`, `reduction`; empty where it has none."""
    info: Any = getattr(network, "feature_info", ())
    return [tap for tap in getattr(info, "info", info) if tap.get("module")]


def default_layers(network: nn.Module, choice: LevelChoice) -> list[str]:
    """The modules that a method reads where nobody names layers.

    Pyramid networks: the last of timm's feature levels at each stride of `choice.strides`, so ResNets give `layer1` to
    `layer4` for 4, 8, 16, 32 and EfficientNet-B4 its stages of 24, 32, 56 and 160 channels for 2, 4, 8, 16 (UniAD,
    arXiv 2206.03687). A stride without a level is left out: Swin and ConvNeXt begin at 4.

    Networks of one stride (plain ViTs): `choice.taps` are positions in four canonical taps, the outputs of the blocks
    at a quarter, a half, three quarters and the end of the depth, counted from one: 3, 6, 9, 12 of 12; 6, 12, 18, 24
    of 24; 8, 16, 24, 32 of 32 (ADPretrain, arXiv 2511.05245). Module names count from zero, so block 3 is `blocks.2`.

    Raises:
        AdgridError: the network has none of the strides, not that tap, or no list of feature levels.
    """
    taps = [tap for tap in feature_taps(network) if "reduction" in tap]
    if not taps:
        raise AdgridError("has no list of feature levels")
    if len(taps) > 1 and len({tap["reduction"] for tap in taps}) == 1:
        depth = len(taps)
        canonical = list(dict.fromkeys(-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)))
        try:
            return [taps[canonical[position]]["module"] for position in choice.taps]
        except IndexError:
            raise AdgridError(f"has {len(canonical)} canonical taps, not {choice.taps}") from None
    by_stride = {tap["reduction"]: tap["module"] for tap in taps}  # a later level replaces an earlier one
    chosen = [by_stride[stride] for stride in choice.strides if stride in by_stride]
    if not chosen:
        wanted, there = (", ".join(map(str, strides)) for strides in (choice.strides, by_stride))
        raise AdgridError(f"has no level of stride {wanted}, only {there}")
    return chosen


def _as_map(network: nn.Module, name: str, output: Any, channels: int | None, image_size: Sequence[int]) -> Tensor:
    """(B, D, h, w) view of a module's output."""
    if isinstance(output, Tensor) and output.ndim == 4:
        flipped = output.shape[-1] == channels != output.shape[1]
        if flipped or getattr(network, "output_fmt", None) == "NHWC":
            return output.permute(0, 3, 1, 2)
        return output
    if isinstance(output, Tensor) and output.ndim == 3:
        # Some transformers add their class token after the tapped blocks, so no prefix is tried as well.
        for prefix in (getattr(network, "num_prefix_tokens", 0), 0):
            grid = _patch_grid(output.shape[1] - prefix, *image_size)
            if grid is not None:
                return output[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)  # (B, L, D) -> (B, D, h, w)
    shape = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    raise AdgridError(f"layer {name!r} gives {shape}, which is no feature map; {_advice(network)}")


def _patch_grid(num_tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Grid of square patches with so many tokens over an image, or None if there is none."""
    if num_tokens <= 0:
        return None
    side = (height * width / num_tokens) ** 0.5
    grid = round(height / side), round(width / side)
    return grid if grid[0] * grid[1] == num_tokens else None


def _advice(network: nn.Module) -> str:
    names = ", ".join(tap["module"] for tap in feature_taps(network))
    return f"layers made for this are: {names}" if names else "name layers whose output is (B, D, h, w)"


def foldable_norms(network: nn.Module, example: Tensor) -> dict[str, str]:
    """Convolutions that could take in the batch norm after them: name of the convolution -> name of the norm.

    Both run once, and the convolution is a plain one.

    Args:
        network: a network in eval mode, on any device, meta included.
        example: (1, 3, H, W) float32 pixels on that device.
    """
    names = {module: name for name, module in network.named_modules()}
    # timm's Conv2dSame pads and convolves, its BatchNormAct2d carries the activation that follows.
    convs = [m for m in names if type(m) is nn.Conv2d or type(m).__name__ == "Conv2dSame"]
    norms = [m for m in names if type(m) is nn.BatchNorm2d or type(m).__name__ == "BatchNormAct2d"]
    if not norms:
        return {}
    runs: Counter[nn.Module] = Counter()
    sources: list[tuple[nn.Module, Tensor]] = []
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def watch_conv(conv: nn.Module, inputs: Any, output: Tensor) -> None:
        runs[conv] += 1
        sources.append((conv, output))

    def watch_norm(norm: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
        runs[norm] += 1
        pairs.extend((conv, norm) for conv, value in sources if value is inputs[0])

    handles = [m.register_forward_hook(watch_conv) for m in convs]
    handles += [m.register_forward_hook(watch_norm) for m in norms]
    try:
        with torch.no_grad():
            getattr(network, "forward_features", network)(example)
    finally:
        for handle in handles:
            handle.remove()
    readers = Counter(conv for conv, _ in pairs)
    return {
        names[conv]: names[norm]
        for conv, norm in pairs
        if runs[conv] == runs[norm] == readers[conv] == 1 and getattr(norm, "running_var", None) is not None
    }


def survives_folding(network: nn.Module, layers: Sequence[str], example: Tensor) -> bool:
    """Whether these layers give the same after `fold_batch_norms`: none is a folded convolution or inside a norm."""
    pairs = foldable_norms(network, example)
    inside = tuple(f"{norm}." for norm in pairs.values())
    return not any(layer in pairs or layer.startswith(inside) for layer in layers)


@torch.no_grad()
def fold_batch_norms(network: nn.Module, example: Tensor) -> None:
    """Puts batch norms into the convolutions before them; small networks run up to 1.6x as fast on a CPU.

    A tap on such a convolution would give the norm's output afterwards, and modules inside the norm are gone.

    Args:
        network: in eval mode; changed in place.
        example: (1, 3, H, W) float32 pixels.

    Raises:
        RuntimeError: the result on the example moved by more than float32 rounding, so somebody else reads one of the
            convolutions; the network is not usable.
    """
    pairs = foldable_norms(network, example)
    forward = getattr(network, "forward_features", network)
    before = forward(example) if pairs else None
    for conv_name, norm_name in pairs.items():
        norm: Any = network.get_submodule(norm_name)
        _absorb(network.get_submodule(conv_name), norm)
        network.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))
    if isinstance(before, Tensor):
        scale = float(before.abs().max())
        if not torch.allclose(forward(example), before, rtol=1e-3, atol=1e-3 * scale):
            raise RuntimeError("folding batch norms changed the network's output")
    elif pairs:
        raise RuntimeError("the network's output is no tensor that could be compared")


def _absorb(conv: Any, norm: Any) -> None:
    """norm(conv(x)) = conv'(x) with weights scaled by gamma / sqrt(var + eps), computed in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    conv.weight.copy_(conv.weight.double() * scale.view(-1, 1, 1, 1))
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype))


class PixelNorm(nn.Module):
    """Images in [0, 1] (float) or [0, 255] (uint8) to the mean and scale a network was trained with."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Args: per-channel mean and standard deviation of images in [0, 1]."""
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) on any device to normalised float32 on this module's device."""
        images = images.to(self.mean.device, non_blocking=True)
        if not images.is_floating_point():
            images = images.float() / 255
        return (images.float() - self.mean) / self.std


class TrainableBackbone(nn.Module):
    """A network of one's own: images in [0, 1] to levels, with gradients.

    Its state dict is the network's, so it can be saved, reloaded and compared with the pretrained weights.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str], pixel_norm: PixelNorm, freeze_batch_norm: bool
    ) -> None:
        """Args: the network; names of the tapped modules; its input scale; whether batch norms stay in eval mode."""
        super().__init__()
        self.network = network
        self.layers = tuple(layers)
        self.pixel_norm = pixel_norm
        self.freeze_batch_norm = freeze_batch_norm
        self.train(self.training)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) images in [0, 1] to one (B, D, h, w) float32 map per layer."""
        levels = run_to_taps(self.network, self.layers, self.pixel_norm(images))
        return tuple(level.float() for level in levels)

    def train(self, mode: bool = True) -> TrainableBackbone:
        """Training mode for all but the batch norms, whose running statistics stay the pretrained ones if frozen."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def freeze_unused_parameters(backbone: TrainableBackbone, twin: TrainableBackbone, image_size: Sequence[int]) -> None:
    """Takes parameters that no level depends on out of training; distributed training would wait for their gradients.

    Args:
        backbone: changed in place.
        twin: the same on the meta device, where a backward pass costs nothing and finds the parameters used.
        image_size: (H, W) that the network accepts.
    """
    named = dict(twin.named_parameters())
    total = torch.stack([level.sum() for level in twin(torch.empty(1, 3, *image_size, device="meta"))]).sum()
    gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    used = {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name in used)
