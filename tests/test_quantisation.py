"""Maps in three bytes a value: how close they come back, and what the rounding may do to metrics."""

import dataclasses
import itertools

import numpy as np
import pytest

from harness.metrics import PixelMetrics, image_metrics, image_ranges
from harness.quantisation import MapError, quantise


def random_maps(kind, seed=0):
    maps = np.random.default_rng(seed).normal(3.0, 1.0, (6, 12, 10))
    made = {
        "distances": np.abs(maps),
        "shifted": maps + 1e5,
        "negative": -np.exp(maps) * 1e3,
        "sigmoid": 1 / (1 + np.exp(-8 * (maps - 5))),
        "tiny": maps * 1e-30,
    }
    return made[kind].astype(np.float32)


@pytest.mark.parametrize("kind", ["distances", "shifted", "negative", "sigmoid", "tiny"])
def test_maps_come_back_within_the_stated_error(kind):
    maps = random_maps(kind)
    back = quantise(maps)
    restored, error = back.restored.astype(np.float64), back.error
    allowed = error.relative * (restored - error.offset) + error.absolute
    assert (np.abs(restored - maps.astype(np.float64)) <= allowed).all()
    assert error.relative < 2.5e-6
    assert back.nbytes == 3 * maps.size


def test_a_map_keeps_what_is_small_beside_its_largest_value():
    values = np.geomspace(1e-6, 1.0, 200, dtype=np.float32).reshape(1, 10, 20)
    np.testing.assert_allclose(quantise(values).restored, values, rtol=1e-5, atol=1e-11)


def test_flat_maps_come_back_exactly():
    back = quantise(np.full((2, 3, 3), 0.1, np.float32))
    assert (back.restored == np.float32(0.1)).all()
    assert (back.error.relative, back.error.absolute) == (0.0, 0.0)


def test_a_map_that_is_not_finite_stays_so():
    maps = np.ones((2, 3, 3), np.float32)
    maps[1, 2, 2] = np.inf
    assert not np.isfinite(quantise(maps).restored).any()


def test_rounding_twice_adds_the_errors():
    first, second = MapError(1.0, 0.1, 0.2), MapError(2.0, 0.01, 0.02)
    # value 3 may stand for at most 3 + 0.01 * (3 - 2) + 0.02, and that for 0.1 * (that - 1) + 0.2 more
    most = 3.03 + 0.1 * 2.03 + 0.2
    both = first.followed_by(second)
    assert 3 + both.relative * (3 - both.offset) + both.absolute >= most


# --- what the error may do ---


def test_ranges_by_hand():
    # Scores 0 (normal), 2 (anomalous), 3 (normal), 10 (anomalous); the middle two may change places.
    label, score = np.array([0, 1, 0, 1]), np.array([0.0, 2.0, 3.0, 10.0])
    ranges = image_ranges(score, label, MapError(absolute=0.6))
    assert ranges["image_auroc"] == (0.75, 1.0)
    assert ranges["image_f1_max"] == (0.8, 1.0)
    assert ranges["image_ap"] == pytest.approx((5 / 6, 1.0))
    exact = image_metrics(score, label)
    for name, (low, high) in image_ranges(score, label, MapError(absolute=0.4)).items():
        assert (low, high) == pytest.approx((exact[name], exact[name]))


def moves(error, score, label, generator):
    """Scores as far away as the error allows: the worst for either side, and many at random."""
    reach = error.relative * (score - error.offset) + error.absolute
    for direction in itertools.chain(
        (np.where(label == 1, 1, -1), np.where(label == 1, -1, 1)),
        (generator.uniform(-1, 1, score.shape) for _ in range(30)),
        (generator.choice([-1, 0, 1], score.shape) for _ in range(30)),
    ):
        yield score + reach * direction * (1 - 1e-6)


@pytest.mark.parametrize("error", [MapError(0.0, 0.03, 0.0), MapError(-1.0, 0.0, 0.05), MapError(-2.0, 0.01, 0.01)])
def test_no_scores_within_the_error_leave_the_range_of_an_image_metric(error):
    generator = np.random.default_rng(1)
    for case in range(5):
        label = np.repeat([1, 0], [15, 25])
        score = np.abs(generator.normal(2.0, 0.5, 40) + label).round(1 + case % 3)  # some of them equal
        ranges = image_ranges(score, label, error)
        for moved in moves(error, score, label, generator):
            for name, value in image_metrics(moved, label).items():
                low, high = ranges[name]
                assert low - 1e-12 <= value <= high + 1e-12, (name, case)
        assert ranges["image_auroc"][1] - ranges["image_auroc"][0] < 0.3


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("decimals", [1, 2, 5])
def test_no_maps_within_the_error_leave_the_range_of_a_pixel_metric(limit, decimals):
    generator = np.random.default_rng(2)
    mask = np.zeros((4, 16, 16), bool)
    mask[0, 2:5, 3:9] = mask[1, 10:14, 8:12] = mask[1, 0:2, 0:2] = True
    score = (generator.normal(2.0, 0.4, mask.shape) + mask).round(decimals).astype(np.float32)
    error = MapError(0.0, 0.005, 0.002)

    def measure(maps):
        metrics = PixelMetrics(limit)
        metrics.update(maps, mask)
        values = metrics.compute(replay=lambda: [(maps, mask)])
        return metrics, values

    metrics, values = measure(score)
    ranges = metrics.ranges(error)
    for moved in moves(error, score.astype(np.float64), mask, generator):
        changed = measure(moved.astype(np.float32))[1]
        for name, (low, high) in ranges.items():
            assert low - 2e-6 <= changed[name] <= high + 2e-6, name
    for name, (low, high) in ranges.items():
        assert low <= values[name] + 1e-6
        assert values[name] - 1e-6 <= high
        assert high - low < 0.25, name


def test_without_an_error_the_range_is_what_bins_leave_open():
    generator = np.random.default_rng(3)
    mask = generator.random((2, 40, 40)) < 0.1
    maps = (generator.integers(0, 200, mask.shape) + 20 * mask).astype(np.float32)
    metrics = PixelMetrics()
    metrics.update(maps, mask)
    values = metrics.compute()
    for name, (low, high) in metrics.ranges(MapError()).items():
        assert low <= values[name] <= high
        # Equal scores, and there are many here, might be any close ones.
        assert high - low < (0.15 if name != "pixel_ap" else 0.3)


def test_a_wider_error_gives_a_wider_range():
    generator = np.random.default_rng(4)
    label = generator.integers(0, 2, 60)
    score = generator.normal(size=60) + label
    narrow = image_ranges(score, label, MapError(-10.0, 0.0, 0.01))
    wide = image_ranges(score, label, dataclasses.replace(MapError(-10.0, 0.0, 0.01), relative=0.02))
    for name, (low, high) in narrow.items():
        assert wide[name][0] <= low <= high <= wide[name][1]
