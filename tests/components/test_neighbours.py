import pytest
import torch

from methods.components import neighbours
from methods.components.neighbours import MemoryIndex, nearest


def plain_nearest(queries, memory_bank, k):
    """All distances by differences in float64, then a stable sort."""
    differences = queries.double()[:, None] - memory_bank.double()[None]
    distances = differences.square().sum(dim=2).sqrt()
    order = distances.argsort(dim=1, stable=True)[:, :k]
    return distances.gather(1, order), order


def features(num, width=80, seed=0, offset=0.0):
    """Points whose variance decays over the coordinates as that of patch features does."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return (torch.randn(num, width, generator=generator) * 8 / torch.arange(1, width + 1)) @ mixing + offset


def test_three_neighbours_on_a_line_by_hand():
    bank = torch.tensor([[0.0], [10.0], [3.0]])
    distances, indices = nearest(torch.tensor([[4.0], [9.0]]), bank, k=2)
    assert indices.tolist() == [[2, 0], [1, 2]]
    assert distances.tolist() == [[1.0, 4.0], [1.0, 6.0]]


@pytest.mark.parametrize("k", [1, 9])
@pytest.mark.parametrize("num_rows", [9, 63, 64, 700, 1500])
def test_agrees_with_all_differences(k, num_rows):
    queries, bank = features(400, seed=1), features(num_rows, seed=2)
    distances, indices = nearest(queries, bank, k)
    expected, expected_indices = plain_nearest(queries, bank, k)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-6, atol=0)


def test_principal_axes_are_used_and_change_nothing(monkeypatch):
    queries, bank = features(400, seed=1), features(1500, seed=2)
    index = MemoryIndex(bank)
    assert index.axes is not None
    assert index.axes.shape[1] < 40
    without = MemoryIndex(bank, num_queries=10)
    assert without.axes is None
    for ours, plain in zip(index.nearest(queries, 3), without.nearest(queries, 3), strict=True):
        assert torch.equal(ours, plain)
    shapeless = torch.randn(1500, 80, generator=torch.Generator().manual_seed(0))  # nothing to gain from axes
    assert MemoryIndex(shapeless).axes is None


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_query_in_the_bank_is_at_distance_zero(offset):
    bank = features(1200, offset=offset)
    distances, indices = nearest(bank[100:700], bank)
    assert distances.abs().max() == 0
    assert indices[:, 0].tolist() == list(range(100, 700))


def test_small_distances_far_from_the_origin_survive():
    bank = torch.tensor([[4096.0, 4096.0], [4096.0, 4097.0]])
    query = torch.tensor([[4096.0, 4096.0 + 2**-11]])  # 2^-22 of its squared norm, lost in |q|^2 + |m|^2 - 2 q.m
    distances, indices = nearest(query, bank, k=2)
    assert indices.tolist() == [[0, 1]]
    assert distances.tolist() == [[2**-11, 1 - 2**-11]]


@pytest.mark.parametrize("k", [1, 5])
def test_equal_rows_come_in_the_order_of_the_bank(k):
    bank = features(6).repeat(300, 1)
    distances, indices = nearest(features(6), bank, k)
    assert indices.tolist() == [[row + 6 * i for i in range(k)] for row in range(6)]
    assert distances.abs().max() == 0


def test_result_does_not_depend_on_the_other_queries(monkeypatch):
    queries, bank = features(130, seed=1), features(1500, seed=2)
    index = MemoryIndex(bank)
    together = index.nearest(queries, 3)
    monkeypatch.setattr(neighbours, "BLOCK_FLOATS", 1)
    alone = [index.nearest(query[None], 3) for query in queries[:20]]
    for part in range(2):
        assert torch.equal(index.nearest(queries, 3)[part], together[part])
        assert torch.equal(torch.cat([result[part] for result in alone]), together[part][:20])


def test_float64_and_half_precision():
    queries, bank = features(50, seed=1), features(300, seed=2)
    exact, _ = nearest(queries.double(), bank.double())
    torch.testing.assert_close(exact, plain_nearest(queries, bank, 1)[0], rtol=1e-14, atol=0)
    halves = nearest(queries.half(), bank.half())
    expected = plain_nearest(queries.half(), bank.half(), 1)
    assert halves[0].dtype == torch.float32
    torch.testing.assert_close(halves[0].double(), expected[0], rtol=1e-6, atol=0)


def test_reduced_precision_products_do_not_change_the_result(monkeypatch):
    queries, bank = features(100, seed=1), features(1500, seed=2)
    expected = nearest(queries, bank, 2)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    index = MemoryIndex(bank)
    assert index.bounds.dtype == torch.float64
    for ours, before in zip(index.nearest(queries, 2), expected, strict=True):
        assert torch.equal(ours, before)


def test_no_queries_give_an_empty_result():
    distances, indices = nearest(torch.zeros(0, 3), torch.zeros(4, 3), k=2)
    assert distances.shape == indices.shape == (0, 2)


@pytest.mark.parametrize(
    ("queries", "bank", "k", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 2), 1, r"queries must be \(Q, 2\)"),
        (torch.zeros(3), torch.zeros(4, 3), 1, "queries must be"),
        (torch.zeros(2, 3), torch.zeros(0, 3), 1, "memory_bank must be"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 5, r"k must be in \[1, 4\]"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 0, "k must be in"),
        (torch.full((2, 3), torch.nan), torch.zeros(4, 3), 1, "queries must be finite"),
        (torch.zeros(2, 3), torch.full((4, 3), torch.inf), 1, "memory_bank must be finite"),
    ],
)
def test_bad_input_is_named(queries, bank, k, message):
    with pytest.raises(ValueError, match=message):
        nearest(queries, bank, k)
