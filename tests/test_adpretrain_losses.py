import math

import pytest
import torch
from reference.adpretrain import plain_angle_loss, plain_norm_loss
from small_adpretrain import draw, tensor, tokens

import methods.adpretrain.losses as losses_module
from methods.adpretrain import angle_loss, norm_loss

# --- angle loss -----------------------------------------------------------------------------------------------------


def test_the_angle_loss_of_orthogonal_and_of_antipodal_tokens_is_that_of_the_specification():
    label = torch.tensor([0, 1])
    orthogonal, antipodal = tensor([2, 0], [0, 3]), tensor([1, 0], [-5, 0])
    # log(2 exp(0)) - 1 / 0.15 and log(2 exp(-1 / 0.15)) - 1 / 0.15
    assert float(angle_loss(orthogonal, orthogonal, label, None)) == pytest.approx(-5.97352, abs=1e-5)
    assert float(angle_loss(antipodal, antipodal, label, None)) == pytest.approx(-12.64019, abs=1e-5)
    moved = tensor([7, -1])
    assert float(angle_loss(orthogonal + moved, orthogonal + moved, label, moved)) == pytest.approx(-5.97352, abs=1e-5)


@pytest.mark.parametrize("block", [1, 50, 2**23])
@pytest.mark.parametrize("centred", [True, False])
def test_the_angle_loss_and_its_gradients_are_those_of_whole_matrices(monkeypatch, block, centred):
    monkeypatch.setattr(losses_module, "BLOCK_FLOATS", block)
    view1, view2, label, center = tokens(60, 12, 9, dtype=torch.float64)
    center = center if centred else None
    ours, plain = ([view1.clone().requires_grad_(), view2.clone().requires_grad_()] for _ in range(2))
    loss, expected = angle_loss(*ours, label, center), plain_angle_loss(*plain, label, center)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for own, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_the_angle_loss_of_many_tokens_in_float32_is_that_of_whole_matrices():
    view1, view2, label, center = tokens(1500, 32, 200)
    ours, plain = ([view1.clone().requires_grad_(), view2.clone().requires_grad_()] for _ in range(2))
    loss, expected = angle_loss(*ours, label, center), plain_angle_loss(*plain, label, center)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for own, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-8)


def test_the_angle_loss_passes_a_gradient_check(monkeypatch):
    monkeypatch.setattr(losses_module, "BLOCK_FLOATS", 8)
    view1, view2, label, center = tokens(7, 4, 3, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda a, b: angle_loss(a, b, label, center), (view1.requires_grad_(), view2.requires_grad_())
    )


def test_the_angle_loss_is_finite_where_exponentials_overflow_or_vanish():
    view1, view2, label, _ = tokens(20, 4, 5, dtype=torch.float64)
    expected = plain_angle_loss(view1, view2, label, None, temperature=0.01)
    cold = angle_loss(view1.float(), view2.float(), label, None, temperature=0.01)
    assert float(cold) == pytest.approx(float(expected), rel=1e-4)  # exp(100) is beyond float32
    assert not math.isfinite(plain_angle_loss(view1.float(), view2.float(), label, None, temperature=0.01))
    view1 = torch.zeros(2, 3, requires_grad=True)  # tokens at the centre
    angle_loss(view1, view1, torch.tensor([0, 1]), torch.zeros(3)).backward()
    assert view1.grad.isfinite().all()


@pytest.mark.parametrize("label", [0, 1])
def test_the_angle_loss_of_a_single_label_is_zero_with_zero_gradients(label):
    view1, view2 = draw(6, 4).requires_grad_(), draw(6, 4, seed=1).requires_grad_()
    loss = angle_loss(view1, view2, torch.full((6,), label), None)
    loss.backward()
    assert loss == 0
    assert torch.equal(view1.grad, torch.zeros(6, 4))
    assert torch.equal(view2.grad, torch.zeros(6, 4))


def test_the_angle_loss_holds_no_more_than_blocks_of_similarities(monkeypatch):
    view1, view2, label, center = tokens(800, 4, 400)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(losses_module, "BLOCK_FLOATS", 10_000)
    with Watch():
        angle_loss(view1.requires_grad_(), view2, label, center).backward()
    assert largest <= 10_000  # of 800 * 800 similarities


