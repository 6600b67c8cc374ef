import pytest
import torch
from torch import nn
from two_workers import run_on_two_workers

from methods.components.collectives import SharedBatchNorm, gather_images, num_workers, sum_over_workers

NUM, WIDTH = 5, 3


def inputs(shape=()):
    generator = torch.Generator().manual_seed(0)
    return 3 + 2 * torch.randn(NUM, WIDTH, *shape, generator=generator)


def weights_of(outputs):
    """Numbers that make every output matter differently to a loss."""
    return torch.arange(1.0, outputs.numel() + 1).view_as(outputs).sin()


def two_steps(norm, values, places):
    """Outputs of the first of two steps with gradients of input and parameters, and the state after both."""
    values = values.clone().requires_grad_()
    outputs = norm(values)
    weights = weights_of(inputs(values.shape[2:]))[places]
    (outputs * weights).sum().backward()
    norm(values.detach() * 2)
    gradients = [values.grad, norm.weight.grad, norm.bias.grad]
    return outputs.detach(), gradients, norm.state_dict()


def make(kind):
    norm = kind(WIDTH)
    nn.init.uniform_(norm.weight, 0.5, 2, generator=torch.Generator().manual_seed(1))
    return norm


def work(rank):
    places = list(range(rank, NUM, 2))
    part = torch.tensor([float(rank + 1), 10.0], requires_grad=True)
    total = sum_over_workers(part)
    (total * torch.tensor([1.0, rank + 1.0])).sum().backward()
    return {
        "num_workers": num_workers(),
        "rows": two_steps(make(SharedBatchNorm), inputs()[places], places),
        "maps": two_steps(make(SharedBatchNorm), inputs((2, 3))[places], places),
        "total": total.detach(),
        "gradient": part.grad,
        "gathered": gather_images(torch.tensor(places, dtype=torch.float32)[:, None], NUM),
    }


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return run_on_two_workers(work, tmp_path_factory.mktemp("workers"))


def test_two_workers_know_of_each_other(told):
    assert [worker["num_workers"] for worker in told] == [2, 2]


@pytest.mark.parametrize(("name", "shape", "plain"), [("rows", (), nn.BatchNorm1d), ("maps", (2, 3), nn.BatchNorm2d)])
def test_batch_norm_over_two_workers_is_that_of_the_whole_batch(told, name, shape, plain):
    outputs, gradients, state = two_steps(make(plain), inputs(shape), list(range(NUM)))
    for rank, worker in enumerate(told):
        own_outputs, own_gradients, own_state = worker[name]
        torch.testing.assert_close(own_outputs, outputs[rank::2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_gradients[0], gradients[0][rank::2], rtol=1e-4, atol=1e-5)
        for key, value in state.items():
            torch.testing.assert_close(own_state[key], value, rtol=1e-5, atol=1e-5)
    for i in (1, 2):
        both = told[0][name][1][i] + told[1][name][1][i]
        torch.testing.assert_close(both, gradients[i], rtol=1e-4, atol=1e-5)


def test_a_sum_and_its_gradient_reach_every_worker(told):
    for worker in told:
        assert worker["total"].tolist() == [3, 20]
        assert worker["gradient"].tolist() == [2, 3]  # 1 + 1 and 1 + 2: what the total is worth to either loss


def test_gathered_rows_are_the_same_on_every_worker_with_nan_where_one_has_an_image_less(told):
    expected = torch.tensor([0, 2, 4, 1, 3, torch.nan])[:, None]
    for worker in told:
        torch.testing.assert_close(worker["gathered"], expected, equal_nan=True)


def test_alone_nothing_changes():
    assert num_workers() == 1
    values = inputs()
    assert sum_over_workers(values) is values
    assert torch.equal(gather_images(values, NUM), values)
    places = list(range(NUM))
    outputs, gradients, state = two_steps(make(SharedBatchNorm), values, places)
    plain_outputs, plain_gradients, plain_state = two_steps(make(nn.BatchNorm1d), values, places)
    assert torch.equal(outputs, plain_outputs)
    assert all(torch.equal(*pair) for pair in zip(gradients, plain_gradients, strict=True))
    assert all(torch.equal(state[key], plain_state[key]) for key in plain_state)


def test_gathered_values_carry_no_gradient():
    assert not gather_images(torch.ones(2, 3, requires_grad=True), 2).requires_grad


def test_a_batch_norm_in_eval_mode_asks_nobody():
    norm = make(SharedBatchNorm).eval()
    torch.testing.assert_close(norm(inputs()), inputs() * norm.weight / (1 + norm.eps) ** 0.5)


def test_a_batch_norm_refuses_what_has_no_channels():
    with pytest.raises(ValueError, match="got shape"):
        make(SharedBatchNorm)(torch.zeros(3))
