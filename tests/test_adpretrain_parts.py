import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from reference.adpretrain import plain_label_by_count, plain_projection, plain_residual
from small_adpretrain import SHAPES, Images, draw, small_projector, tensor

import methods.adpretrain.residuals as residual_module
from harness.backbones import import_timm
from harness.contracts import AdgridError
from methods.adpretrain import Projector, export_checkpoint, load_checkpoint, residual
from methods.adpretrain.labels import label_by_count, label_by_nearest
from methods.adpretrain.views import blur, change_contrast, change_saturation, make_view, turn_hue

# --- residual -------------------------------------------------------------------------------------------------------


def test_a_residual_by_hand():
    reference = tensor([10, 0], [0, 1])
    features = tensor([1, 0.5], [0.2, 3]).T.reshape(1, 2, 1, 2)  # tokens (1, 0.5) and (0.2, 3)
    rest = residual(features, reference)
    # Nearest by angle, not by distance, and subtracted as it is.
    torch.testing.assert_close(rest[0, :, 0].T, tensor([-9, 0.5], [0.2, 2]))


@pytest.mark.parametrize("block", [1, 40, 2**23])
def test_residuals_are_those_of_one_token_at_a_time(monkeypatch, block):
    monkeypatch.setattr(residual_module, "BLOCK_FLOATS", block)
    features, reference = draw(3, 8, 4, 5), draw(30, 8, seed=1)
    torch.testing.assert_close(residual(features, reference), plain_residual(features, reference))


def test_the_first_of_equally_near_references_is_taken_and_images_stand_for_themselves():
    features = draw(4, 8, 3, 3)
    doubled = torch.cat([draw(10, 8, seed=1)] * 2) * torch.tensor([1.0] * 10 + [2.0] * 10)[:, None]  # exact in binary
    together = residual(features, doubled)
    assert torch.equal(together, residual(features, doubled[:10]))
    for image in range(4):
        assert torch.equal(residual(features[image : image + 1], doubled)[0], together[image])


def test_features_that_are_references_leave_nothing():
    features = draw(2, 8, 3, 3)
    rest = residual(features, features.permute(0, 2, 3, 1).reshape(-1, 8))
    assert torch.equal(rest, torch.zeros_like(features))


@pytest.mark.parametrize("reference", [torch.zeros(0, 8), torch.zeros(3, 7), torch.zeros(1, 3, 8)])
def test_references_that_do_not_fit_are_refused(reference):
    with pytest.raises(ValueError, match="reference must be"):
        residual(torch.zeros(1, 8, 2, 2), reference)


# --- projector ------------------------------------------------------------------------------------------------------


def test_a_projection_and_its_gradients_are_those_of_torch_attention_image_by_image():
    projector = small_projector().double()
    levels = [draw(3, *shape, seed=number, dtype=torch.float64) for number, shape in enumerate(SHAPES)]
    for level, features, ours in zip(projector.children(), levels, projector(levels), strict=True):
        expected = plain_projection(level, features)
        assert ours.shape == features.shape
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
        parameters = list(level.parameters())
        gradients = torch.autograd.grad(ours.sin().sum(), parameters)
        plain = torch.autograd.grad(expected.sin().sum(), parameters)
        for own, other in zip(gradients, plain, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-8)


def test_the_paper_has_2048_references_and_16_heads():
    projector = Projector([32])
    assert projector.l1_proj.x_ref.shape == (1, 2048, 32)
    (layer,) = projector.l1_proj.layers
    assert layer.cross_attn.num_heads == 16
    assert [p.layers[0].cross_attn.num_heads for p in Projector([24, 40, 112]).children()] == [8, 8, 16]
    state = projector.state_dict()
    assert abs(float(state["l1_proj.x_ref"].std()) - 1) < 0.02
    assert abs(float(state["l1_proj.ref_proj.project.weight"].std()) - math.sqrt(2 / 32)) < 0.02


