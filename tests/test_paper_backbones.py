"""The backbones of the papers: which layers, which input scale, which details of the networks."""

from dataclasses import replace

import pytest
import torch
from plain_vit import block_outputs, embed_patches, gelu, quick_gelu

from harness import backbones
from harness.backbones import FrozenBackbone, choose_layers, level_shapes, num_parameters, resolve_backbone
from harness.contracts import LevelChoice
from harness.positions import resample_positions
from harness.registry import load_method, method_names

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def cubic(distance):
    """Keys' kernel with a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def slow_resample(square, grid, offset):
    """(s, s, D) to (h, w, D), one number after the other; the sampling step is s / (h + offset)."""
    side = len(square)
    result = torch.zeros(*grid, square.shape[2], dtype=torch.float64)
    for row in range(grid[0]):
        y = (row + 0.5) * side / (grid[0] + offset) - 0.5
        for column in range(grid[1]):
            x = (column + 0.5) * side / (grid[1] + offset) - 0.5
            for j in range(int(y // 1) - 1, int(y // 1) + 3):
                for i in range(int(x // 1) - 1, int(x // 1) + 3):
                    inside = square[min(max(j, 0), side - 1), min(max(i, 0), side - 1)]
                    result[row, column] += cubic(y - j) * cubic(x - i) * inside
    return result


@pytest.mark.parametrize("grid", [(16, 16), (16, 20), (40, 38)])
def test_positions_are_resampled_as_the_official_code_does(grid):
    positions = torch.randn(1, 1 + 37 * 37, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = resample_positions(positions, grid, num_prefix=1, offset=0.1)
    assert torch.equal(result[:, :1], positions[:, :1])
    expected = slow_resample(positions[0, 1:].unflatten(0, (37, 37)), grid, 0.1)
    torch.testing.assert_close(result[0, 1:].unflatten(0, grid), expected, rtol=1e-4, atol=1e-5)


def test_the_offset_and_the_missing_antialiasing_are_felt():
    """Otherwise the comparison above could not tell them from timm's own resampling."""
    resample_abs_pos_embed = backbones.import_timm().layers.resample_abs_pos_embed
    positions = torch.randn(1, 1 + 37 * 37, 3, generator=torch.Generator().manual_seed(0))
    official = resample_positions(positions, (16, 16), 1, 0.1)
    assert (official - resample_positions(positions, (16, 16), 1, 0.0)).abs().max() > 0.1
    assert (official - resample_abs_pos_embed(positions, [16, 16])).abs().max() > 0.1


def test_the_native_grid_is_left_alone():
    positions = torch.randn(1, 1 + 37 * 37, 3)
    assert resample_positions(positions, (37, 37), 1, 0.1) is positions


@pytest.fixture
def small_dinov2(monkeypatch, tmp_path):
    """`dinov2-base` as a narrow network with random weights in a file, and its state."""
    sizes = (("embed_dim", 32), ("depth", 4), ("num_heads", 2))
    row = replace(backbones.BACKBONES["dinov2-base"], model_args=sizes)
    monkeypatch.setitem(backbones.BACKBONES, "dinov2-base", row)
    torch.manual_seed(0)
    model = backbones.import_timm().create_model("vit_base_patch14_dinov2", num_classes=0, **dict(sizes)).eval()
    state = {key: torch.randn_like(value) * 0.3 for key, value in model.state_dict().items()}
    # As published by the paper's authors, whose files have a token for masked images besides.
    torch.save({**state, "mask_token": torch.zeros(1, 32)}, tmp_path / "dinov2_vitb14_pretrain.pth")
    model.load_state_dict(state)
    return model, resolve_backbone("dinov2-base", str(tmp_path))


