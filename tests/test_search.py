"""Distributions: what they draw, that they draw it again, and what is refused."""

import math

import numpy as np
import pytest

from harness.contracts import AdgridError
from harness.search import Distribution, SearchEntry, draw_params, parse_distribution
from harness.space import grid_points, parse_space

SHARES = np.linspace(0, math.nextafter(1, 0), 2001)
KINDS = {
    "uniform": Distribution("uniform", (0.5, 2.5)),
    "loguniform": Distribution("loguniform", (1e-6, 1e-2)),
    "quniform": Distribution("quniform", (0.05, 1.0, 0.1)),
    "randint": Distribution("randint", (3, 8)),
    "choice": Distribution("choice", ("a", [2, 3], None)),
}
SPACE = """
name: swept
methods:
  - name: patchcore
    params:
      coreset_ratio: {loguniform: [0.01, 0.25]}
      num_neighbours: {randint: [1, 9]}
backbones: [tf_efficientnet_lite0]
datasets: [generated]
search: {num_samples: 4, tune_on: {generated: [granite]}}
"""


@pytest.mark.parametrize("kind", ["uniform", "loguniform", "quniform", "randint"])
def test_values_stay_within_their_bounds_and_rise_with_the_share(kind):
    values = [KINDS[kind].at(share) for share in SHARES]
    low, high = KINDS[kind].values[:2]
    assert values == sorted(values)
    assert all(low <= value <= high for value in values)
    assert values[0] <= low + 0.06 * (high - low)


def test_each_kind_gives_its_share_of_every_region():
    draws = np.random.default_rng(0).random(20_000)
    for kind, half in (("uniform", 1.5), ("loguniform", 1e-4)):
        below = np.mean([KINDS[kind].at(share) < half for share in draws])
        assert below == pytest.approx(0.5, abs=0.02)
    for kind, expected in (("randint", {3, 4, 5, 6, 7}), ("quniform", {round(0.1 * n, 1) for n in range(1, 11)})):
        values = [KINDS[kind].at(share) for share in draws]
        assert set(values) == expected
        counts = [values.count(value) / len(draws) for value in expected]
        assert counts == pytest.approx([1 / len(expected)] * len(expected), abs=0.02)


def test_a_choice_gives_each_value_whatever_its_type():
    values = [KINDS["choice"].at(share) for share in SHARES]
    assert [values.count(value) for value in ("a", [2, 3], None)] == pytest.approx([667] * 3, abs=1)


def test_drawn_numbers_are_short():
    assert KINDS["uniform"].at(1 / 3) == 1.167
    assert KINDS["loguniform"].at(1 / 3) == 2.154e-05
    assert KINDS["quniform"].at(0.25) == 0.3  # and not 0.30000000000000004


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_survives_the_way_through_a_searcher(kind):
    distribution = KINDS[kind]
    low, high = distribution.encoded_bounds
    for share in SHARES[::100]:
        value = distribution.at(share)
        number = distribution.encode(value)
        assert low <= number <= high
        assert distribution.decode(number) == value


@pytest.mark.parametrize("kind", KINDS)
def test_probes_hold_the_ends_and_their_places_are_those_of_the_axis(kind):
    distribution = KINDS[kind]
    places = [distribution.place(value) for value in distribution.probes]
    assert min(places) == pytest.approx(0.0, abs=1e-3)
    assert max(places) == pytest.approx(1.0, abs=1e-3)


def test_draws_are_named_by_method_field_seed_and_number():
    swept = {"rate": KINDS["loguniform"], "width": KINDS["randint"]}
    first = [draw_params(swept, "padim", 0, number) for number in range(50)]
    assert first == [draw_params(swept, "padim", 0, number) for number in range(50)]
    assert len({repr(values) for values in first}) > 40
    assert first != [draw_params(swept, "padim", 1, number) for number in range(50)]
    assert first != [draw_params(swept, "patchcore", 0, number) for number in range(50)]
    alone = [draw_params({"rate": KINDS["loguniform"]}, "padim", 0, number)["rate"] for number in range(50)]
    assert alone == [values["rate"] for values in first]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"unifrom": [0, 1]}, "unknown distribution 'unifrom'; did you mean 'uniform'"),
        ({"uniform": [0, 1], "choice": [1]}, "one distribution"),
        ({"uniform": [1, 0]}, "low < high"),
        ({"uniform": [0]}, r"write {uniform: \[low, high\]}"),
        ({"uniform": [0, True]}, "takes numbers"),
        ({"uniform": [0, float("inf")]}, "finite"),
        ({"loguniform": [0, 1]}, "0 < low"),
        ({"quniform": [0, 1]}, "step"),
        ({"quniform": [0, 1, 2]}, "0 < step <= high - low"),
        ({"randint": [0.5, 3]}, "whole numbers"),
        ({"choice": []}, "at least one"),
        ({"choice": [1, 2, 1]}, "twice"),
        ({"choice": 3}, "write {choice"),
    ],
)
def test_a_wrong_distribution_is_told_with_its_remedy(value, message):
    with pytest.raises(ValueError, match=message):
        parse_distribution(value)


