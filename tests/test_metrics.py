import pickle

import numpy as np
import pytest
import torch
from reference.aupro import aupro_by_counting, official_aupro
from scipy.ndimage import gaussian_filter
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

import harness.curves
import harness.metrics
from harness.metrics import METRICS, TOLERANCE, MetricError, PixelMetrics, image_metrics, label_regions

NAMES = tuple(name for name, info in METRICS.items() if info.kind == "pixel")
ROUNDING = 1e-11


def exact_values(maps, masks, limit=0.3):
    return ranked_values(maps.ravel(), np.asarray(masks).ravel()) | {"aupro": official_aupro(maps, masks, limit)}


def ranked_values(scores, truth, prefix="pixel"):
    precision, recall, _ = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    values = {"auroc": roc_auc_score(truth, scores), "ap": average_precision_score(truth, scores), "f1_max": f1.max()}
    return {f"{prefix}_{name}": float(value) for name, value in values.items()}


def smooth_case(num_images=6, size=64, seed=0):
    """Smooth maps whose defects stand out a little; one image in three is normal."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((num_images, size, size), dtype=np.uint8)
    for index in range(num_images):
        for _ in range(index % 3):
            y, x, height, width = rng.integers(2, size // 2, 4)
            masks[index, y : y + height // 2 + 1, x : x + width // 2 + 1] = 1
    noise = rng.standard_normal(masks.shape) + masks * rng.uniform(0.2, 1.5, (num_images, 1, 1))
    return (2 + gaussian_filter(noise, (0, 2, 2))).astype(np.float32), masks


def next_floats(start, steps):
    """The float32 number that is so many representable numbers above `start`."""
    return (np.float32(start).view(np.int32) + np.asarray(steps, dtype=np.int32)).view(np.float32)


CASES = {
    "smooth": lambda maps, masks, rng: maps,
    "negative": lambda maps, masks, rng: maps - 2.2,
    "all negative": lambda maps, masks, rng: maps - 9,
    "ties": lambda maps, masks, rng: np.round(maps, 1),
    "few values and both zeros": lambda maps, masks, rng: (
        np.copysign(np.round(maps - 2), rng.uniform(-1, 1, maps.shape)) * (maps > 2.5)
    ),
    "tiny": lambda maps, masks, rng: maps * 1e-30,
    "denormal": lambda maps, masks, rng: (maps * 1e5).astype(np.int32).view(np.float32),
    "huge range": lambda maps, masks, rng: np.exp(40 * (maps - 2)),
    "float16": lambda maps, masks, rng: maps.astype(np.float16),
    "uint8": lambda maps, masks, rng: (maps * 60).astype(np.uint8),
    "16 bit levels": lambda maps, masks, rng: (maps * 16000).astype(np.uint16) / np.float32(65535),
    "all in one bin": lambda maps, masks, rng: next_floats(1.0, (maps * 1000).astype(np.int32) % 4096),
    "two scores in one bin": lambda maps, masks, rng: next_floats(1.0, maps > 2),
    "defects above in one bin": lambda maps, masks, rng: next_floats(
        1.0, masks + rng.integers(0, 2, masks.shape) * masks
    ),
    "defects below in one bin": lambda maps, masks, rng: next_floats(1.0, 5 - masks.astype(np.int32)),
    "two bins": lambda maps, masks, rng: next_floats(1.0, 4096 - 500 + (maps * 300).astype(np.int32)),
    "negative bin": lambda maps, masks, rng: -next_floats(1.0, (maps * 1000).astype(np.int32) % 4096),
    "constant": lambda maps, masks, rng: np.full_like(maps, 0.7),
}


def as_case(kind):
    maps, masks = smooth_case()
    return CASES[kind](maps, masks, np.random.default_rng(1)).astype(np.float32), masks


def count(maps, masks, batch=2, **settings):
    metrics = PixelMetrics(**settings)
    for start in range(0, len(maps), batch):
        metrics.update(maps[start : start + batch], masks[start : start + batch])
    return metrics


def assert_within_bounds(values, exact):
    assert set(values) == {*NAMES, *(f"{name}_bound" for name in NAMES)}
    for name in NAMES:
        assert abs(values[name] - exact[name]) <= values[f"{name}_bound"] + ROUNDING, name


# --- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_image_metrics_equal_scikit_learn_with_and_without_ties(seed):
    rng = np.random.default_rng(seed)
    label = np.concatenate([[0, 1], rng.integers(0, 2, 40)])
    for score in (rng.standard_normal(42), rng.integers(0, 5, 42).astype(np.float32), np.zeros(42)):
        assert image_metrics(score, label) == pytest.approx(ranked_values(score, label, "image"), abs=1e-12)


def test_image_metrics_by_hand():
    values = image_metrics(torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1, 0, 1, 0]))
    # Pairs in order: 3 of 4. Precision 1/1 at the first defect and 2/3 at the second. Best F1 2 * 2 / (3 + 2).
    assert values == pytest.approx({"image_auroc": 0.75, "image_ap": (1 + 2 / 3) / 2, "image_f1_max": 0.8})


def test_image_scores_keep_their_precision():
    score = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert image_metrics(score, torch.tensor([0, 1]))["image_auroc"] == 1
    assert image_metrics(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([0, 1]))["image_auroc"] == 1


def test_image_metrics_of_a_perfect_and_a_reversed_ranking():
    label = np.array([0, 0, 1, 1])
    assert image_metrics(np.arange(4.0), label) == {"image_auroc": 1, "image_ap": 1, "image_f1_max": 1}
    assert image_metrics(-np.arange(4.0), label)["image_auroc"] == 0


@pytest.mark.parametrize(
    ("score", "label", "message"),
    [
        ([1.0, 2.0], [1, 1], "no normal image: 0 normal, 2 anomalous"),
        ([1.0, 2.0], [0, 0], "no anomalous image: 2 normal, 0 anomalous"),
        ([], [], "no normal and no anomalous image"),
        ([1.0, np.nan, np.inf], [0, 1, 1], r"2 of 3 image score values are NaN or infinite, the first at index \(1,\)"),
        ([1.0, 2.0], [0, 2], r"0 \(normal\) or 1 \(anomalous\), got \[0, 2\]"),
        ([1.0, 2.0], [0, 1, 1], r"\(N,\)"),
        ([[1.0, 2.0]], [[0, 1]], r"\(N,\)"),
    ],
)
def test_bad_image_scores_are_refused_with_the_reason(score, label, message):
    with pytest.raises(MetricError, match=message):
        image_metrics(np.array(score), np.array(label))


# --- regions -------------------------------------------------------------------------------------------------------


def test_regions_that_touch_at_a_corner_are_one():
    mask = np.array([[255, 0, 0, 0], [0, 255, 0, 7], [0, 0, 0, 7]], dtype=np.uint8)
    labels, areas = label_regions(mask)
    assert labels.dtype == np.int32
    assert labels.tolist() == [[1, 0, 0, 0], [0, 1, 0, 2], [0, 0, 0, 2]]
    assert areas.tolist() == [2, 2]


def test_a_normal_mask_has_no_region():
    labels, areas = label_regions(torch.zeros(3, 4))
    assert labels.shape == (3, 4)
    assert areas.shape == (0,)


def test_cached_regions_give_the_same_numbers():
    maps, masks = smooth_case()
    regions = np.stack([label_regions(mask)[0] for mask in masks])
    cached = PixelMetrics()
    cached.update(maps, masks, regions)
    assert cached.compute() == count(maps, masks, batch=6).compute()


# --- pixels: values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
def test_pixel_metrics_are_within_their_bounds_and_replay_makes_them_small(kind):
    maps, masks = as_case(kind)
    exact = exact_values(maps, masks)
    metrics = count(maps, masks)
    assert_within_bounds(metrics.compute(), exact)
    values = metrics.compute(replay=lambda: [(maps[3:], masks[3:]), (maps[:3], masks[:3])])
    assert max(values[f"{name}_bound"] for name in NAMES) <= TOLERANCE
    assert_within_bounds(values, exact)


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.3, 1.0])
def test_aupro_holds_at_every_limit(limit):
    maps, masks = smooth_case(seed=3)
    metrics = count(maps, masks, aupro_limit=limit)
    exact = exact_values(maps, masks, limit)
    assert_within_bounds(metrics.compute(), exact)
    assert metrics.compute(replay=lambda: [(maps, masks)])["aupro"] == pytest.approx(exact["aupro"], abs=TOLERANCE)


def test_bounds_hold_for_every_kind_of_order_inside_a_bin():
    """Many tiny cases of a few scores that share two bins, so that nearly all of the order is unknown at first."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        masks = rng.random((1, 3, 4)) < rng.uniform(0.1, 0.9)
        masks[0, 0, :2] = 0, 1
        steps = rng.choice([3, 3, 40, 500, 4000], masks.shape) + 4096 * rng.integers(0, 2, masks.shape)
        maps = next_floats(3.0, steps + rng.integers(0, 2) * rng.integers(0, 90, masks.shape))
        limit = rng.choice([0.05, 0.3, 0.7, 1.0])
        exact = ranked_values(maps.ravel(), masks.ravel()) | {"aupro": aupro_by_counting(maps, masks, limit)}
        metrics = count(maps, masks, aupro_limit=limit)
        assert_within_bounds(metrics.compute(), exact)
        values = metrics.compute(replay=lambda maps=maps, masks=masks: [(maps, masks)])
        assert {name: values[name] for name in NAMES} == pytest.approx(exact, abs=TOLERANCE)