@pytest.mark.parametrize("size", [(224, 224), (112, 168)])
def test_dinov2_levels_are_raw_blocks_on_the_official_positions(small_dinov2, size):
    model, resolved = small_dinov2
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    grid = size[0] // 14, size[1] // 14
    old = model.pos_embed[0, 1:].detach().double().unflatten(0, (37, 37))
    with torch.no_grad():
        patches = model.patch_embed.proj((images - mean) / std).flatten(2).transpose(1, 2)
        x = torch.cat([model.cls_token.expand(2, 1, -1), patches], dim=1)
        x = x + torch.cat([model.pos_embed[0, :1], slow_resample(old, grid, 0.1).flatten(0, 1).float()])
        expected = []
        for block in model.blocks:
            x = block(x)
            expected.append(x[:, 1:].transpose(1, 2).unflatten(2, grid))
    layers = choose_layers(resolved, LevelChoice())
    assert layers == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    encoder = FrozenBackbone(resolved, layers, image_size=size)
    for level, raw in zip(encoder.encode(images), expected, strict=True):
        torch.testing.assert_close(level, raw, rtol=1e-3, atol=1e-3)
    assert encoder.level_shapes == ((32, *grid),) * 4


def test_a_trainable_dinov2_gives_the_frozen_features(small_dinov2):
    _, resolved = small_dinov2
    images = torch.rand(1, 3, 112, 112)
    frozen = FrozenBackbone(resolved, ("blocks.2",), image_size=(112, 112)).encode(images)[0]
    private = backbones.trainable_backbone(resolved, ("blocks.2",), image_size=(112, 112))
    torch.testing.assert_close(private(images)[0], frozen, rtol=1e-4, atol=1e-4)
    assert private.network.pos_embed.requires_grad


def test_every_dinov2_without_registers_has_the_official_positions():
    assert resolve_backbone("vit_small_patch14_dinov2.lvd142m", "random").position_offset == 0.1
    assert resolve_backbone("vit_small_patch14_reg4_dinov2.lvd142m", "random").position_offset is None
    assert resolve_backbone("vit_small_patch16_224", "random").position_offset is None
    plain = resolve_backbone("dinov2-base", "random")
    assert backbones.backbone_fingerprint(plain) != backbones.backbone_fingerprint(replace(plain, position_offset=None))


def openai_state(width, depth, num_tokens, patch):
    """The visual part of a state dict as OpenAI's code names it."""
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (num_tokens, width),
        "proj": (width, 16),
        "conv1.weight": (width, 3, patch, patch),
    }
    shapes |= {f"ln_{where}.{kind}": (width,) for where in ("pre", "post") for kind in ("weight", "bias")}
    for number in range(depth):
        block = f"transformer.resblocks.{number}."
        shapes |= {f"{block}ln_{which}.{kind}": (width,) for which in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{block}attn.out_proj.weight": (width, width), f"{block}attn.out_proj.bias": (width,)}
        shapes |= {f"{block}mlp.c_fc.weight": (4 * width, width), f"{block}mlp.c_fc.bias": (4 * width,)}
        shapes |= {f"{block}mlp.c_proj.weight": (width, 4 * width), f"{block}mlp.c_proj.bias": (width,)}
    generator = torch.Generator().manual_seed(2)
    return {f"visual.{key}": 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.mark.parametrize(("activation", "same"), [(quick_gelu, True), (gelu, False)])
def test_clip_levels_are_those_of_openais_network_with_its_quick_gelu(monkeypatch, tmp_path, activation, same):
    sizes = (("embed_dim", 32), ("depth", 4), ("num_heads", 4))
    row = replace(backbones.BACKBONES["clip-base"], model_args=sizes)
    monkeypatch.setitem(backbones.BACKBONES, "clip-base", row)
    state = openai_state(32, 4, 197, 16)
    torch.save(state, tmp_path / "clip-base.pt")
    resolved = resolve_backbone("clip-base", str(tmp_path))
    image = torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(3))
    level = FrozenBackbone(resolved, ("blocks.3",)).encode(image[None])[0]

    def pair(name, joint="."):
        return state[f"visual.{name}{joint}weight"], state[f"visual.{name}{joint}bias"]

    blocks = [
        {
            "norm1": pair(f"transformer.resblocks.{number}.ln_1"),
            "qkv": pair(f"transformer.resblocks.{number}.attn.in_proj", "_"),
            "out": pair(f"transformer.resblocks.{number}.attn.out_proj"),
            "norm2": pair(f"transformer.resblocks.{number}.ln_2"),
            "fc1": pair(f"transformer.resblocks.{number}.mlp.c_fc"),
            "fc2": pair(f"transformer.resblocks.{number}.mlp.c_proj"),
        }
        for number in range(4)
    ]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CLIP)
    expected = block_outputs(
        embed_patches((image - mean) / std, state["visual.conv1.weight"]),
        state["visual.class_embedding"],
        state["visual.positional_embedding"],
        pair("ln_pre"),
        blocks,
        num_heads=4,
        eps=1e-5,
        activation=activation,
    )[3]
    close = torch.allclose(level[0].permute(1, 2, 0), expected, rtol=1e-3, atol=1e-3)
    assert close is same