def test_a_distribution_stands_beside_lists_and_values():
    text = SPACE.replace("{randint: [1, 9]}", "[1, 3, {randint: [4, 9]}]").replace(
        "params:", "params:\n      reweighting: true"
    )
    points = grid_points(parse_space(text))
    assert [dict(point.params) for point in points] == [
        {"reweighting": True, "num_neighbours": 1},
        {"reweighting": True, "num_neighbours": 3},
        {"reweighting": True},
    ]
    assert [sorted(point.distributions) for point in points] == [
        ["coreset_ratio"], ["coreset_ratio"], ["coreset_ratio", "num_neighbours"]
    ]  # fmt: skip


def test_a_rule_on_a_searched_parameter_excludes_only_points_that_have_the_value():
    text = SPACE.replace("{randint: [1, 9]}", "[1, {randint: [4, 9]}]") + "exclude: [{params.num_neighbours: 1}]\n"
    assert [sorted(point.distributions) for point in grid_points(parse_space(text))] == [
        ["coreset_ratio", "num_neighbours"]
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("loguniform: [0.01, 0.25]", "loguniform: [0.01, 1.5]", ["coreset_ratio must be in (0, 1]", "line 5"]),
        ("loguniform: [0.01, 0.25]", "lognormal: [0.01, 0.25]", ["coreset_ratio", "did you mean 'loguniform'"]),
        ("{randint: [1, 9]}", "{uniform: [1, 9]}", ["num_neighbours", "integer"]),
        ("search: {", "serach: {", ["unknown key 'serach'", "did you mean 'search'"]),
        ("num_samples: 4, ", "num_sample: 4, ", ["unknown key 'num_sample'", "did you mean 'num_samples'", "line 10"]),
        ("num_samples: 4, ", "searcher: bayes, ", ["search.searcher", "'random' or 'optuna'"]),
        ("num_samples: 4, ", "scheduler: hyperband, ", ["scheduler", "'none', 'asha' or 'median'"]),
        ("num_samples: 4, ", "objective: image_auc, ", ["unknown metric 'image_auc'", "did you mean 'image_auroc'"]),
        ("{generated: [granite]}", "{genrated: [granite]}", ["unknown dataset 'genrated'", "did you mean 'generated'"]),
        ("{generated: [granite]}", "synthetik", ["synthetic"]),
        ("{generated: [granite]}", "{}", ["at least one dataset"]),
        ("{generated: [granite]}", "{generated: []}", ["at least one category"]),
        (", tune_on: {generated: [granite]}", "", ["'tune_on' is missing"]),
        ("search: {num_samples: 4, tune_on: {generated: [granite]}}", "", ["add `search:", "not to be reported"]),
    ],
)
def test_every_mistake_is_one_error_with_place_and_remedy(old, new, expected):
    with pytest.raises(AdgridError) as caught:
        parse_space(SPACE.replace(old, new), "file.yaml")
    for text in ("file.yaml", *expected):
        assert text in str(caught.value)


def test_a_search_without_anything_to_search_is_refused():
    text = SPACE.replace("{loguniform: [0.01, 0.25]}", "0.1").replace("{randint: [1, 9]}", "3")
    with pytest.raises(AdgridError, match="no method has a parameter to search"):
        parse_space(text)


def test_what_is_to_learn_from_results_runs_a_part_at_once():
    entry = SearchEntry(num_samples=20, tune_on="synthetic")
    assert entry.concurrency == 20
    assert not entry.is_adaptive
    assert entry.model_copy(update={"searcher": "optuna"}).concurrency == 5
    assert entry.model_copy(update={"searcher": "optuna", "max_concurrent": 2}).concurrency == 2
