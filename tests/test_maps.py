import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from harness.maps import full_resolution, reduce_maps


def two_steps(maps, image_size, sigma):
    """Bilinear upsampling, then scipy's Gaussian with its defaults, in float64."""
    large = torch.nn.functional.interpolate(maps.double()[:, None], image_size, mode="bilinear", align_corners=False)
    return np.stack([gaussian_filter(image, sigma) for image in large[:, 0].numpy()])


def random_maps(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 3 - 0.5


@pytest.mark.parametrize(
    ("small", "image_size"),
    [((28, 28), (224, 224)), ((16, 20), (96, 130)), ((40, 40), (40, 40)), ((7, 1), (30, 20)), ((50, 50), (24, 30))],
)
@pytest.mark.parametrize("sigma", [0.0, 0.7, 4.0, 20.0])
def test_upsampling_and_smoothing_equal_the_two_plain_steps(small, image_size, sigma):
    maps = random_maps(2, *small)
    result = full_resolution(maps, image_size, sigma)
    assert result.dtype == torch.float32
    assert result.shape == (2, *image_size)
    np.testing.assert_allclose(result.numpy(), two_steps(maps, image_size, sigma), rtol=1e-6, atol=1e-6)


def test_a_map_does_not_depend_on_its_batch():
    maps = random_maps(5, 28, 28)
    together = full_resolution(maps, (224, 224), 4.0)
    alone = torch.cat([full_resolution(single[None], (224, 224), 4.0) for single in maps])
    assert torch.equal(together, alone)
    for reduction in ("max", "mean_pool_16", "mean_pool_21"):
        scores = torch.cat([reduce_maps(single[None], reduction) for single in together])
        assert torch.equal(reduce_maps(together, reduction), scores)


def test_a_constant_map_stays_as_it_is():
    result = full_resolution(torch.full((1, 9, 9), 2.5), (64, 48), 5.0)
    torch.testing.assert_close(result, torch.full((1, 64, 48), 2.5))


def test_arrays_half_precision_and_empty_batches_are_read():
    maps = random_maps(2, 8, 8).half()
    expected = full_resolution(maps.float(), (32, 32), 1.0)
    assert torch.equal(full_resolution(maps, (32, 32), 1.0), expected)
    assert torch.equal(full_resolution(maps.numpy(), (32, 32), 1.0), expected)
    assert full_resolution(maps[:0], (32, 32), 1.0).shape == (0, 32, 32)


def test_maps_are_not_changed_in_place():
    maps = random_maps(1, 8, 8)
    before = maps.clone()
    full_resolution(maps, (8, 8), 2.0)
    assert torch.equal(maps, before)


def test_max_is_the_largest_pixel():
    maps = random_maps(3, 20, 30)
    assert reduce_maps(maps, "max").tolist() == [float(image.max()) for image in maps]


@pytest.mark.parametrize(("reduction", "window", "padding"), [("mean_pool_16", 16, 0), ("mean_pool_21", 21, 10)])
def test_pooled_scores_equal_average_pooling(reduction, window, padding):
    maps = random_maps(3, 50, 34)
    pooled = torch.nn.functional.avg_pool2d(maps.double()[:, None], window, stride=1, padding=padding)
    scores = reduce_maps(maps, reduction)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, pooled.amax(dim=(1, 2, 3)).float(), rtol=1e-6, atol=0)


def test_pooling_by_hand():
    maps = torch.zeros(1, 40, 40)
    maps[0, 0, 0] = 1  # windows of 21 may hang over the border, those of 16 may not
    maps[0, 20, 20:22] = 1
    assert reduce_maps(maps, "mean_pool_16").item() == pytest.approx(2 / 256)
    assert reduce_maps(maps, "mean_pool_21").item() == pytest.approx(2 / 441)
    assert reduce_maps(torch.full((1, 4, 5), 3.0), "mean_pool_16").item() == pytest.approx(3)
    assert reduce_maps(torch.full((1, 4, 5), 3.0), "mean_pool_21").item() == pytest.approx(3 * 20 / 441)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\(B, h, w\), got \(8, 8\)"):
        full_resolution(torch.zeros(8, 8), (16, 16), 1.0)
    for sigma in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="sigma"):
            full_resolution(torch.zeros(1, 8, 8), (16, 16), sigma)
    with pytest.raises(ValueError, match=r"\(B, H, W\)"):
        reduce_maps(torch.zeros(8, 8), "max")
    with pytest.raises(ValueError, match="known: max, mean_pool_16, mean_pool_21"):
        reduce_maps(torch.zeros(1, 8, 8), "mean")
