"""Intervals equal those of scipy 1.17 (reference values), and closed forms hold where a bootstrap has nothing to draw."""

import numpy as np
import pytest

from finetune.plan.statistics import intervals, student
from finetune.plan.statistics.sample import Sample, grouped


@pytest.mark.parametrize(
    ("freedom", "quantiles", "tails"),
    [
        (5, [0.267181, 0.919544, 2.01505, 2.57058, 5.89343], [0.319149, 0.0509697, 0.00516171]),
        (9, [0.260955, 0.883404, 1.83311, 2.26216, 4.29681], [0.314536, 0.0382764, 0.00155521]),
        (49, [0.254727, 0.849018, 1.67655, 2.00958, 3.26508], [0.309657, 0.0255296, 0.00010674]),
        (999, [0.253415, 0.841981, 1.64638, 1.96234, 3.09841], [0.308593, 0.0228853, 3.40074e-05]),
    ],
)
def test_students_t_is_that_of_scipy(freedom, quantiles, tails):
    found = [student.quantile(level, freedom) for level in (0.6, 0.8, 0.95, 0.975, 0.999)]
    assert found == pytest.approx(quantiles, rel=0.02)
    assert [student.upper_tail(t, freedom) for t in (0.5, 2, 4)] == pytest.approx(tails, rel=0.06)
    assert student.quantile(0.025, freedom) == pytest.approx(-student.quantile(0.975, freedom))
    assert student.upper_tail(-1.0, freedom) == pytest.approx(1 - student.upper_tail(1.0, freedom))


def test_a_quantile_is_the_inverse_of_the_tail():
    for level in (0.5, 0.7, 0.99, 1 - 1e-6):
        assert student.upper_tail(student.quantile(level, 7), 7) == pytest.approx(1 - level)
    assert student.upper_tail(float("inf"), 7) == 0


def _bca(sums: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    sample = Sample(sums[None], weights.astype(float))
    low, high = intervals.bca(sample, intervals.deviations(sample))[0]
    return low, high


def test_the_bootstrap_is_that_of_scipy_a_little_wider():
    random = np.random.default_rng(3)
    exponential = random.exponential(size=40)
    weights = random.integers(1, 40, 60)
    ratio = weights * random.gamma(2, size=60)
    for sums, over, (low, high) in (
        (exponential, np.ones(40), (0.685868, 1.202364)),
        (ratio, weights, (1.804581, 2.779913)),
    ):
        found_low, found_high = _bca(sums, over)
        width = high - low
        assert -0.005 * width < low - found_low < 0.08 * width
        assert -0.005 * width < found_high - high < 0.2 * width


def test_the_same_rows_have_the_same_interval_whatever_their_scale():
    random = np.random.default_rng(0)
    sums = random.gamma(2, size=50)
    assert _bca(sums, np.ones(50)) == _bca(sums, np.ones(50))
    assert np.allclose(np.multiply(_bca(sums, np.ones(50)), 1e30), _bca(sums * 1e30, np.ones(50)), rtol=1e-4)
    assert np.allclose(np.add(_bca(sums, np.ones(50)), 1e6), _bca(sums + 1e6, np.ones(50)), rtol=1e-9)


def test_bundles_of_many_rows_give_the_interval_of_all_rows():
    random = np.random.default_rng(0)
    weights = random.integers(1, 100, 20_000).astype(float)
    sample = Sample((weights * random.normal(2, 0.5, 20_000))[None], weights)
    (low, high), (error,) = intervals.bca(sample, intervals.deviations(sample))[0], sample.errors
    assert low == pytest.approx(sample.values[0] - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(sample.values[0] + 1.96 * error, abs=0.1 * error)


def test_shares_have_the_intervals_of_wilson():
    right = np.zeros((2, 200))
    right[0, :37] = 1
    assert np.allclose(intervals.of_shares(Sample(right, np.ones(200)))[0], (0.137302, 0.244571), atol=1e-6)
    assert np.allclose(intervals.of_shares(Sample(np.zeros((1, 20)), np.ones(20))), [(0, 0.161125)], atol=1e-6)


def test_shares_that_differ_in_no_row_have_an_interval_all_the_same():
    (low, high) = intervals.of_share_differences(Sample(np.zeros((1, 50)), np.ones(50)))[0]
    assert low == pytest.approx(-high)
    assert 0.04 < high < 0.06


def test_a_cluster_counts_as_one_unit():
    random = np.random.default_rng(0)
    weights, each = np.ones(100), random.normal(size=100)
    doubled = grouped(np.repeat(each, 10)[None], np.ones(1000), np.repeat(np.arange(100), 10))
    alone = Sample(each[None], weights)
    assert doubled.values == pytest.approx(alone.values)
    assert doubled.errors == pytest.approx(alone.errors)
    assert (doubled.units, doubled.weights.sum()) == (100, 1000)


def test_errors_are_those_of_the_jackknife():
    random = np.random.default_rng(4)
    weights = random.integers(1, 50, 30).astype(float)
    sums = weights * random.gamma(2, size=30)
    sample = Sample(sums[None], weights)
    left = [np.delete(sums, unit).sum() / np.delete(weights, unit).sum() for unit in range(30)]
    assert sample.errors[0] == pytest.approx(np.sqrt(29 * np.var(left)))
    assert sample.without[0] == pytest.approx(np.mean(left) - left)


def test_a_few_units_that_make_the_error_leave_few_degrees_of_freedom():
    even, odd = np.random.default_rng(0).normal(size=(1, 400)), np.zeros((1, 400))
    odd[0, :4] = (9, -9, 8, -8)
    assert Sample(even, np.ones(400)).freedom[0] > 300
    assert Sample(odd, np.ones(400)).freedom[0] < 10
    assert Sample(np.zeros((1, 9)), np.ones(9)).freedom.tolist() == [8]
