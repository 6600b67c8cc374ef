import pytest
import torch
from reference.patches import averaged_patches, official_patches

from methods.components.patches import average_and_concatenate, pool_patches

PYRAMID = ((8, 6, 5), (20, 3, 3))
PLAIN = ((10, 4, 4), (10, 4, 4), (10, 4, 4))


def feature_maps(shapes, num=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num, *shape, generator=generator) for shape in shapes]


def test_one_channel_is_averaged_over_its_neighbourhood_by_hand():
    level = torch.arange(9.0).reshape(1, 1, 3, 3)
    patches = average_and_concatenate([1], 3)([level])
    assert patches[0, 1, 1, 0] == pytest.approx(4)  # mean of 0..8
    assert patches[0, 0, 0, 0] == pytest.approx((0 + 1 + 3 + 4) / 9)  # zeros outside the map


@pytest.mark.parametrize("shapes", [PYRAMID, PLAIN])
@pytest.mark.parametrize("patch_size", [1, 3, 5])
def test_concatenation_is_pooling_then_resizing(shapes, patch_size):
    levels = feature_maps(shapes)
    embedding = average_and_concatenate([shape[0] for shape in shapes], patch_size)
    assert embedding.width == sum(shape[0] for shape in shapes)
    torch.testing.assert_close(embedding(levels), averaged_patches(levels, patch_size), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "patch_size", "embed_width", "target_width"),
    [
        (PYRAMID, 3, 40, 40),  # fewer numbers than the patches have
        (PYRAMID, 3, 50, 33),  # a pooled number mixes the two levels
        (PLAIN, 3, 32, 32),  # three levels in 32 numbers mix twice
        (PLAIN, 1, 8, 6),
    ],
)
def test_pooled_patches_are_those_of_the_official_steps(shapes, patch_size, embed_width, target_width):
    levels = feature_maps(shapes)
    embedding = pool_patches([shape[0] for shape in shapes], patch_size, embed_width, target_width)
    expected = official_patches(levels, patch_size, embed_width, target_width)
    torch.testing.assert_close(embedding(levels), expected, rtol=1e-4, atol=1e-5)


def test_pooling_to_more_numbers_than_there_are_keeps_the_distances_in_fewer():
    levels = feature_maps(PYRAMID)
    embedding = pool_patches([8, 20], 3, 256, 256)
    assert embedding.width == 72 + 128  # 8 * 9 numbers fill the first half, 20 * 9 would not fit the second
    expected = official_patches(levels, 3, 256, 256).flatten(0, 2)
    torch.testing.assert_close(torch.pdist(embedding(levels).flatten(0, 2)), torch.pdist(expected), rtol=1e-4, atol=0)


def test_projection_folds_into_the_embedding():
    levels = feature_maps(PYRAMID)
    matrix = torch.randn(33, 7, generator=torch.Generator().manual_seed(1))
    embedding = pool_patches([8, 20], 3, 50, 33)
    projected = embedding.project(matrix)
    assert projected.width == 7
    torch.testing.assert_close(projected(levels), embedding(levels) @ matrix, rtol=1e-4, atol=1e-4)
