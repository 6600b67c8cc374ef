import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from methods.components import gaussian
from methods.components.gaussian import (
    CholeskyGaussians,
    SampleGaussians,
    fit_gaussians,
    load_gaussians,
    nearest_positions,
)

EPSILON = 0.01
PYRAMID = ((3, 8, 8), (4, 4, 4), (5, 2, 2))
NOT_NESTED = ((3, 6, 5), (4, 4, 3), (2, 3, 2))
PLAIN = ((4, 3, 3), (6, 3, 3))


def images(shapes, num, seed):
    """(num, D, h, w) levels whose channels are correlated with each other and across levels."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(num, 1, 1, 1, generator=generator)
    levels = []
    for width, height, breadth in shapes:
        mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(width))
        noise = torch.randn(num, width, height, breadth, generator=generator)
        levels.append(20 + torch.einsum("cd,ndhw->nchw", mixing, noise) + 5 * common)
    return levels


def aligned(levels):
    """(N, h, w, D) float64 numpy features, coarse levels repeated by plain indexing."""
    height, width = levels[0].shape[2:]
    features = np.empty((len(levels[0]), height, width, sum(level.shape[1] for level in levels)))
    for y in range(height):
        for x in range(width):
            parts = [m[:, :, y * m.shape[2] // height, x * m.shape[3] // width] for m in levels]
            features[:, y, x] = torch.cat(parts, dim=1).double().numpy()
    return features


def plain_distances(train, test):
    """(B, h, w) by scipy, one position and image at a time, with an explicit inverse."""
    train, test = aligned(train), aligned(test)
    distances = np.empty(test.shape[:3])
    for y, x in np.ndindex(*test.shape[1:3]):
        covariance = np.zeros((train.shape[3],) * 2)
        if len(train) > 1:
            covariance = np.cov(train[:, y, x], rowvar=False)
        inverse = np.linalg.inv(covariance + EPSILON * np.eye(train.shape[3]))
        for image in range(len(test)):
            distances[image, y, x] = mahalanobis(test[image, y, x], train[:, y, x].mean(axis=0), inverse)
    return torch.from_numpy(distances)


def test_one_channel_by_hand():
    train = [torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)]  # mean 2, variance 2
    distance = fit_gaussians(train, epsilon=0.25).distances([torch.tensor([5.0]).reshape(1, 1, 1, 1)])
    assert distance.item() == pytest.approx(3 / math.sqrt(2.25))


@pytest.mark.parametrize("form", [CholeskyGaussians, SampleGaussians])
@pytest.mark.parametrize("shapes", [PYRAMID, NOT_NESTED, PLAIN])
@pytest.mark.parametrize("num_images", [1, 5, 40])
def test_both_forms_agree_with_scipy(form, shapes, num_images):
    train, test = images(shapes, num_images, seed=1), images(shapes, 3, seed=2)
    gaussians = form.fit(train, EPSILON)
    torch.testing.assert_close(gaussians.distances(test), plain_distances(train, test), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", [CholeskyGaussians, SampleGaussians])
def test_chunks_of_positions_change_nothing(form, monkeypatch):
    train, test = images(PYRAMID, 5, seed=1), images(PYRAMID, 2, seed=2)
    whole = form.fit(train, EPSILON).distances(test)
    monkeypatch.setattr(gaussian, "CHUNK_FLOATS", 1)
    torch.testing.assert_close(form.fit(train, EPSILON).distances(test), whole, rtol=1e-12, atol=0)


def test_nearly_singular_covariances_keep_their_distances():
    # Two channels that agree up to 1e-6 of their spread: condition number 1e8, beyond an inverse in float32.
    generator = torch.Generator().manual_seed(0)
    channel = 1000 * torch.randn(30, 1, 1, 1, generator=generator)
    train = [torch.cat([channel, channel + 1e-3 * torch.randn(30, 1, 1, 1, generator=generator)], dim=1)]
    test = [torch.tensor([100.0, 101.0]).reshape(1, 2, 1, 1)]
    for form in (CholeskyGaussians, SampleGaussians):
        found = form.fit(train, EPSILON).distances(test)
        torch.testing.assert_close(found, plain_distances(train, test), rtol=1e-6, atol=0)


def test_few_images_are_kept_as_samples_and_many_as_factors():
    assert isinstance(fit_gaussians(images(PYRAMID, 3, seed=1), EPSILON), SampleGaussians)
    assert isinstance(fit_gaussians(images(PYRAMID, 40, seed=1), EPSILON), CholeskyGaussians)


def test_coarse_channels_are_stored_once():
    state = fit_gaussians(images(PYRAMID, 40, seed=1), EPSILON).state_dict()
    assert state["factor.2"].shape == (4, 5, 5)
    assert state["cross.1"].shape == (16, 4, 5)
    assert state["cross.0"].shape == (64, 3, 9)


@pytest.mark.parametrize("num_images", [3, 40])
def test_state_restores_the_distances(num_images):
    train, test = images(PYRAMID, num_images, seed=1), images(PYRAMID, 2, seed=2)
    fitted = fit_gaussians(train, EPSILON)
    restored = load_gaussians(fitted.state_dict(), [shape[1:] for shape in PYRAMID], EPSILON)
    assert type(restored) is type(fitted)
    assert torch.equal(restored.distances(test), fitted.distances(test))


@pytest.mark.parametrize("num_images", [3, 40])
def test_a_level_without_channels_only_gives_the_grid(num_images):
    train, test = images(PYRAMID, num_images, seed=1), images(PYRAMID, 2, seed=2)
    empty_train, empty_test = train[0][:, :0], test[0][:, :0]
    found = fit_gaussians([empty_train, *train[1:]], EPSILON).distances([empty_test, *test[1:]])
    coarse = fit_gaussians(train[1:], EPSILON).distances(test[1:])
    torch.testing.assert_close(found, coarse.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2))


@pytest.mark.parametrize(("fine", "coarse"), [((8, 6), (4, 3)), ((7, 5), (3, 2)), ((4, 4), (4, 4))])
def test_nearest_positions_are_those_of_interpolate(fine, coarse):
    numbers = torch.arange(coarse[0] * coarse[1], dtype=torch.float32).reshape(1, 1, *coarse)
    expected = torch.nn.functional.interpolate(numbers, size=fine, mode="nearest").flatten().long()
    assert torch.equal(nearest_positions(fine, coarse), expected)
