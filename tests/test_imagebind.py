"""ImageBind's vision trunk as a ViT of timm."""

from dataclasses import replace

import pytest
import torch
from plain_vit import block_outputs, embed_patches, gelu

from harness import backbones
from harness.backbones import FrozenBackbone, check_weights_fit, choose_layers, level_shapes, resolve_backbone
from harness.contracts import AdgridError, LevelChoice
from harness.imagebind import rename_imagebind

VISION = "modality_trunks.vision."
STEM = "modality_preprocessors.vision."
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
WIDTH, DEPTH, HEADS, PATCH, SIDE = 32, 8, 4, 14, 224


def published_shapes(width, depth, patch, num_tokens):
    """Keys and shapes of the vision part of the checkpoint, and one key of another modality."""
    shapes = {
        f"{STEM}cls_token": (1, 1, width),
        f"{STEM}rgbt_stem.proj.1.weight": (width, 3, 2, patch, patch),
        f"{STEM}pos_embedding_helper.pos_embed": (1, num_tokens, width),
        f"{VISION}pre_transformer_layer.0.weight": (width,),
        f"{VISION}pre_transformer_layer.0.bias": (width,),
        "modality_heads.vision.0.weight": (width,),
        "modality_heads.vision.0.bias": (width,),
        "modality_heads.vision.2.weight": (1024, width),
        "modality_trunks.text.blocks.0.attn.in_proj_weight": (24, 8),
        "modality_postprocessors.text.1.log_logit_scale": (),
    }
    for number in range(depth):
        block = f"{VISION}blocks.{number}."
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
            f"{block}attn.out_proj.weight": (width, width),
            f"{block}attn.out_proj.bias": (width,),
            f"{block}norm_1.weight": (width,),
            f"{block}norm_1.bias": (width,),
            f"{block}norm_2.weight": (width,),
            f"{block}norm_2.bias": (width,),
            f"{block}mlp.fc1.weight": (4 * width, width),
            f"{block}mlp.fc1.bias": (4 * width,),
            f"{block}mlp.fc2.weight": (width, 4 * width),
            f"{block}mlp.fc2.bias": (width,),
        }
    return shapes


@pytest.fixture(scope="module")
def checkpoint():
    """A small checkpoint with the published keys; activations are small, so that the norms' epsilon is felt."""
    generator = torch.Generator().manual_seed(0)
    shapes = published_shapes(WIDTH, DEPTH, PATCH, 257)
    state = {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    small = (f"{STEM}cls_token", f"{STEM}rgbt_stem.proj.1.weight", f"{STEM}pos_embedding_helper.pos_embed")
    return {key: value * (0.003 if key in small else 1) for key, value in state.items()}


@pytest.fixture
def small(monkeypatch):
    """The row `imagebind` for a small network."""
    row = backbones.BACKBONES["imagebind"]
    sizes = (("embed_dim", WIDTH), ("depth", DEPTH), ("num_heads", HEADS))
    monkeypatch.setitem(backbones.BACKBONES, "imagebind", replace(row, model_args=(*row.model_args, *sizes)))


def specified_outputs(state, image):
    """Outputs of all blocks for (3, H, W) in [0, 1], from the description of the network."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    frame = (image - mean) / std
    kernel = state[f"{STEM}rgbt_stem.proj.1.weight"]
    # A still image is a video of two equal frames; the stem sees both at once.
    grid = sum(embed_patches(frame, kernel[:, :, time]) for time in range(2))
    blocks = []
    for number in range(DEPTH):

        def pair(name, number=number, joint="."):
            return tuple(state[f"{VISION}blocks.{number}.{name}{joint}{kind}"] for kind in ("weight", "bias"))

        blocks.append(
            {
                "norm1": pair("norm_1"),
                "qkv": pair("attn.in_proj", joint="_"),
                "out": pair("attn.out_proj"),
                "norm2": pair("norm_2"),
                "fc1": pair("mlp.fc1"),
                "fc2": pair("mlp.fc2"),
            }
        )
    pre_norm = tuple(state[f"{VISION}pre_transformer_layer.0.{kind}"] for kind in ("weight", "bias"))
    positions = state[f"{STEM}pos_embedding_helper.pos_embed"][0]
    return block_outputs(grid, state[f"{STEM}cls_token"], positions, pre_norm, blocks, HEADS, 1e-6, gelu)


def test_levels_are_those_of_the_specification(tmp_path, checkpoint, small):
    torch.save(checkpoint, tmp_path / "imagebind_huge.pth")
    resolved = resolve_backbone("imagebind", str(tmp_path))
    layers = choose_layers(resolved, LevelChoice())
    assert layers == ("blocks.1", "blocks.3", "blocks.5", "blocks.7")
    image = torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    levels = FrozenBackbone(resolved, layers).encode(image[None])
    outputs = specified_outputs(checkpoint, image)
    for level, block in zip(levels, (1, 3, 5, 7), strict=True):
        torch.testing.assert_close(level[0].permute(1, 2, 0), outputs[block], rtol=1e-3, atol=1e-3)
        assert level.shape == (1, WIDTH, 16, 16)


def test_the_published_checkpoint_fits_key_by_key():
    """Names and shapes alone, at full size."""
    shapes = published_shapes(1280, 32, 14, 257)
    published = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    resolved = resolve_backbone("imagebind", "random")
    state = backbones._meta_network(resolved, (224, 224)).state_dict()
    renamed = rename_imagebind(published, state)
    assert {key: value.shape for key, value in renamed.items()} == {key: value.shape for key, value in state.items()}


def test_the_row_is_the_paper():
    resolved = resolve_backbone("imagebind", "random")
    assert (resolved.mean, resolved.std, resolved.interpolation) == (CLIP_MEAN, CLIP_STD, "bicubic")
    assert resolved.architecture == "vit_huge_patch14_clip_224"  # without a tag, whose weights these are not
    layers = choose_layers(resolved, LevelChoice())
    assert layers == ("blocks.7", "blocks.15", "blocks.23", "blocks.31")
    assert level_shapes(resolved, layers, (224, 224)) == ((1280, 16, 16),) * 4


def test_a_checkpoint_of_another_kind_is_left_alone_and_refused(tmp_path, checkpoint, small):
    other = {"blocks.0.norm1.weight": torch.zeros(WIDTH)}
    assert rename_imagebind(other, {}) is other
    torch.save(other, tmp_path / "imagebind.pth")
    with pytest.raises(AdgridError, match=r"imagebind\.pth do not fit backbone 'imagebind' .*missing"):
        check_weights_fit(resolve_backbone("imagebind", str(tmp_path)))
    del checkpoint[f"{VISION}blocks.3.norm_2.bias"]
    torch.save(checkpoint, tmp_path / "imagebind.pth")
    with pytest.raises(AdgridError, match=r"1 missing \(blocks\.3\.norm2\.bias\)"):
        check_weights_fit(resolve_backbone("imagebind", str(tmp_path)))


def test_weights_of_timms_network_are_not_taken_for_imagebinds(tmp_path):
    (tmp_path / "vit_huge_patch14_clip_224.safetensors").touch()
    with pytest.raises(AdgridError, match=r"put imagebind\.safetensors"):
        resolve_backbone("imagebind", str(tmp_path))
