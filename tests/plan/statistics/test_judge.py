"""Verdicts: what differs is found, what is equal is not called different, and what cannot be told is not told."""

import numpy as np
import pytest

from finetune.plan.statistics import choice
from finetune.plan.statistics.judge import judge
from finetune.plan.statistics.sample import Sample


def losses(*shifts: float, rows: int = 300, noise: float = 0.1) -> Sample:
    """Models on the same rows: a loss a token that differs from row to row, a shift, and noise of each model's own."""
    random = np.random.default_rng(5)
    tokens = random.integers(5, 80, rows).astype(float)
    of_rows = random.gamma(4, 0.5, rows)
    each = [tokens * (of_rows + shift + noise * random.normal(size=rows)) for shift in shifts]
    return Sample(np.array(each), tokens)


def test_a_lower_loss_is_better_and_a_higher_one_worse():
    judged = judge(losses(0, -0.05, 0.05, 0.001))
    assert [pair.verdict for pair in judged.pairs] == ["better", "worse", "not distinguishable"]
    assert judged.best(0, "lower") == 1
    for pair in judged.pairs:
        assert pair.at_once[0] < pair.interval[0] < pair.difference < pair.interval[1] < pair.at_once[1]
        assert pair.p_value <= pair.corrected
    assert judged.pairs[0].won > judged.pairs[0].lost


def test_the_direction_of_a_measure_turns_the_verdict():
    judged = judge(losses(0, -0.05, 0.05), better="higher")
    assert [pair.verdict for pair in judged.pairs] == ["worse", "better"]
    assert judged.best(0, "higher") == 2


def test_within_a_stated_margin_models_are_equivalent():
    sample = losses(0, -0.002, 0.2)
    assert [pair.verdict for pair in judge(sample, margin=0.05).pairs] == ["equivalent", "worse"]
    assert [pair.verdict for pair in judge(sample, margin=1e-6).pairs] == ["not distinguishable", "worse"]


def test_any_model_can_be_the_baseline():
    judged = judge(losses(0, -0.05, 0.05), baseline=2)
    assert [(pair.model, pair.verdict) for pair in judged.pairs] == [(0, "better"), (1, "better")]
    assert judged.best(2, "lower") == 1


def test_fewer_than_six_rows_have_no_verdict():
    sample = losses(0, -1, rows=5)
    (pair,) = judge(sample).pairs
    assert (pair.verdict, pair.interval, pair.smallest) == (None, None, None)
    assert judge(sample).best(0, "lower") == 0
    assert judge(losses(0, -1, rows=6)).pairs[0].verdict == "better"


def test_a_model_is_not_distinguishable_from_itself():
    sample = losses(0, 0, noise=0)
    (pair,) = judge(sample).pairs
    assert (pair.difference, pair.verdict, pair.smallest, pair.interval) == (0, "not distinguishable", None, (0, 0))


def test_one_model_alone_has_a_value_and_an_interval():
    judged = judge(losses(0))
    assert judged.pairs == [] and judged.best(0, "lower") == 0
    assert judged.figures[0].interval[0] < judged.figures[0].value < judged.figures[0].interval[1]


def test_right_and_wrong_rows_are_compared_by_those_that_only_one_has_right():
    right = np.ones((3, 100))
    right[0, :30] = right[1, :10] = right[2, 5:35] = 0
    judged = judge(Sample(right, np.ones(100)), better="higher")
    assert [(pair.won, pair.lost, pair.verdict) for pair in judged.pairs] == [
        (20, 0, "better"),
        (5, 5, "not distinguishable"),
    ]
    assert judged.pairs[1].smallest == pytest.approx(0.1, abs=0.05)


def test_the_leaders_are_those_that_are_not_worse_than_the_best():
    assert choice.leaders(losses(0.5, 0.1, 0, 0.001, 0.0005, 0.2)) == [2, 3, 4]
    assert choice.leaders(losses(0.5, 0.4, 0.3)) == [2]
    assert choice.leaders(losses(0.5, 0.4, 0.3), "higher") == [0]
    assert choice.leaders(Sample(np.zeros((1, 3)), np.ones(3))) == [0]


def test_with_too_few_rows_nothing_is_called_worse():
    weights = np.ones(5)
    assert not choice.is_worse(weights * 9, weights, weights, candidates=2)
    assert choice.is_worse(np.ones(6) * 9, np.ones(6), np.ones(6), candidates=2)
