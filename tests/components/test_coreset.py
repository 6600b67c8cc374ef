import numpy as np
import pytest
import torch
from reference.coreset import plain_coreset

from methods.components import coreset
from methods.components.coreset import CoresetCache, draw_projection, extend_coreset, greedy_coreset, random_projection


def clustered(num=3000, width=12, seed=0, offset=0.0):
    """Points like patch features: clusters of different spread, few directions that matter, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    centres = 8 * torch.randn(10, width, generator=generator)
    spread = torch.rand(10, 1, generator=generator) + 0.05
    which = torch.randint(10, (num,), generator=generator)
    scale = torch.linspace(1, 0.05, width)
    return centres[which] * scale + spread[which] * torch.randn(num, width, generator=generator) * scale + offset


@pytest.fixture
def small_rounds(monkeypatch):
    """Rounds so small that the lazy bookkeeping matters at the size of a test."""
    monkeypatch.setattr(coreset, "CANDIDATE_FLOATS", 0)
    monkeypatch.setattr(coreset, "SMALLEST_ROUND", 40)
    monkeypatch.setattr(coreset, "SCREEN_FLOATS", 2**12)


def test_four_points_on_a_line_by_hand():
    line = torch.tensor([[0.0], [1.0], [10.0], [4.0]])
    assert greedy_coreset(line, 4).tolist() == [0, 2, 3, 1]  # farthest of 0 is 10, then 4 (4 from 0), then 1


def test_ties_go_to_the_lowest_index(small_rounds):
    square = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0], [1.0, 1.0]])
    assert greedy_coreset(square, 5, start=4).tolist() == [4, 0, 1, 2, 3]
    grid = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0)) + 1000
    assert greedy_coreset(grid, 200).tolist() == plain_coreset(grid, 200).tolist()


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("start", [0, 1234, [3, 77, 2000]])
def test_lazy_choices_are_those_of_the_plain_loop(small_rounds, start, offset):
    points = clustered(offset=offset)
    start = torch.tensor(start) if isinstance(start, list) else start
    assert greedy_coreset(points, 900, start=start).tolist() == plain_coreset(points, 900, start=start).tolist()


def test_one_large_round_makes_the_same_choices():
    points = clustered()
    assert greedy_coreset(points, 300).tolist() == plain_coreset(points, 300).tolist()


def test_float64_features_are_told_apart_beyond_float32():
    points = torch.tensor([[0.0], [1.0 + 1e-12], [1.0]], dtype=torch.float64).repeat(1, 2)
    assert greedy_coreset(points[[0, 2, 1]], 2).tolist() == [0, 2]
    assert greedy_coreset(points, 2).tolist() == [0, 1]


def test_reduced_precision_products_do_not_change_the_choices(small_rounds, monkeypatch):
    points = clustered(1000)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    assert greedy_coreset(points, 300).tolist() == plain_coreset(points, 300).tolist()


def test_half_precision_features_and_a_numpy_start():
    points = clustered(300).half()
    assert greedy_coreset(points, 50, start=np.int64(3)).tolist() == plain_coreset(points, 50, start=3).tolist()


def test_order_is_nested(small_rounds):
    points = clustered(1000)
    order = greedy_coreset(points, 400)
    for num in (1, 7, 150):
        assert torch.equal(greedy_coreset(points, num), order[:num])


def test_more_centres_than_distinct_points_repeats_no_index(small_rounds):
    points = clustered(5).repeat(40, 1)
    order = greedy_coreset(points, 200)
    assert sorted(order.tolist()) == list(range(200))
    assert order.tolist() == plain_coreset(points, 200).tolist()


def test_a_selection_can_be_continued(small_rounds):
    points = clustered(1000)
    state = extend_coreset(points, 100, 5)
    assert torch.equal(extend_coreset(points, 300, 5, state).order, greedy_coreset(points, 300, 5))
    assert extend_coreset(points, 50, 5, state) is state


def test_cache_pays_for_the_largest_ratio_alone():
    points, others = clustered(800), clustered(800, seed=1)
    cache = CoresetCache(capacity=2)
    for num in (8, 200, 80):
        assert torch.equal(cache.select(points, num), greedy_coreset(points, num))
    assert cache.num_chosen == 200
    cache.select(points, 10, start=3)  # another start and other features are other selections
    cache.select(others, 10)
    assert cache.num_chosen == 220
    cache.select(points, 200)  # was dropped: two newer ones fill the cache
    assert cache.num_chosen == 420


def test_progress_counts_up_to_the_number_asked_for(small_rounds):
    calls = []
    greedy_coreset(clustered(500), 100, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (100, 100)
    assert calls == sorted(calls)
    assert len(calls) > 2


@pytest.mark.parametrize(
    ("features", "num", "start", "message"),
    [
        (torch.zeros(3, 2), 0, 0, "num must be in"),
        (torch.zeros(3, 2), 4, 0, "num must be in"),
        (torch.zeros(3, 2), 1, 3, "start must be indices"),
        (torch.zeros(3), 1, 0, "features must be"),
        (torch.tensor([[0.0], [torch.nan]]), 1, 0, "finite"),
    ],
)
def test_bad_input_is_named(features, num, start, message):
    with pytest.raises(ValueError, match=message):
        greedy_coreset(features, num, start)


def test_projection_keeps_distances_on_average_and_is_drawn_by_the_generator():
    points = clustered(200, width=64)
    first, second = (random_projection(points, 32, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (200, 32)
    assert torch.equal(first, second)
    ratio = torch.pdist(first) / torch.pdist(points)  # weights have variance 1 / (3 D): sqrt(32 / (3 * 64)) = 0.41
    assert ratio.mean() == pytest.approx((32 / 192) ** 0.5, rel=0.15)
    assert draw_projection(64, 32, torch.Generator()).abs().max() <= 1 / 8


@pytest.mark.parametrize("dim", [None, 12, 20])
def test_projection_to_as_many_dimensions_is_left_out(dim):
    points = clustered(10)
    assert random_projection(points, dim, torch.Generator()) is points
