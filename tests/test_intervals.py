import numpy as np
import pytest
from reference.delong import delong_by_pairs
from scipy.stats import false_discovery_control, norm, ttest_1samp, ttest_ind, ttest_rel

from harness.intervals import (
    IMAGE_METRICS,
    Estimate,
    add_variances,
    bootstrap,
    delong,
    difference_over_seeds,
    holm,
    mean_over_seeds,
    placements,
    weighted_metric,
)
from harness.metrics import image_metrics

DIFFERENCE = np.array([1.0, -1.0])


def draw(generator, num_anomalous, num_normal, shifts, correlation=0.5):
    """Scores of several detectors on the same images: normal, anomalous ones shifted, correlated between detectors."""
    label = np.repeat([1, 0], [num_anomalous, num_normal])
    shared = generator.normal(size=label.size)
    own = generator.normal(size=(len(shifts), label.size))
    scores = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
    return scores + np.outer(shifts, label), label


def area(shift):
    return norm.cdf(shift / np.sqrt(2))


# --- DeLong ---


def test_delong_of_a_case_computed_by_hand():
    # Anomalous 4, 2 and normal 3, 1. First detector: 4 beats both, 2 beats one: AUROC 3/4.
    # Second: 4 and 3 beat 2 and 1: AUROC 1. Differences per anomalous image 0, -1/2: variance 1/8, over 2 images 1/16;
    # per normal image (3: beaten by 4 alone) -1/2, 0: the same. Sum 1/8.
    scores = np.array([[4.0, 2.0, 3.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    label = np.array([1, 1, 0, 0])
    beats, beaten = placements(scores, label)
    assert beats.tolist() == [[1.0, 0.5], [1.0, 1.0]]
    assert beaten.tolist() == [[0.5, 1.0], [1.0, 1.0]]
    found = delong(scores, label, DIFFERENCE)
    assert (found.value, found.variance) == (-0.25, 0.125)
    assert found.dof == pytest.approx((1 / 8) ** 2 / (2 * (1 / 16) ** 2))


@pytest.mark.parametrize("seed", range(4))
def test_delong_equals_the_definition_with_ties_and_any_weights(seed):
    generator = np.random.default_rng(seed)
    scores, label = draw(generator, 17, 9, [0.5, 1.0, 2.0])
    scores, weights = np.round(scores, 1), generator.normal(size=3)
    order = generator.permutation(label.size)
    found = delong(scores[:, order], label[order], weights)
    value, variance = delong_by_pairs(scores, label, weights)
    assert found.value == pytest.approx(value)
    assert found.variance == pytest.approx(variance)
    assert found.value == pytest.approx(
        sum(w * image_metrics(s, label)["image_auroc"] for w, s in zip(weights, scores, strict=True))
    )


def test_identical_scores_differ_by_nothing_with_certainty():
    scores, label = draw(np.random.default_rng(0), 20, 20, [1.0])
    for estimate in (
        delong(np.vstack([scores, 3 * scores + 1]), label, DIFFERENCE),
        bootstrap("image_ap", np.vstack([scores, scores]), label, DIFFERENCE, 0),
    ):
        assert (estimate.value, estimate.variance, estimate.p_value()) == (0.0, 0.0, 1.0)
        assert estimate.interval() == (0.0, 0.0)


def test_images_that_show_no_chance_prove_nothing():
    # One perfect detector and one that is always wrong, on two images each: a difference of 1, and no idea how sure.
    scores, label = np.array([[2.0, 2.0, 1.0, 1.0], [1.0, 1.0, 2.0, 2.0]]), np.array([1, 1, 0, 0])
    found = delong(scores, label, DIFFERENCE)
    assert (found.value, found.variance, found.p_value(), found.interval()) == (1.0, None, None, None)
    few = delong(scores[:, 1:], label[1:], DIFFERENCE)
    assert (few.value, few.variance) == (1.0, None)


@pytest.mark.parametrize(
    ("num_anomalous", "num_normal", "shifts"),
    [(60, 60, (1.2, 1.2)), (60, 20, (1.2, 1.8)), (80, 60, (2.0, 1.0)), (15, 15, (1.0, 1.0))],
)
def test_the_interval_of_delong_covers_the_truth(num_anomalous, num_normal, shifts):
    generator = np.random.default_rng(1)
    truth = area(shifts[0]) - area(shifts[1])
    covered = 0
    for _ in range(1500):
        low, high = delong(*draw(generator, num_anomalous, num_normal, shifts), DIFFERENCE).interval()
        covered += low <= truth <= high
    assert 0.93 <= covered / 1500 <= 0.97


def test_the_interval_of_the_bootstrap_covers_the_truth():
    generator = np.random.default_rng(2)
    truth, covered = area(1.6) - area(1.0), 0
    for trial in range(400):
        scores, label = draw(generator, 60, 50, (1.6, 1.0))
        low, high = bootstrap("image_auroc", scores, label, DIFFERENCE, trial, 200).interval()
        covered += low <= truth <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_the_interval_over_images_and_seeds_covers_the_truth():
    # Every seed is a detector of its own quality, and new images are drawn: both chances at once.
    generator = np.random.default_rng(3)
    truth = np.mean([area(shift) for shift in generator.normal(1.5, 0.3, 20000)])
    truth -= np.mean([area(shift) for shift in generator.normal(1.0, 0.3, 20000)])
    covered = {"both": 0, "images": 0}
    weights = np.repeat([0.25, -0.25], 4)
    for _ in range(500):
        shifts = np.concatenate([generator.normal(1.5, 0.3, 4), generator.normal(1.0, 0.3, 4)])
        scores, label = draw(generator, 60, 40, shifts)
        over_images = delong(scores, label, weights)
        areas = placements(scores, label)[0].mean(axis=1)
        over_seeds = difference_over_seeds(areas[:4], areas[4:])
        for name, estimate in (
            ("both", add_variances(over_images.value, (over_images, over_seeds))),
            ("images", over_images),
        ):
            low, high = estimate.interval()
            covered[name] += low <= truth <= high
    # What images and seeds share counts twice, so it may be a little wide; without seeds it is far too narrow.
    assert 0.93 <= covered["both"] / 500 <= 0.98
    assert covered["images"] / 500 < 0.9


# --- the bootstrap ---


@pytest.mark.parametrize("metric", IMAGE_METRICS)
def test_weighted_metrics_are_those_of_repeated_images(metric):
    generator = np.random.default_rng(4)
    scores, label = draw(generator, 12, 9, [1.0])
    scores = np.round(scores[0], 1)
    counts = generator.integers(0, 4, size=(20, label.size))
    found = weighted_metric(metric, scores, label, counts.T.astype(np.float32))
    for row, value in zip(counts, found, strict=True):
        expected = image_metrics(np.repeat(scores, row), np.repeat(label, row))[metric]
        assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", IMAGE_METRICS)
def test_the_bootstrap_agrees_with_resampling_by_hand(metric):
    scores, label = draw(np.random.default_rng(5), 30, 20, (1.5, 1.0))
    found = bootstrap(metric, scores, label, DIFFERENCE, 0, 2000)
    generator = np.random.default_rng(6)
    values = []
    for _ in range(800):
        chosen = np.concatenate(
            [generator.choice(np.flatnonzero(label == name), sum(label == name)) for name in (0, 1)]
        )
        first, second = (image_metrics(row[chosen], label[chosen])[metric] for row in scores)
        values.append(first - second)
    assert found.value == pytest.approx(
        image_metrics(scores[0], label)[metric] - image_metrics(scores[1], label)[metric]
    )
    assert found.variance == pytest.approx(np.var(values), rel=0.15)
    assert bootstrap(metric, scores, label, DIFFERENCE, 0, 2000) == found
    assert bootstrap(metric, scores, label, DIFFERENCE, 1, 2000) != found


def test_the_bootstrap_agrees_with_delong():
    scores, label = draw(np.random.default_rng(7), 80, 60, (1.5, 1.0))
    found = bootstrap("image_auroc", scores, label, DIFFERENCE, 0, 4000)
    assert found.variance == pytest.approx(delong(scores, label, DIFFERENCE).variance, rel=0.1)


# --- seeds ---


def test_seeds_are_tested_as_student_and_welch_do():
    first, second = [0.91, 0.94, 0.90, 0.95], [0.90, 0.91, 0.90, 0.93]
    paired = mean_over_seeds(np.subtract(first, second).tolist())
    assert paired.p_value() == pytest.approx(ttest_rel(first, second).pvalue)
    assert paired.interval() == pytest.approx(tuple(ttest_1samp(np.subtract(first, second), 0).confidence_interval()))
    welch = difference_over_seeds(first, second[:3])
    expected = ttest_ind(first, second[:3], equal_var=False)
    assert welch.p_value() == pytest.approx(expected.pvalue)
    assert welch.interval(0.9) == pytest.approx(tuple(expected.confidence_interval(0.9)))


def test_seeds_that_change_nothing_and_single_seeds_tell_nothing():
    assert mean_over_seeds([0.02]) == Estimate(0.02)
    assert mean_over_seeds([0.02, 0.02]) == Estimate(0.02)
    assert mean_over_seeds([0.0, 0.0]).p_value() == 1.0
    assert difference_over_seeds([0.9, 0.8], [0.7]).variance is None
    assert difference_over_seeds([0.9, 0.9], [0.7, 0.7]).variance is None
    assert difference_over_seeds([0.9, 0.9], [0.7, 0.8]).variance == pytest.approx(0.0025)


def test_variances_add_up_with_the_degrees_of_freedom_of_satterthwaite():
    found = add_variances(0.1, (Estimate(0.1, 2.0, 4), Estimate(0.1, 1.0, 8), Estimate(0.1)))
    assert (found.variance, found.dof) == (3.0, pytest.approx(9 / (4 / 4 + 1 / 8)))
    assert add_variances(0.1, (Estimate(0.1),)).variance is None


# --- many at once ---


def test_holm_of_a_case_computed_by_hand():
    assert holm([0.04, None, 0.01, 0.03]) == [pytest.approx(0.06), None, pytest.approx(0.03), pytest.approx(0.06)]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_lies_between_bonferroni_and_benjamini_hochberg():
    p_values = np.random.default_rng(8).random(50) ** 3
    adjusted = np.array(holm(p_values.tolist()))
    assert (adjusted <= np.minimum(1, 50 * p_values) + 1e-12).all()
    assert (adjusted >= false_discovery_control(p_values) - 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p_values)]) >= 0).all()