def test_losses_are_float32_in_a_training_with_bfloat16():
    view1, view2, label, center = tokens(40, 8, 10)
    with torch.autocast("cpu", torch.bfloat16):
        inside = angle_loss(view1, view2, label, center), norm_loss(view1, label)
        coarse = angle_loss(view1.bfloat16(), view2.bfloat16(), label, center)
    assert inside[0].dtype == inside[1].dtype == coarse.dtype == torch.float32
    torch.testing.assert_close(inside, (angle_loss(view1, view2, label, center), norm_loss(view1, label)))
    torch.testing.assert_close(coarse, inside[0], rtol=0.02, atol=0.02)


# --- norm loss ------------------------------------------------------------------------------------------------------


def of_sizes(*sizes):
    """(N, 1) features of these sizes A in the root form: |e| = (A + 1)^2 - 1."""
    return (tensor(*sizes)[:, None] + 1) ** 2 - 1


def test_norm_losses_of_single_tokens_are_those_of_the_specification():
    # |e| = 3 has A = 1 and, without anomalous tokens, r_max = 0.4: exp(0.6) softplus(0.6).
    assert float(norm_loss(tensor([0, 3, 0]), torch.tensor([0]))) == pytest.approx(1.89043, abs=1e-5)
    assert float(norm_loss(of_sizes(0.1), torch.tensor([0]))) == pytest.approx(1.14557, abs=1e-5)  # r_min = 0.396
    # A = 0.3 is itself the smallest: r_max = 0.27, b = 1.02, exp(0.72) softplus(0.72).
    assert float(norm_loss(of_sizes(0.3), torch.tensor([1]))) == pytest.approx(2.29397, abs=1e-5)


def test_the_pseudo_huber_size_is_that_of_the_specification():
    # |e| = 3 has A = sqrt(10) - 1 = 2.1623.
    x = math.sqrt(10) - 1 - 0.4
    assert x + 0.4 == pytest.approx(2.1623, abs=1e-4)
    loss = norm_loss(tensor([3, 0]), torch.tensor([0]), form="pseudo_huber")
    assert float(loss) == pytest.approx(math.exp(x) * math.log1p(math.exp(x)), rel=1e-6)


def test_tokens_on_the_shell_or_far_out_cost_nothing():
    features = of_sizes(0.397, 0.399, 1.16, 5.0).requires_grad_()
    loss = norm_loss(features, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss == 0
    assert torch.equal(features.grad, torch.zeros(4, 1, dtype=torch.float64))


def test_the_weights_of_the_norm_loss_have_no_gradient():
    features = tensor([0, 3]).requires_grad_()
    norm_loss(features, torch.tensor([0])).backward()
    # d/dA of softplus alone, times the weight; dA/d|e| = 1 / (2 sqrt(|e| + 1)).
    expected = math.exp(0.6) / (1 + math.exp(-0.6)) / 4
    torch.testing.assert_close(features.grad, tensor([0, expected]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("form", ["root", "pseudo_huber"])
@pytest.mark.parametrize("anomalous", [0, 5, 30])
def test_the_norm_loss_and_its_gradients_are_those_of_one_token_at_a_time(form, anomalous):
    features, _, label, _ = tokens(30, 6, anomalous, dtype=torch.float64)
    features = features * torch.linspace(0.01, 1.5, 30)[:, None]
    ours, plain = features.clone().requires_grad_(), features.clone().requires_grad_()
    loss, expected = norm_loss(ours, label, form=form), plain_norm_loss(plain, label, form)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-8, atol=1e-10)


def test_norm_losses_of_nothing_and_of_giants_have_finite_gradients():
    features = torch.cat([torch.zeros(2, 3), torch.full((2, 3), 300.0)]).requires_grad_()
    for form in ("root", "pseudo_huber"):
        loss = norm_loss(features, torch.tensor([0, 1, 0, 1]), form=form)
        (gradient,) = torch.autograd.grad(loss, features)
        assert loss.isfinite()
        assert gradient.isfinite().all()
