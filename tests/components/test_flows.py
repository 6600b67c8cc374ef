import math

import pytest
import torch

from methods.components.flows import ConditionalFlow, CouplingBlock, draw_rotation


def random_flow(width, condition_width=3, num_blocks=3, seed=0):
    """A float64 flow far from its start: no weight is zero, no scale one."""
    generator = torch.Generator().manual_seed(seed)
    flow = ConditionalFlow(width, condition_width, num_blocks, 1.9, generator).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return flow


def random_rows(num, width, seed=1):
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("width", [2, 5, 8])
def test_log_determinant_is_that_of_the_jacobian(width):
    flow, vectors, conditions = random_flow(width), random_rows(4, width), random_rows(4, 3, seed=2)
    _, log_determinant = flow(vectors, conditions)
    for row in range(4):
        condition = conditions[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v, c=condition: flow(v[None], c)[0][0], vectors[row])
        torch.testing.assert_close(log_determinant[row], torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [2, 5, 8])
def test_walking_the_blocks_backwards_restores_the_vectors(width):
    flow, vectors, conditions = random_flow(width), random_rows(6, width), random_rows(6, 3, seed=2)
    latent, _ = flow(vectors, conditions)
    for block in reversed(flow.blocks):
        scale = torch.log1p((block.global_scale / 2).exp()) / 0.5 * 0.1
        latent = (latent @ block.rotation.T - block.global_offset) / scale
        kept, changed = latent[:, : block.num_kept], latent[:, block.num_kept :]
        log_scale, shift = (0.1 * block.subnet(torch.cat([kept, conditions], dim=1))).chunk(2, dim=1)
        latent = torch.cat([kept, (changed - shift) / (1.9 * log_scale.tanh()).exp()], dim=1)
    torch.testing.assert_close(latent, vectors, rtol=1e-4, atol=1e-4)  # rotations are float32


def test_the_density_integrates_to_one():
    flow = random_flow(2)
    axis = torch.linspace(-40, 40, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    condition = random_rows(1, 3, seed=2).expand(len(grid), -1)
    with torch.no_grad():
        mass = flow.log_likelihood(grid, condition).exp().sum() * 0.1**2
    assert mass == pytest.approx(1, abs=1e-3)


def test_a_flow_whose_subnets_say_nothing_is_a_standard_normal():
    flow = ConditionalFlow(5, 3, 4, 1.9, torch.Generator().manual_seed(0))
    for block in flow.blocks:
        torch.nn.init.zeros_(block.subnet[2].weight)
        torch.nn.init.zeros_(block.subnet[2].bias)
    vectors = torch.tensor([[0.0, 0, 0, 0, 0], [1.0, 2, 0, -2, 4]])
    expected = [-2.5 * math.log(2 * math.pi), -12.5 - 2.5 * math.log(2 * math.pi)]  # squares sum up to 25
    assert flow.log_likelihood(vectors, torch.ones(2, 3)).tolist() == pytest.approx(expected, abs=1e-4)


def test_one_coupling_by_hand():
    block = CouplingBlock(2, 1, clamp=1.9, generator=torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(block.subnet[2].weight)
    block.subnet[2].bias.data = torch.tensor([5.0, 30.0])  # a tenth of it: log scale 1.9 tanh(0.5), shift 3
    block.global_scale.data = torch.tensor([0.0, 2.0])
    block.global_offset.data = torch.tensor([7.0, -1.0])
    block.rotation = torch.eye(2)
    vectors, log_determinant = block(torch.tensor([[4.0, 2.0]]), torch.zeros(1, 1))
    log_scale = 1.9 * math.tanh(0.5)
    scales = [0.1 * 2 * math.log(1 + math.exp(a / 2)) for a in (0, 2)]
    assert vectors[0].tolist() == pytest.approx(
        [4 * scales[0] + 7, (2 * math.exp(log_scale) + 3) * scales[1] - 1], rel=1e-5
    )
    assert log_determinant.item() == pytest.approx(log_scale + math.log(scales[0]) + math.log(scales[1]), rel=1e-5)


def test_the_condition_matters():
    flow, vectors = random_flow(4), random_rows(3, 4)
    first = flow.log_likelihood(vectors, torch.zeros(3, 3, dtype=torch.float64))
    second = flow.log_likelihood(vectors, torch.ones(3, 3, dtype=torch.float64))
    assert (first - second).abs().min() > 1e-3


def test_an_empty_share_has_a_loss_and_gradients():
    flow = ConditionalFlow(4, 3, 2, 1.9, torch.Generator().manual_seed(0))
    flow.log_likelihood(torch.zeros(0, 4), torch.zeros(0, 3)).sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in flow.parameters())


def test_lower_precision_stays_in_the_subnets():
    flow = ConditionalFlow(64, 16, 8, 1.9, torch.Generator().manual_seed(0))
    vectors, conditions = random_rows(20, 64).float(), random_rows(20, 16, seed=2).float()
    exact = flow.log_likelihood(vectors, conditions)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = flow.log_likelihood(vectors, conditions)
    assert coarse.dtype == torch.float32
    assert not torch.equal(coarse, exact)
    torch.testing.assert_close(coarse, exact, rtol=1e-3, atol=0)


def test_rotations_keep_lengths_and_are_drawn_anew():
    generator = torch.Generator().manual_seed(0)
    first, second = draw_rotation(7, generator), draw_rotation(7, generator)
    torch.testing.assert_close(first @ first.T, torch.eye(7))
    assert (first - second).abs().max() > 0.1
    assert torch.equal(first, draw_rotation(7, torch.Generator().manual_seed(0)))


def test_rotations_are_uniform():
    # Of a Haar matrix every entry has mean 0 and variance 1/D, and so has the sum of the diagonal variance 1.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_rotation(3, generator) for _ in range(3000)])
    torch.testing.assert_close(drawn.mean(dim=0), torch.zeros(3, 3), rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.square().mean(dim=0), torch.full((3, 3), 1 / 3), rtol=0, atol=0.03)
    assert drawn.diagonal(dim1=1, dim2=2).sum(dim=1).square().mean() == pytest.approx(1, abs=0.1)