def test_both_references_of_aupro_agree():
    maps, masks = as_case("ties")
    maps, masks = maps[:, ::3, ::3], masks[:, ::3, ::3]
    assert official_aupro(maps, masks, 0.3) == pytest.approx(aupro_by_counting(maps, masks, 0.3), abs=1e-12)


def test_aupro_by_hand():
    # Two pixels of one region above 0.5 and none of the normal ones: overlap 1/2 at rate 0. Past the normal 0.8 it is
    # 1 at rate 1/4. So the area up to 0.3 is 1/4 * 3/4 + 0.05 * 1.
    maps = np.array([[0.9, 0.5, 0.0], [0.8, 0.4, 0.3]])[:, [0, 1, 0, 1, 2, 2]][[0, 0, 1, 1, 1, 0], range(6)]
    masks = np.array([1, 1, 0, 0, 0, 0])
    values = count(maps.reshape(1, 1, 6), masks.reshape(1, 1, 6)).compute()
    assert values["aupro"] == pytest.approx((0.25 * 0.75 + 0.05) / 0.3)


def test_every_region_weighs_the_same():
    maps, masks = np.zeros((1, 10, 10)), np.zeros((1, 10, 10))
    masks[0, :5, :5], masks[0, 9, 9] = 1, 1
    maps[0, 9, 9] = 1  # the small region alone is found: half the regions, then a straight line to (1, 1)
    assert count(maps, masks).compute()["aupro"] == pytest.approx((0.5 + 0.5 + 0.5 * 0.3) / 2)


