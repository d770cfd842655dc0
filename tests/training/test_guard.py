"""A spike is told from noise by the last steps alone."""

import math
import random

from finetune.training.guard import ENOUGH, LIMIT, WINDOW, spike


def noise(count, centre=2.0, deviation=0.1, seed=0):
    chance = random.Random(seed)
    return [chance.gauss(centre, deviation) for _ in range(count)]


def test_gaussian_noise_is_never_a_spike():
    values = noise(5000)
    assert all(spike(values[:index], values[index]) is None for index in range(len(values)))


def test_a_value_far_above_is_a_spike_and_its_distance_is_in_deviations():
    distance = spike(noise(WINDOW), 4.0)
    assert 15 < distance < 27  # 20 deviations above the centre


def test_a_value_far_below_is_no_spike():
    assert spike(noise(WINDOW), 0.0) is None


def test_nothing_is_a_spike_before_enough_steps():
    assert spike(noise(ENOUGH - 1), 1e9) is None
    assert spike(noise(ENOUGH), 1e9) > LIMIT
    assert spike([], 1.0) is None


def test_only_the_window_counts():
    history = [100.0] * 1000 + noise(WINDOW)
    assert spike(history, 4.0) == spike(history[-WINDOW:], 4.0) is not None


def test_a_few_spikes_in_the_window_do_not_hide_the_next():
    history = noise(WINDOW)
    history[::10] = [50.0] * len(history[::10])
    assert spike(history, 4.0) is not None


def test_a_very_quiet_stretch_does_not_turn_small_changes_into_spikes():
    assert spike([2.0] * WINDOW, 2.3) is None
    assert spike([2.0] * WINDOW, 2.4) > LIMIT


def test_a_stretch_of_zeros_is_left_with_a_finite_distance():
    assert spike([0.0] * WINDOW, 0.0) is None
    assert math.isfinite(spike([0.0] * WINDOW, 1.0))
