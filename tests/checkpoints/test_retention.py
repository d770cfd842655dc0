"""Whatever the rules, the newest, the best and the protected checkpoints stay."""

import math

from hypothesis import given
from hypothesis import strategies as st

from finetune.checkpoints import retention
from finetune.checkpoints.retention import Saved, keep
from finetune.recipe.schema import Every, Keep

losses = st.one_of(st.none(), st.floats(), st.sampled_from(["nan", "inf"]))
checkpoints = st.dictionaries(st.integers(1, 500), losses, max_size=30).map(
    lambda found: [Saved(step, {} if loss is None else {"loss": loss}) for step, loss in found.items()]
)
rules = st.builds(
    Keep,
    last=st.integers(1, 5),
    best=st.none() | st.integers(1, 5),
    every=st.none() | st.integers(1, 100).map(lambda steps: f"{steps} steps"),
)
protected_steps = st.sets(st.integers(1, 500), max_size=5)


@given(checkpoints, rules, protected_steps)
def test_the_newest_the_best_and_the_protected_stay(saved, rule, protected):
    kept = keep(saved, rule, protected)
    steps = {item.step for item in saved}
    finite = [(item.loss, -item.step) for item in saved if item.loss is not None]
    assert kept <= steps
    assert protected & steps <= kept
    assert not steps or max(steps) in kept
    assert not finite or -min(finite)[1] in kept


@given(checkpoints, rules, protected_steps)
def test_what_is_left_out_is_left_out_by_every_rule(saved, rule, protected):
    for step in {item.step for item in saved} - keep(saved, rule, protected):
        assert sum(item.step > step for item in saved) >= rule.last
        assert rule.every is None or step % rule.every.steps


@given(checkpoints, rules, protected_steps, st.randoms())
def test_the_order_of_the_list_does_not_matter_and_a_second_time_changes_nothing(saved, rule, protected, random):
    kept = keep(saved, rule, protected)
    shuffled = random.sample(saved, len(saved))
    assert keep(shuffled, rule, protected) == kept
    assert keep([item for item in saved if item.step in kept], rule, protected) == kept


def test_best_takes_the_lowest_finite_loss_and_of_equals_the_later():
    saved = [Saved(1, {"loss": 2.0}), Saved(2, {"loss": 1.0}), Saved(3, {"loss": 1.0}), Saved(4, {"loss": math.nan})]
    saved += [Saved(5, {"loss": "nan"}), Saved(6, {"loss": -math.inf}), Saved(7, {})]
    assert retention.best(saved, 1) == {3}
    assert retention.best(saved, 2) == {2, 3}
    assert retention.best(saved[4:], 3) == set()


def test_every_keeps_multiples():
    assert retention.every([Saved(step, {}) for step in range(100, 700, 100)], Every(steps=300)) == {300, 600}


def test_there_is_a_rule_for_each_key_of_the_recipe():
    assert list(retention.RULES) == list(Keep.model_fields)