def test_a_perfect_map_scores_one():
    _, masks = smooth_case()
    values = count(masks.astype(np.float32), masks).compute()
    assert {name: values[name] for name in NAMES} == pytest.approx(dict.fromkeys(NAMES, 1.0), abs=1e-12)


def test_a_constant_map_scores_chance():
    maps, masks = as_case("constant")
    values = count(maps, masks).compute(replay=lambda: [(maps, masks)])
    share = masks.mean()
    chance = {"pixel_auroc": 0.5, "pixel_ap": share, "pixel_f1_max": 2 * share / (1 + share), "aupro": 0.15}
    assert {name: values[name] for name in NAMES} == pytest.approx(chance)


def test_a_random_map_has_an_aupro_of_half_the_limit():
    _, masks = smooth_case(num_images=40)
    maps = np.random.default_rng(0).random(masks.shape, dtype=np.float32)
    assert count(maps, masks).compute()["aupro"] == pytest.approx(0.15, abs=0.01)


def test_a_strictly_increasing_change_of_scores_leaves_every_metric_as_it_is():
    maps, masks = smooth_case()
    maps = np.round(maps, 3)  # far enough apart to stay distinct
    before, after = (
        count(scores, masks).compute(replay=lambda scores=scores: [(scores, masks)])
        for scores in (maps, np.exp(3 * maps.astype(np.float64)))
    )
    for name in NAMES:
        assert before[name] == pytest.approx(after[name], abs=2 * TOLERANCE)


