import numpy as np
import pytest
from scipy.stats import friedmanchisquare, wilcoxon

from harness.ranks import average_ranks, critical_difference


@pytest.mark.parametrize(
    ("number", "quantile"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (10, 3.164)]
)
def test_critical_differences_are_those_of_the_published_table(number, quantile):
    # Demšar (2006), table 5a, alpha = 0.05.
    assert critical_difference(number, 30) == pytest.approx(quantile * np.sqrt(number * (number + 1) / 180), rel=5e-4)


def test_the_example_of_the_paper():
    # Demšar (2006), section 3.2.2: four algorithms on 14 data sets, average ranks 3.143, 2.000, 2.893, 1.964.
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
    assert critical_difference(4, 14, 0.90) == pytest.approx(1.12, abs=0.005)


def test_ranks_are_averaged_and_ties_shared():
    found = average_ranks(["a", "b", "c"], np.array([[0.9, 0.8, 0.7], [0.9, 0.9, 0.7], [0.5, 0.6, 0.7]]))
    assert found.names == ("a", "b", "c")
    assert found.ranks == pytest.approx(((1 + 1.5 + 3) / 3, (2 + 1.5 + 2) / 3, (3 + 3 + 1) / 3))
    assert found.num_tests == 3


def test_tests_of_all_alike_are_friedman_and_wilcoxon():
    values = np.random.default_rng(0).random((12, 3))
    assert average_ranks("abc", values).p_value == pytest.approx(friedmanchisquare(*values.T).pvalue)
    two = average_ranks("ab", values[:, :2])
    assert two.p_value == pytest.approx(wilcoxon(values[:, 0], values[:, 1]).pvalue)
    assert average_ranks("abc", np.full((5, 3), 0.9)).p_value == 1.0


def test_groups_are_the_longest_runs_within_the_critical_difference():
    rank = np.array([[4, 3, 2, 1]] * 40)
    apart = average_ranks("abcd", rank.astype(float))
    assert apart.critical_difference < 1
    assert apart.groups == []
    close = average_ranks("abcd", rank[:6].astype(float))
    assert 1 < close.critical_difference < 2
    assert close.groups == [(0, 1), (1, 2), (2, 3)]
    assert average_ranks("abc", np.full((5, 3), 0.9)).groups == [(0, 2)]
