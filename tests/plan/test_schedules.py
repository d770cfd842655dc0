"""The learning rate rises, stays or falls as its schedule says, and no update is wasted on a rate of zero."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.plan.schedules import SCHEDULES, learning_rate
from finetune.recipe.schema import Optimizer, amount_of


def settings_of(schedule):
    return Optimizer(learning_rate=1.0, schedule=schedule).schedule_settings


@settings(deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 500), st.integers(0, 500))
def test_the_learning_rate_rises_to_its_peak_and_never_rises_again(schedule, steps, warmup):
    warmup = min(warmup, steps)
    rates = [
        learning_rate(2e-4, schedule, warmup, steps, step, **settings_of(schedule)) for step in range(1, steps + 1)
    ]
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
    assert learning_rate(1e-3, schedule, 0, 1, 1, **settings_of(schedule)) == 1e-3
    assert learning_rate(1e-3, schedule, 1, 1, 1, **settings_of(schedule)) == 1e-3


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("floor", [2e-5, "10%"])
def test_a_floor_is_reached_one_update_after_the_last_and_never_undercut(schedule, floor):
    least = amount_of(floor, 2e-4)
    rates = [
        learning_rate(2e-4, schedule, 10, 100, step, min_learning_rate=least, **settings_of(schedule))
        for step in range(11, 102)
    ]
    assert rates[0] == 2e-4 and rates[-1] == pytest.approx(2e-5, rel=1e-12)
    assert rates == sorted(rates, reverse=True) and min(rates) >= 2e-5 * (1 - 1e-12)


def test_the_cosine_with_a_floor_is_that_of_other_trainers():
    """`cosine_with_min_lr` of transformers, `CosineAnnealing` of NeMo."""
    for step in range(1, 51):
        theirs = 3e-5 + (2e-4 - 3e-5) * (1 + math.cos(math.pi * (step - 1) / 50)) / 2
        assert learning_rate(2e-4, "cosine", 0, 50, step, min_learning_rate=3e-5) == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("sqrt", [1.0, 1.0, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]),
    ],
)
@pytest.mark.parametrize("decay", [4, "40%"])
def test_wsd_keeps_its_peak_and_falls_in_the_last_steps(shape, expected, decay):
    rates = [learning_rate(1.0, "wsd", 2, 10, step, decay=decay, decay_shape=shape) for step in range(1, 11)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, *expected], rel=1e-12)


def test_wsd_without_a_decay_is_constant():
    assert [learning_rate(1.0, "wsd", 0, 5, step, decay=0, decay_shape="sqrt") for step in range(1, 6)] == [1.0] * 5


def test_the_inverse_square_root_does_not_know_the_length_of_the_run():
    rates = {
        steps: [learning_rate(1.0, "inverse_sqrt", 4, steps, step, timescale=None) for step in range(1, 41)]
        for steps in (40, 4000)
    }
    assert rates[40] == pytest.approx(rates[4000], rel=1e-12)
    assert rates[40][4] == 1.0 and rates[40][16] == pytest.approx(0.5), "halved after three times the warm-up"
