"""The learning rate rises, stays or falls as its schedule says, and no update is wasted on a rate of zero."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.plan.schedules import SCHEDULES, learning_rate


@settings(deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 500), st.integers(0, 500))
def test_the_learning_rate_rises_to_its_peak_and_never_rises_again(schedule, steps, warmup):
    warmup = min(warmup, steps)
    rates = [learning_rate(2e-4, schedule, warmup, steps, step) for step in range(1, steps + 1)]
    assert all(0 < rate <= 2e-4 for rate in rates)
    rising, rest = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising) and len(set(rising)) == len(rising)
    assert rest == sorted(rest, reverse=True)
    if warmup:
        assert rising[-1] == 2e-4
    if rest:
        assert rest[0] == 2e-4


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_falling_schedule_reaches_zero_one_update_after_the_last(schedule):
    assert learning_rate(1.0, schedule, 10, 100, 101) == pytest.approx(0, abs=1e-15)
    assert 0 < learning_rate(1.0, schedule, 10, 100, 100) < 0.02


def test_warm_up_is_linear():
    assert [learning_rate(1.0, "cosine", 4, 10, step) for step in range(1, 5)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_the_rates_of_six_updates(schedule, expected):
    assert [learning_rate(1.0, schedule, 2, 6, step) for step in range(1, 7)] == pytest.approx(expected, rel=1e-15)


def test_the_peak_scales_the_rates():
    assert learning_rate(3e-4, "cosine", 2, 6, 5) == pytest.approx(3e-4 * learning_rate(1.0, "cosine", 2, 6, 5))


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_a_run_of_one_update_trains_at_the_peak(schedule):
    assert learning_rate(1e-3, schedule, 0, 1, 1) == 1e-3
    assert learning_rate(1e-3, schedule, 1, 1, 1) == 1e-3