PAPER_KEYS = {
    "x_ref": lambda c, r: (1, 2048, c),
    "layers.0.cross_attn.in_proj_weight": lambda c, r: (3 * c, c),
    "layers.0.cross_attn.in_proj_bias": lambda c, r: (3 * c,),
    "layers.0.cross_attn.out_proj.weight": lambda c, r: (c, c),
    "layers.0.cross_attn.out_proj.bias": lambda c, r: (c,),
    "layers.0.mlp.fc1.weight": lambda c, r: (4 * c, c),
    "layers.0.mlp.fc1.bias": lambda c, r: (4 * c,),
    "layers.0.mlp.fc2.weight": lambda c, r: (c, 4 * c),
    "layers.0.mlp.fc2.bias": lambda c, r: (c,),
    "layers.0.mlp.se.fc1.weight": lambda c, r: (r, 4 * c),
    "layers.0.mlp.se.fc1.bias": lambda c, r: (r,),
    "layers.0.mlp.se.fc2.weight": lambda c, r: (4 * c, r),
    "layers.0.mlp.se.fc2.bias": lambda c, r: (4 * c,),
    "ref_proj.project.weight": lambda c, r: (c, c, 1),
    "ref_proj.project.bias": lambda c, r: (c,),
}


@pytest.mark.parametrize(("width", "hidden"), [(768, 192), (1024, 256), (1280, 320)])
def test_a_projector_has_the_keys_and_shapes_of_the_official_checkpoints(width, hidden):
    with torch.device("meta"):
        state = Projector([width] * 4).state_dict()
    expected = {f"l{n}_proj.{key}": shape(width, hidden) for n in range(1, 5) for key, shape in PAPER_KEYS.items()}
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


def test_initial_weights_are_those_of_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = small_projector().state_dict()
    assert torch.equal(torch.rand(3), expected)
    second, other = small_projector().state_dict(), small_projector(seed=1).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["l1_proj.x_ref"], other["l1_proj.x_ref"])


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    projector = small_projector()
    export_checkpoint(projector, tmp_path / "c.pth", img_auc=0.9)
    content = torch.load(tmp_path / "c.pth", weights_only=True)
    assert set(content) == {"projectors", "img_auc", "pix_auc", "pix_pro"}
    assert content["img_auc"] == 0.9
    assert math.isnan(content["pix_pro"])
    assert list(tmp_path.iterdir()) == [tmp_path / "c.pth"]
    restored = load_checkpoint(tmp_path / "c.pth")
    assert restored.channels == (16, 24)
    levels = [draw(2, *shape) for shape in SHAPES]
    for own, other in zip(restored(levels), projector(levels), strict=True):
        assert torch.equal(own, other)
    assert all(parameter.requires_grad for parameter in restored.parameters())


def test_a_checkpoint_of_the_official_code_in_bfloat16_with_metrics_of_numpy_is_read(tmp_path):
    state = {key: value.bfloat16() for key, value in small_projector().state_dict().items()}
    metrics = {"img_auc": np.mean(np.array([0.5, 1.0])), "pix_auc": np.float64(0.9), "pix_pro": np.float32(0.8)}
    torch.save({"projectors": state, **metrics}, tmp_path / "c.pth")
    restored = load_checkpoint(tmp_path / "c.pth").state_dict()
    assert all(torch.equal(restored[key], state[key].float()) for key in state)


