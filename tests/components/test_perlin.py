"""Perlin noise against a slow computation, and the statistics of its masks."""

import math

import pytest
import torch
from reference.perlin import slow_perlin

from harness.contracts import derive_seed
from methods.components.perlin import perlin_mask, perlin_noise


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("size", "scales", "degrees"),
    [
        ((16, 16), (4, 2), 0.0),
        ((16, 16), (1, 1), 0.0),
        ((13, 21), (5, 3), 0.0),  # cells that are no whole number of pixels
        ((16, 16), (4, 4), 90.0),
        ((12, 20), (2, 8), -37.5),
    ],
)
def test_noise_equals_that_of_every_pixel_for_itself(size, scales, degrees):
    fast = perlin_noise(size, scales, seeded(), degrees=degrees)
    angles = (2 * math.pi * torch.rand(scales[0] + 1, scales[1] + 1, generator=seeded())).tolist()
    slow = torch.tensor(slow_perlin(size, scales, angles, degrees))
    if degrees:
        # Positions right on the border are in or out by rounding; an exact turn has many.
        inside = (fast != 0) & (slow != 0)
        assert inside.float().mean() > 0.5
        torch.testing.assert_close(fast[inside], slow[inside], rtol=0, atol=1e-5)
        assert ((fast == 0) != (slow == 0)).float().mean() < 0.15
    else:
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)


def test_noise_is_zero_at_the_corners_of_the_lattice_and_bounded():
    noise = perlin_noise((32, 32), (4, 4), seeded())
    assert noise[::8, ::8].abs().max() < 1e-6
    many = torch.stack([perlin_noise((32, 32), (4, 8), seeded(seed)) for seed in range(50)])
    assert many.abs().max() <= 1
    assert abs(float(many.mean())) < 0.02
    assert many.std() > 0.2


def test_more_cells_give_finer_noise():
    def roughness(scales):
        noise = perlin_noise((64, 64), scales, seeded(3))
        return float(noise.diff(dim=0).abs().mean()), float(noise.diff(dim=1).abs().mean())

    assert roughness((16, 2))[0] > 2 * roughness((2, 2))[0]
    assert roughness((16, 2))[0] > 2 * roughness((16, 2))[1]


def test_turned_noise_leaves_the_corners_empty():
    noise = perlin_noise((64, 64), (8, 8), seeded(), degrees=45.0)
    assert noise[:8, :8].abs().max() == 0
    assert noise[-8:, -8:].abs().max() == 0
    assert (noise[24:40, 24:40] != 0).all()


def test_masks_repeat_with_the_seed_and_differ_between_seeds():
    for size in ((64, 64), (40, 72)):
        first, again, other = (perlin_mask(size, seeded(seed)) for seed in (1, 1, 2))
        assert first.shape == size
        assert first.dtype == torch.bool
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_a_mask_is_where_the_noise_exceeds_the_threshold():
    for seed in range(10):
        low, high = (perlin_mask((48, 48), seeded(seed), threshold=threshold) for threshold in (0.2, 0.6))
        assert (high & ~low).sum() == 0
        assert low.sum() > high.sum()
    assert not perlin_mask((48, 48), seeded(), threshold=1.0).any()


def test_masks_cover_as_much_as_those_of_the_paper():
    # The official code, run 1500 times at 128 x 128 without turning: mean share 0.0533; 5.0 % of the masks are empty;
    # the shares at 10, 50 and 90 % are 0.0206, 0.0517 and 0.0785.
    generators = (seeded(derive_seed("mask", draw)) for draw in range(400))
    shares = torch.stack([perlin_mask((128, 128), generator, rotate=False).float().mean() for generator in generators])
    assert float(shares.mean()) == pytest.approx(0.0533, abs=0.005)
    assert shares.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx([0.0206, 0.0517, 0.0785], abs=0.006)
    assert 0.015 < float((shares == 0).float().mean()) < 0.1


def test_exponents_bound_the_scales():
    def edges(exponents):
        masks = [perlin_mask((64, 64), seeded(seed), exponents=exponents).int() for seed in range(20)]
        return sum(int(mask.diff(dim=1).abs().sum()) for mask in masks)

    assert edges((4, 5)) > 2 * edges((1, 2))