def test_both_zeros_are_one_score():
    mask = np.array([[0, 1, 0, 1]])
    values = count(np.array([[[-0.0, 0.0, 0.0, -0.0]]]), mask[None]).compute(
        replay=lambda: [(np.array([[-0.0, 0.0, 0.0, -0.0]]), mask)]
    )
    assert values["pixel_auroc"] == 0.5


# --- pixels: batches, workers, passes ------------------------------------------------------------------------------


def test_batches_workers_and_order_change_nothing():
    maps, masks = smooth_case(num_images=9)
    whole = count(maps, masks, batch=9).compute(replay=lambda: [(maps, masks)])
    backwards = count(maps[::-1], masks[::-1], batch=1)
    first, second = count(maps[:4], masks[:4], batch=3), count(maps[4:], masks[4:], batch=4)
    merged = pickle.loads(pickle.dumps(second)).merge(pickle.loads(pickle.dumps(first)))
    for metrics in (backwards, merged):
        values = metrics.compute(replay=lambda: zip(maps, masks, strict=True))
        assert values == pytest.approx(whole, abs=1e-12)


def test_workers_refine_their_own_maps_together():
    maps, masks = smooth_case(num_images=6)
    merged = count(maps[:2], masks[:2]).merge(count(maps[2:], masks[2:]))
    plan = merged.plan_refinement()
    parts = [pickle.loads(pickle.dumps(plan)) for _ in range(2)]
    parts[0].update(maps[:2], masks[:2])
    parts[1].update(maps[2:], masks[2:])
    merged.refine(parts[1].merge(pickle.loads(pickle.dumps(parts[0]))))
    assert merged.plan_refinement() is None
    assert merged.compute() == count(maps, masks).compute(replay=lambda: [(maps, masks)])


def test_one_replay_is_enough_for_smooth_maps_and_none_is_made_where_nothing_is_unsure():
    calls = []

    def replay():
        calls.append(1)
        return [(maps, masks)]

    maps, masks = smooth_case()
    count(maps, masks).compute(replay)
    assert len(calls) == 1
    maps = maps.astype(np.float16)
    values = count(maps, masks).compute(replay)
    assert len(calls) == 1
    assert all(values[f"{name}_bound"] == 0 for name in NAMES)


def test_little_memory_means_more_replays_and_the_same_numbers(monkeypatch):
    maps, masks = smooth_case(num_images=3, size=32)
    calls = []
    monkeypatch.setattr(harness.metrics, "_MAX_SLOTS", 4096)
    values = count(maps, masks).compute(replay=lambda: calls.append(1) or [(maps, masks)])
    assert len(calls) > 1
    assert max(values[f"{name}_bound"] for name in NAMES) <= TOLERANCE
    assert_within_bounds(values, exact_values(maps, masks))


def test_it_does_not_matter_how_many_intervals_are_computed_at_once(monkeypatch):
    maps, masks = smooth_case()
    expected = count(maps, masks).compute(replay=lambda: [(maps, masks)])
    monkeypatch.setattr(harness.curves, "_BLOCK", 37)
    assert count(maps, masks).compute(replay=lambda: [(maps, masks)]) == pytest.approx(expected, abs=1e-12)


def test_an_update_after_a_replay_counts_again():
    maps, masks = smooth_case()
    metrics = count(maps[:4], masks[:4])
    metrics.compute(replay=lambda: [(maps[:4], masks[:4])])
    metrics.update(maps[4:], masks[4:])
    assert metrics.compute() == count(maps, masks).compute()


def test_state_does_not_grow_with_the_number_of_images():
    maps, masks = smooth_case(num_images=3, size=32)
    few, many = PixelMetrics(), PixelMetrics()
    few.update(maps, masks)
    for _ in range(30):
        many.update(maps, masks)
    assert len(pickle.dumps(many)) < len(pickle.dumps(few)) + 100
    assert len(pickle.dumps(few)) < 100_000
    assert many.compute()["pixel_auroc"] == pytest.approx(few.compute()["pixel_auroc"])  # whatever the number of copies


