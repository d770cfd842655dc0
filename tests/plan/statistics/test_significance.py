"""Tests are exact where they say so, and equal those of scipy 1.17 (reference values)."""

import itertools

import numpy as np
import pytest

from finetune.plan.statistics import power, significance, student
from finetune.plan.statistics.sample import Sample


@pytest.mark.parametrize(
    ("won", "lost", "expected"),
    [(0, 0, 1), (5, 0, 0.0625), (8, 2, 0.109375), (40, 25, 0.0816815), (700, 800, 0.0105593), (3, 3, 1)],
)
def test_mcnemar_is_the_exact_test(won, lost, expected):
    assert significance.mcnemar(won, lost) == pytest.approx(expected, rel=1e-5)
    assert significance.mcnemar(lost, won) == significance.mcnemar(won, lost)


def test_few_signs_are_flipped_in_every_way():
    sums = np.array([0.68, 0.283, 1.916, -0.363, 1.346, -0.344, -0.661, -0.41, -0.89, 0.446, 1.331, 0.464])
    assert significance.sign_flips(sums[None])[0] == pytest.approx(0.24169921875)
    brute = [
        abs(np.dot(signs, sums[:6])) >= abs(sums[:6].sum()) - 1e-12 for signs in itertools.product((-1, 1), repeat=6)
    ]
    assert significance.sign_flips(sums[None, :6])[0] == np.mean(brute)


def test_random_flips_say_what_students_t_says_of_normal_differences():
    random = np.random.default_rng(1)
    differences = Sample(random.normal(0.1, 1, (3, 400)), np.ones(400))
    flipped = significance.p_values(differences)
    t = differences.values / differences.errors
    assert flipped == pytest.approx([2 * student.upper_tail(abs(each), 399) for each in t], abs=0.01)
    assert significance.p_values(differences).tolist() == flipped.tolist()


def test_many_rows_have_students_t():
    random = np.random.default_rng(1)
    sums = random.normal(0, 1, (2, 1001))
    sums = (sums - sums.mean(axis=1, keepdims=True)) / sums.std(axis=1, keepdims=True)
    sums[1] += 2 / np.sqrt(1001)
    found = significance.p_values(Sample(sums, np.ones(1001)))
    assert found[0] == pytest.approx(1, abs=1e-6)
    assert found[1] == pytest.approx(0.0455, abs=0.001)


def test_equal_models_have_a_p_value_of_one():
    for units in (6, 500, 5000):
        weights = np.full(units, 2.0)
        assert significance.p_values(Sample(np.zeros((1, units)), weights)).tolist() == [1.0]


def test_holm_is_the_step_down_of_bonferroni():
    found = significance.holm(np.array([0.04, 0.01, 0.03, 0.5]))
    assert found.tolist() == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert significance.holm(np.array([0.9, 0.8])).tolist() == [1, 1]
    assert significance.holm(np.zeros(0)).tolist() == []


def test_a_difference_is_within_a_margin_when_both_sides_are():
    differences = Sample(np.tile([0.1, -0.1], 50)[None], np.ones(100))
    inside, outside = (significance.within(differences, differences.errors, margin)[0] for margin in (0.02, 0.0101))
    assert outside > 0.05 > inside


def test_the_smallest_difference_is_found_four_times_out_of_five():
    smallest = power.smallest(0.01, 199)
    assert smallest / 0.01 == pytest.approx(1.972 + 0.843, abs=0.005)  # the quantiles of Student's t
    random = np.random.default_rng(3)
    drawn = Sample(smallest + 0.01 * np.sqrt(200) * random.normal(size=(300, 200)), np.ones(200))
    found = np.abs(drawn.values / drawn.errors) > 1.972
    assert found.mean() == pytest.approx(0.8, abs=0.05)
    assert smallest < power.smallest(0.01, 199, comparisons=3) < power.smallest(0.01, 19, comparisons=3)


def test_the_error_of_a_spread_is_that_of_rows_which_vary_so_much():
    random = np.random.default_rng(2)
    tokens = np.ceil(random.lognormal(3.5, 0.8, 400))
    measured = [Sample((tokens * random.normal(0, 0.1, 400))[None], tokens).errors[0] for _ in range(50)]
    assert np.mean(measured) == pytest.approx(power.error_of(0.1, tokens), rel=0.03)
    assert power.spread_of(power.error_of(0.1, tokens), tokens) == pytest.approx(0.1)