ADPRETRAIN = {
    # name: scale, blocks counted from one, (D, h, w) at 224 pixels, millions of parameters
    "dinov2-base": (IMAGENET, (3, 6, 9, 12), (768, 16, 16), 86.6),
    "dinov2-large": (IMAGENET, (6, 12, 18, 24), (1024, 16, 16), 304.4),
    "clip-base": (CLIP, (3, 6, 9, 12), (768, 14, 14), 86.2),
    "clip-large": (CLIP, (6, 12, 18, 24), (1024, 16, 16), 304.0),
    "imagebind": (CLIP, (8, 16, 24, 32), (1280, 16, 16), 1200),
}


@pytest.mark.parametrize("name", ADPRETRAIN)
def test_the_backbones_of_adpretrain_have_its_taps_and_input_scale(name):
    scale, blocks, shape, millions = ADPRETRAIN[name]
    resolved = resolve_backbone(name, "random")
    assert (resolved.mean, resolved.std) == scale
    layers = choose_layers(resolved, LevelChoice())
    assert layers == tuple(f"blocks.{block - 1}" for block in blocks)
    assert level_shapes(resolved, layers, (224, 224)) == (shape,) * 4
    assert num_parameters(name) / 1e6 == pytest.approx(millions, rel=0.005)


PADIM, PATCHCORE, CFLOW, UNIAD = (4, 8, 16), (8, 16), (8, 16, 32), (2, 4, 8, 16)


@pytest.mark.parametrize(
    ("name", "strides", "layers", "widths"),
    [
        ("resnet18", PADIM, ("layer1", "layer2", "layer3"), (64, 128, 256)),
        ("wide_resnet50_2", PADIM, ("layer1", "layer2", "layer3"), (256, 512, 1024)),
        ("wide_resnet50_2", PATCHCORE, ("layer2", "layer3"), (512, 1024)),
        ("wide_resnet50_2", CFLOW, ("layer2", "layer3", "layer4"), (512, 1024, 2048)),
        ("efficientnet_b4", UNIAD, ("blocks.0", "blocks.1", "blocks.2", "blocks.4"), (24, 32, 56, 160)),
        ("tf_efficientnet_lite0", UNIAD, ("blocks.0", "blocks.1", "blocks.2", "blocks.4"), (16, 24, 40, 112)),
        ("mobilenetv2_100", CFLOW, ("blocks.2", "blocks.4", "blocks.6"), (32, 96, 320)),
    ],
)
def test_strides_give_the_layers_of_the_papers(name, strides, layers, widths):
    resolved = resolve_backbone(name, "random")
    assert choose_layers(resolved, LevelChoice(strides=strides)) == layers
    assert tuple(shape[0] for shape in level_shapes(resolved, layers, (224, 224))) == widths


@pytest.mark.parametrize("backbone", sorted(backbones.BACKBONES))
def test_a_backbone_alone_is_enough_for_every_method(backbone):
    resolved = resolve_backbone(backbone, "random")
    for name in method_names():
        method = load_method(name)
        if method.backbone_use != "none":
            assert choose_layers(resolved, method.levels), name


OTHERS = ["deit3_small_patch16_224", "eva02_tiny_patch14_224", "regnety_002", "densenet121", "maxvit_nano_rw_256"]


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_model_of_timm_has_default_layers(name):
    resolved = resolve_backbone(name, "random")
    size = backbones._native_size(resolved)
    for strides in (PADIM, CFLOW, UNIAD):
        layers = choose_layers(resolved, LevelChoice(strides=strides))
        assert len(level_shapes(resolved, layers, size)) == len(layers) >= 3
