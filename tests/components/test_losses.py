"""Focal loss and structural similarity, against their formulas and a slow computation."""

import math

import pytest
import torch
from reference.ssim import slow_ssim

from methods.components.losses import focal_loss, structural_similarity


def logits_of(probability):
    """(1, 2, 1) logits whose softmax gives this probability of an anomaly."""
    return torch.tensor([math.log(1 - probability), math.log(probability)]).view(1, 2, 1) + 5.0


@pytest.mark.parametrize(
    ("probability", "target", "gamma", "alpha", "expected"),
    [
        (0.9, 1, 2.0, None, -(0.1**2) * math.log(0.9)),
        (0.9, 0, 2.0, None, -(0.9**2) * math.log(0.1)),
        (0.3, 1, 0.0, None, -math.log(0.3)),
        (0.3, 1, 1.5, 0.25, -0.25 * 0.7**1.5 * math.log(0.3)),
        (0.3, 0, 1.5, 0.25, -0.75 * 0.3**1.5 * math.log(0.7)),
    ],
)
def test_focal_loss_is_its_formula(probability, target, gamma, alpha, expected):
    loss = focal_loss(logits_of(probability), torch.tensor([[target]]), gamma, alpha)
    assert loss.shape == (1, 1)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_focal_loss_without_focus_is_the_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 2, 4, 5, generator=generator)
    target = torch.rand(2, 4, 5, generator=generator) < 0.5
    expected = torch.nn.functional.cross_entropy(logits, target.long(), reduction="none")
    torch.testing.assert_close(focal_loss(logits, target, gamma=0.0), expected)


def test_focal_loss_stays_finite_with_its_gradient_where_the_network_is_certain():
    logits = torch.tensor([[-200.0, 200.0], [200.0, -200.0], [0.0, 0.0]]).requires_grad_()
    loss = focal_loss(logits, torch.tensor([1, 1, 0]))
    assert loss.tolist() == pytest.approx([0.0, 400.0, 0.25 * math.log(2)])
    loss.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0].abs().max() == 0  # nothing to learn where it is right


def test_similarity_equals_that_of_every_window_for_itself():
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(2, 3, 13, 17, generator=generator)
    second = (first + 0.2 * torch.randn(first.shape, generator=generator)).clamp(0, 1)
    fast = structural_similarity(first, second)
    for image in range(2):
        for channel in range(3):
            slow = torch.from_numpy(slow_ssim(first[image, channel], second[image, channel]))
            torch.testing.assert_close(fast[image, channel].double(), slow, rtol=0, atol=2e-5)


def test_similarity_of_images_smaller_than_the_window():
    generator = torch.Generator().manual_seed(2)
    first, second = torch.rand(2, 1, 1, 5, 3, generator=generator)
    slow = torch.from_numpy(slow_ssim(first[0, 0], second[0, 0], window=7, sigma=2.0))
    fast = structural_similarity(first, second, window=7, sigma=2.0)[0, 0]
    torch.testing.assert_close(fast.double(), slow, rtol=0, atol=2e-5)


def test_an_image_is_perfectly_similar_to_itself_alone():
    image = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(structural_similarity(image, image), torch.ones_like(image))
    assert structural_similarity(image, 1 - image).mean() < 0


def test_similarity_has_the_right_gradient():
    generator = torch.Generator().manual_seed(4)
    first, second = torch.rand(2, 1, 1, 6, 6, generator=generator)
    first.requires_grad_()
    structural_similarity(first, second, window=5).mean().backward()
    step = 1e-3
    for place in ((0, 0), (3, 2)):
        up, down = first.detach().clone(), first.detach().clone()
        up[0, 0][place] += step
        down[0, 0][place] -= step
        change = structural_similarity(up, second, window=5) - structural_similarity(down, second, window=5)
        assert float(first.grad[0, 0][place]) == pytest.approx(float(change.mean()) / (2 * step), rel=2e-2, abs=2e-4)


def test_lower_precision_of_the_network_does_not_reach_the_similarity():
    image = 0.5 + 0.01 * torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    other = image + 0.01 * torch.rand(image.shape, generator=torch.Generator().manual_seed(6))
    with torch.autocast("cpu", torch.bfloat16):
        lower = structural_similarity(image, other)
    assert torch.equal(lower, structural_similarity(image, other))
