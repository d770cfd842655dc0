"""Whatever the rules, the newest, the best and the protected checkpoints stay."""

import math

from hypothesis import given
from hypothesis import strategies as st

from finetune.plan import retention
from finetune.plan.retention import Saved, keep
from finetune.recipe.schema import Every, Keep

losses = st.one_of(st.none(), st.floats(), st.sampled_from(["nan", "inf"]))
checkpoints = st.dictionaries(st.integers(1, 500), st.tuples(losses, st.booleans()), max_size=30).map(
    lambda found: [
        Saved(step, {} if loss is None else {"loss": loss}, is_full) for step, (loss, is_full) in found.items()
    ]
)
cadences = st.none() | st.integers(1, 100).map(lambda steps: f"{steps} steps")
rules = st.builds(
    Keep, last=st.integers(1, 5), best=st.none() | st.integers(1, 5), every=cadences, weights_every=cadences
)
protected_steps = st.sets(st.integers(1, 500), max_size=5)


@given(checkpoints, rules, protected_steps)
def test_the_newest_the_best_and_the_protected_stay(saved, rule, protected):
    kept = keep(saved, rule, protected)
    steps, full = {item.step for item in saved}, {item.step for item in saved if item.is_full}
    finite = [(item.figure, -item.step) for item in saved if item.figure is not None]
    assert kept.full | kept.weights <= steps
    assert kept.full <= full and not kept.full & kept.weights
    assert protected & steps <= kept.full | kept.weights
    assert not full or max(full) in kept.full
    assert not finite or -min(finite)[1] in kept.full | kept.weights


@given(checkpoints, rules, protected_steps)
def test_what_could_be_resumed_from_stays_so_where_a_rule_about_full_ones_names_it(saved, rule, protected):
    kept = keep(saved, rule, protected)
    for item in saved:
        if item.is_full and (item.step in protected or (rule.every and item.step % rule.every.steps == 0)):
            assert item.step in kept.full


@given(checkpoints, rules, protected_steps)
def test_what_is_left_out_is_left_out_by_every_rule(saved, rule, protected):
    kept = keep(saved, rule, protected)
    for step in {item.step for item in saved} - kept.full - kept.weights:
        is_full = next(item.is_full for item in saved if item.step == step)
        assert not is_full or sum(item.step > step for item in saved if item.is_full) >= rule.last
        for cadence in (rule.every, rule.weights_every):
            assert cadence is None or step % cadence.steps


@given(checkpoints, rules, protected_steps, st.randoms())
def test_the_order_of_the_list_does_not_matter_and_a_second_time_changes_nothing(saved, rule, protected, random):
    kept = keep(saved, rule, protected)
    assert keep(random.sample(saved, len(saved)), rule, protected) == kept
    left = [
        Saved(item.step, item.metrics, item.step in kept.full)
        for item in saved
        if item.step in kept.full | kept.weights
    ]
    assert keep(left, rule, protected) == kept


def test_best_takes_the_lowest_finite_loss_and_of_equals_the_later():
    saved = [Saved(1, {"loss": 2.0}), Saved(2, {"loss": 1.0}), Saved(3, {"loss": 1.0}), Saved(4, {"loss": math.nan})]
    saved += [Saved(5, {"loss": "nan"}), Saved(6, {"loss": -math.inf}), Saved(7, {})]
    assert retention.best(saved, 1) == {3}
    assert retention.best(saved, 2) == {2, 3}
    assert retention.best(saved[4:], 3) == set()


def test_every_keeps_multiples():
    assert retention.every([Saved(step, {}) for step in range(100, 700, 100)], Every(steps=300)) == {300, 600}


def test_milestones_are_demoted_once_nothing_wants_to_resume_from_them():
    saved = [Saved(step, {}) for step in range(100, 700, 100)]
    rule = Keep(last=2, every="300 steps", weights_every="100 steps")
    assert keep(saved, rule, set()) == ({300, 500, 600}, {100, 200, 400})


def test_there_is_a_rule_for_each_key_of_the_recipe():
    assert list(retention.RULES) == list(Keep.model_fields)