def broken(change):
    state = dict(small_projector().state_dict())
    change(state)
    return {"projectors": state}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (broken(lambda s: s.pop("l2_proj.layers.0.mlp.fc1.bias")), r"missing l2_proj\.layers\.0\.mlp\.fc1\.bias"),
        (broken(lambda s: s.update(extra=torch.zeros(1))), "not known extra"),
        (
            broken(lambda s: s.update({"l1_proj.layers.0.mlp.fc2.bias": torch.zeros(3)})),
            r"l1_proj\.layers\.0\.mlp\.fc2\.bias has shape \(3,\) instead of \(16,\)",
        ),
        (broken(lambda s: s.pop("l1_proj.x_ref")), r"no tensor l1_proj\.x_ref"),
        ({"state_dict": {}}, "field 'projectors' is missing, found state_dict"),
        (torch.zeros(3), "field 'projectors' is missing, found Tensor"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_where(tmp_path, content, message):
    path = tmp_path / "c.pth"
    torch.save(content, path)
    with pytest.raises(AdgridError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    with pytest.raises(AdgridError, match="no such file"):
        load_checkpoint(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(AdgridError, match=r"cannot be read as tensors alone") as error:
        load_checkpoint(tmp_path / "text.pth")
    assert "\n" not in str(error.value)
    torch.save({"projectors": {"f": Images}}, tmp_path / "code.pth")
    with pytest.raises(AdgridError, match=r"cannot be read as tensors alone"):
        load_checkpoint(tmp_path / "code.pth")


# --- patch labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [14, 16, 8, 4])
def test_patches_are_counted_pixel_by_pixel(side):
    masks = torch.zeros(2, 7 * side, 7 * side, dtype=torch.uint8)
    masks[0, 3:50, 10:22] = 1
    masks[1].view(-1)[torch.randperm(masks[1].numel(), generator=torch.Generator().manual_seed(0))[::6]] = 255
    labels = label_by_count(masks, (7, 7))
    assert torch.equal(labels, plain_label_by_count(masks, (7, 7)))
    assert labels.any()
    assert not labels.all()


def test_a_patch_of_14_pixels_needs_more_than_32_of_them():
    masks = torch.zeros(2, 14, 28, dtype=torch.uint8)
    masks[0, :4, :8] = 1  # 32 pixels
    masks[1, :3, :11] = 1  # 33 pixels
    assert label_by_count(masks, (1, 2)).tolist() == [[[False, False]], [[True, False]]]
    # The nearest pixel of the first patch is its upper left one, and that of the second is not in the defect.
    assert label_by_nearest(masks, (1, 2)).tolist() == [[[True, False]], [[True, False]]]


def test_patches_that_do_not_divide_an_image_share_no_pixel():
    masks = torch.ones(1, 10, 10, dtype=torch.uint8)
    masks[:, :, :4] = 0
    assert label_by_count(masks, (3, 3)).tolist() == [[[False, True, True]] * 3]


# --- views ----------------------------------------------------------------------------------------------------------


def photograph(seed=0):
    """A smooth colourful image."""
    small = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, size=(40, 48), mode="bicubic")[0].clamp(0, 1)


def test_changes_of_colour_are_those_of_torchvision():
    import_timm()  # brings torchvision, whose compiled part may not fit
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = photograph()
    for ours, theirs, amounts in (
        (change_contrast, functional.adjust_contrast, (0.6, 1.0, 1.4)),
        (change_saturation, functional.adjust_saturation, (0.6, 1.0, 1.4)),
        (turn_hue, functional.adjust_hue, (-0.1, 0.0, 0.1)),
    ):
        for amount in amounts:
            torch.testing.assert_close(ours(image, amount), theirs(image, amount), rtol=0, atol=3e-4)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_the_blur_is_close_to_that_of_pillow(sigma):
    image = photograph()
    pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    theirs = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius=sigma))
    expected = torch.from_numpy(np.array(theirs)).permute(2, 0, 1) / 255
    torch.testing.assert_close(blur(image, sigma), expected, rtol=0, atol=0.012)


def test_a_blurred_point_is_a_gaussian_and_a_flat_image_stays():
    point = torch.zeros(1, 33, 33)
    point[0, 16, 16] = 1
    result = blur(point, 1.5)[0]
    offsets = torch.arange(-16, 17)
    weights = torch.exp(-offsets.square() / (2 * 1.5**2))
    weights /= weights.sum()
    torch.testing.assert_close(result, weights[:, None] * weights, rtol=1e-3, atol=1e-5)
    flat = torch.full((3, 9, 7), 0.3)
    torch.testing.assert_close(blur(flat, 2.0), flat)


def test_views_are_drawn_from_their_generator_and_stay_in_range():
    image = photograph()
    views = [make_view(image, torch.Generator().manual_seed(seed)) for seed in range(300)]
    again = make_view(image, torch.Generator().manual_seed(7))
    assert torch.equal(views[7], again)
    assert all(view.shape == image.shape and view.min() >= 0 and view.max() <= 1.00001 for view in views)
    untouched = np.mean([torch.equal(view, image) for view in views])
    grey = np.mean([bool((view[0] - view[1]).abs().max() < 1e-5) for view in views])
    assert untouched == pytest.approx(0.2 * 0.8 * 0.5, abs=0.05)
    assert grey == pytest.approx(0.2, abs=0.07)
