"""Synthetic anomalies: blending, CutPaste and seamless patches. Perlin noise and textures have files of their own."""

import pytest
import torch

from methods.components.synthesis import VISIBLE_CHANGE, blend_texture, cut_paste, seamless_patch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_image(seed, size=(40, 52), low=0.4, high=0.6):
    return low + (high - low) * torch.rand(3, *size, generator=seeded(seed))


def test_a_blend_by_hand():
    image = torch.tensor([[0.2, 0.4]]).expand(3, 1, 2)
    texture = torch.tensor([[1.0, 0.8]]).expand(3, 1, 2)
    blended = blend_texture(image, texture, torch.tensor([[True, False]]), beta=0.25)
    # (1 - 0.25) * 1.0 + 0.25 * 0.2 = 0.8
    torch.testing.assert_close(blended, torch.tensor([[0.8, 0.4]]).expand(3, 1, 2))


def test_a_blend_is_the_equation_of_the_paper():
    image, texture, mask = noise_image(0), noise_image(1, low=0, high=1), torch.rand(40, 52, generator=seeded(2)) < 0.3
    m, beta = mask.float(), 0.6
    expected = image * (1 - m) + (1 - beta) * texture * m + beta * image * m
    blended = blend_texture(image, texture, mask, beta)
    torch.testing.assert_close(blended, expected)
    assert torch.equal(blended[:, ~mask], image[:, ~mask])


SYNTHESISERS = {
    "cut": lambda image, generator: cut_paste(image, generator),
    "scar": lambda image, generator: cut_paste(image, generator, variant="scar"),
    "seamless": lambda image, generator: seamless_patch(image, noise_image(99, (33, 64)), generator),
    "mixed": lambda image, generator: seamless_patch(image, noise_image(99), generator, gradients="mixed"),
}


@pytest.mark.parametrize("name", SYNTHESISERS)
def test_the_mask_is_where_pixels_changed(name):
    for seed in range(20):
        image = noise_image(seed, low=0.0, high=1.0)
        before = image.clone()
        changed, mask = SYNTHESISERS[name](image, seeded(seed))
        assert torch.equal(image, before), "the image given was changed itself"
        assert changed.shape == image.shape
        assert changed.dtype == torch.float32
        assert mask.shape == (40, 52)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, (changed != image).any(dim=0))
        assert ((changed - image).abs().amax(dim=0)[mask] > VISIBLE_CHANGE).all()
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert 0 < mask.sum() < mask.numel() / 2


@pytest.mark.parametrize("name", SYNTHESISERS)
def test_a_seed_gives_one_anomaly_and_another_seed_another(name):
    image = noise_image(5)
    first, again, other = (SYNTHESISERS[name](image, seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", SYNTHESISERS)
def test_lower_precision_of_a_network_does_not_reach_its_images(name):
    image = noise_image(5)
    with torch.autocast("cpu", torch.bfloat16):
        lower, _ = SYNTHESISERS[name](image, seeded())
    assert torch.equal(lower, SYNTHESISERS[name](image, seeded())[0])


@pytest.mark.parametrize("name", SYNTHESISERS)
@pytest.mark.parametrize("size", [(4, 4), (5, 90), (90, 5)])
def test_tiny_and_narrow_images_are_no_trouble(name, size):
    for seed in range(10):
        changed, mask = SYNTHESISERS[name](noise_image(seed, size), seeded(seed))
        assert changed.shape == (3, *size)
        assert changed.isfinite().all()
        assert mask.shape == size


def boxes(variant, size, count):
    """(count, 2) height and width of the boxes around the changed pixels."""
    found = []
    for seed in range(count):
        _, mask = cut_paste(noise_image(seed, size, 0, 1), seeded(seed), variant=variant)
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        found.append([int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1])
    return torch.tensor(found)


def test_pasted_rectangles_have_the_sizes_of_the_paper():
    sides = boxes("normal", (128, 128), 60).float()
    share, aspect = sides.prod(dim=1) / 128**2, sides[:, 1] / sides[:, 0]
    assert share.min() > 0.018
    assert share.max() < 0.16
    assert aspect.min() > 0.28
    assert aspect.max() < 3.5
    assert 15 < (aspect > 1).sum() < 45  # wide and tall ones are equally likely


def test_scars_are_thin():
    sides = boxes("scar", (256, 256), 40)
    assert sides.max() <= 32  # a strip of 25 x 16, turned by 45 degrees
    assert sides[:, 0].min() >= 8


def test_without_jitter_a_pasted_patch_is_a_piece_of_the_image():
    # Every pixel of the image is unique, so that its colour tells where it came from.
    image = torch.linspace(0, 1, 3 * 64 * 64).view(3, 64, 64)
    for seed in range(5):
        changed, mask = cut_paste(image, seeded(seed), jitter=0.0)
        rows, columns = mask.nonzero().T
        came_from = (changed[0][mask] * (3 * 64 * 64 - 1)).round().long()
        shift_rows, shift_columns = came_from // 64 - rows, came_from % 64 - columns
        assert len(shift_rows.unique()) == len(shift_columns.unique()) == 1


def test_a_seamless_patch_solves_the_poisson_equation():
    # Smooth enough that nothing leaves [0, 1], and every change counts.
    image, source = noise_image(1).double(), noise_image(2).double()
    for seed in range(5):
        changed, mask = seamless_patch(image, source, seeded(seed), zoom=(1.0, 1.0), tolerance=0.0)
        rows, columns = mask.nonzero().T
        top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
        assert mask[top : bottom + 1, left : right + 1].all()
        laplacian = laplacian_of(changed)[:, top - 1 : bottom, left - 1 : right]
        # Without a zoom the Laplacian inside is that of some place of the source.
        windows = laplacian_of(source).unfold(1, laplacian.shape[1], 1).unfold(2, laplacian.shape[2], 1)
        assert (windows - laplacian[:, None, None]).abs().amax(dim=(0, 3, 4)).min() < 1e-10


def test_mixed_gradients_keep_the_stronger_edge():
    # A bright line in the image: a flat patch over it erases it, unless gradients are mixed.
    image = torch.full((3, 64, 64), 0.3)
    image[:, :, 32] = 0.8
    flat = torch.full((3, 64, 64), 0.5)
    erased = 0
    for seed in range(10):
        mixed, mask = seamless_patch(image, flat, seeded(seed), side=(0.4, 0.4), gradients="mixed")
        assert torch.equal(mixed, image)
        assert not mask.any()
        changed, mask = seamless_patch(image, flat, seeded(seed), side=(0.4, 0.4))
        on_line = mask[:, 32].nonzero()
        if len(on_line):
            assert changed[0, on_line, 32].min() < 0.5
            erased += 1
    assert erased >= 2


def test_a_patch_of_the_same_flat_colour_is_no_anomaly():
    flat, darker = torch.full((3, 32, 32), 0.5), torch.full((3, 32, 32), 0.2)
    changed, mask = seamless_patch(flat, darker, seeded())
    assert not mask.any()
    assert torch.equal(changed, flat)


def laplacian_of(image):
    """(3, H - 2, W - 2) five-point Laplacian."""
    around = image[:, :-2, 1:-1] + image[:, 2:, 1:-1] + image[:, 1:-1, :-2] + image[:, 1:-1, 2:]
    return around - 4 * image[:, 1:-1, 1:-1]