def test_counts_widen_before_they_overflow():
    maps, masks = smooth_case()
    metrics = count(maps[:2], masks[:2])
    metrics._histogram.num_pixels += 2**32 - 10_000
    assert metrics._histogram.pixels.dtype == np.uint32
    other = pickle.loads(pickle.dumps(count(maps[4:], masks[4:])))
    metrics.update(maps[2:4], masks[2:4])
    metrics = pickle.loads(pickle.dumps(metrics))
    assert metrics._histogram.pixels.dtype == np.uint64
    assert metrics.merge(other).compute() == pytest.approx(count(maps, masks).compute(), abs=1e-12)


def test_tensors_of_any_kind_count_as_arrays_do():
    maps, masks = smooth_case()
    expected = count(maps, masks).compute()
    for mask in (torch.from_numpy(masks), torch.from_numpy(masks).bool(), torch.from_numpy(masks).float() * 255):
        assert count(torch.from_numpy(maps).requires_grad_(), mask).compute() == expected
    assert count(maps.astype(np.float64), masks.astype(bool)).compute() == expected
    half = torch.from_numpy(maps).bfloat16()
    assert count(half, masks).compute() == count(half.float(), masks).compute()


# --- pixels: bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e300])
def test_scores_that_are_not_finite_are_refused_with_count_and_place(wrong):
    maps, masks = smooth_case()
    maps = maps.astype(np.float64)
    maps[1, 2, 3] = maps[5, 0, 0] = wrong
    with pytest.raises(MetricError, match=r"2 of 24576 anomaly map values .* first at index \(1, 2, 3\)"):
        PixelMetrics().update(maps, masks)
    with pytest.raises(MetricError, match=r"first at index \(1, 2, 3\)"):
        PixelMetrics().update(-maps, masks)


def test_the_largest_finite_scores_are_accepted():
    largest = np.finfo(np.float32).max
    metrics = PixelMetrics()
    metrics.update(np.array([[-largest, largest]]), np.array([[0, 1]]))
    assert metrics.compute()["pixel_auroc"] == 1


def test_a_missing_class_is_named():
    maps, masks = smooth_case()
    with pytest.raises(MetricError, match="no defective pixel: 24576 normal, 0 defective"):
        count(maps, np.zeros_like(masks)).compute()
    with pytest.raises(MetricError, match="no normal pixel: 0 normal, 24576 defective"):
        count(maps, np.ones_like(masks)).compute()
    with pytest.raises(MetricError, match="no normal and no defective pixel"):
        PixelMetrics().compute()


def test_wrong_shapes_regions_and_limits_are_refused():
    maps, masks = smooth_case()
    with pytest.raises(MetricError, match=r"\(B, H, W\) or \(H, W\), got \(6, 64, 64\) and \(5, 64, 64\)"):
        PixelMetrics().update(maps, masks[:5])
    with pytest.raises(MetricError, match=r"\(B, H, W\) or \(H, W\)"):
        PixelMetrics().update(maps[None], masks[None])
    with pytest.raises(MetricError, match="shape of the mask"):
        PixelMetrics().update(maps, masks, masks[:1])
    with pytest.raises(MetricError, match="disagree"):
        PixelMetrics().update(maps, masks, np.zeros_like(masks))
    for limit in (0, 1.1, float("nan")):
        with pytest.raises(MetricError, match="aupro_limit"):
            PixelMetrics(aupro_limit=limit)
    with pytest.raises(MetricError, match="limits"):
        PixelMetrics(0.3).merge(PixelMetrics(0.05))


def test_a_replay_of_other_pixels_is_refused():
    maps, masks = smooth_case()
    metrics = count(maps, masks)
    for replay in ([(maps[1:], masks[1:])], [(maps + 0.01, masks)], [(maps, masks[::-1])]):
        with pytest.raises(MetricError, match="replay"):
            metrics.compute(replay=lambda replay=replay: replay)


def test_refinements_of_different_plans_do_not_mix():
    plans = [count(*smooth_case(seed=seed)).plan_refinement() for seed in range(2)]
    with pytest.raises(MetricError, match="different plans"):
        plans[0].merge(plans[1])


def test_every_metric_has_a_title_and_a_definition():
    assert [info.kind for info in METRICS.values()] == ["image"] * 3 + ["sample"] + ["pixel"] * 4
    assert all(info.title and info.definition for info in METRICS.values())
