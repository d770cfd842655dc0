"""The weights of averages, against the sums that they stand for."""

import math
import random

import pytest

from finetune.plan import averaging

# the factor of the learning rate of update i = 0 … N - 1 of a decay over N updates, written down apart from the code
CURVES = {
    "linear": lambda i, n: 1 - i / n,
    "cosine": lambda i, n: (1 + math.cos(math.pi * i / n)) / 2,
    "1-sqrt": lambda i, n: 1 - math.sqrt(i / n),
}


@pytest.mark.parametrize("shape", CURVES)
@pytest.mark.parametrize("window", [1, 2, 7, 100])
def test_the_average_of_a_window_is_the_state_that_a_decay_of_its_updates_would_have_reached(shape, window) -> None:
    draw = random.Random(window)
    states = [draw.gauss(0, 1)]
    updates = [draw.gauss(0, 1) for _ in range(window)]
    for update in updates:
        states.append(states[-1] + update)
    decayed = states[0] + sum(CURVES[shape](i, window) * update for i, update in enumerate(updates))
    weights = averaging.of_decay(shape, range(41, 41 + window), window)
    averaged = sum(weight * state for weight, state in zip(weights, states[1:], strict=True))
    assert averaged == pytest.approx(decayed, abs=1e-9) and sum(weights) == pytest.approx(1)
    assert min(weights) > 0


@pytest.mark.parametrize("shape", CURVES)
def test_the_weights_of_a_window_are_the_closed_ones_of_the_paper(shape) -> None:
    curve = [CURVES[shape](i, 6) for i in range(6)]
    closed = [curve[i] - curve[i + 1] for i in range(5)] + [curve[5]]
    assert averaging.of_decay(shape, range(1, 7), 6) == pytest.approx(closed, abs=1e-12)
    assert shape != "linear" or closed == pytest.approx([1 / 6] * 6)


def test_a_state_stands_for_the_updates_since_the_member_before_it() -> None:
    each = averaging.of_decay("cosine", range(5, 11), 6)
    seldom = averaging.of_decay("cosine", [7, 10], 6)
    assert seldom == pytest.approx([sum(each[:3]), sum(each[3:])])


def test_a_moving_average_begins_with_its_first_member() -> None:
    states = [3.0, 1.0, 4.0, 1.5]
    average = states[0]
    for state in states[1:]:
        average = 0.9 * average + 0.1 * state
    weights = averaging.of_ema(4, 0.9)
    assert sum(w * s for w, s in zip(weights, states, strict=True)) == pytest.approx(average)
    assert averaging.of_ema(1, 0.9) == [1.0]
