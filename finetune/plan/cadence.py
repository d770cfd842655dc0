"""The steps to evaluate and to commit: functions of the plan, the step, and the evaluations so far.

All ranks, and a resumed run, must come to the same answer.
"""

from collections.abc import Mapping
from math import ceil

from finetune.plan.facts import Metrics
from finetune.plan.plan import Plan
from finetune.plan.retention import Saved, best
from finetune.recipe.schema import Every, Recipe

HISTORY_ENTRIES = 1000
"""Most loss entries in a checkpoint's history: every checkpoint carries it, and the journal has them all."""


def is_evaluated(plan: Plan, step: int, is_saved: bool) -> bool:
    """Whether to evaluate the weights after a step: by the recipe's cadence, if they may be the best, and at both ends."""
    recipe = plan.recipe
    is_at_an_end = step in (0, plan.steps)
    is_wanted = is_at_an_end or _is_due(recipe.evaluate.every, step) or (is_saved and recipe.checkpoint.keep.best)
    return plan.holdout_counts.examples > 0 and bool(is_wanted)


def is_saved(plan: Plan, step: int) -> bool:
    """Whether a step is committed, whatever its evaluation."""
    return any(_is_due(cadence, step) for cadence in saves(plan.recipe))


def is_saved_as_best(plan: Plan, step: int, evaluated: Mapping[int, Metrics]) -> bool:
    """Whether a step is committed because its evaluation is the best so far: among the `keep.best` best, 1 unless the recipe says more.

    Later evaluations do not count, so a repeated step after a kill gets the same answer as the first time.
    """
    rule = plan.recipe.checkpoint
    if not rule.save_best or step not in evaluated:
        return False
    by, first = rule.keep.chosen_by, first_own_step(plan)
    so_far = [Saved(at, metrics, by=by) for at, metrics in evaluated.items() if first <= at <= step]
    return step in best(so_far, by.count)


def first_own_step(plan: Plan) -> int:
    """The first step that can have a checkpoint in this run: a branch has one of its parent's step."""
    return max(1, plan.parent.step) if plan.parent else 1


def saves(recipe: Recipe) -> list[Every]:
    """The cadences of commits."""
    rule, milestones = recipe.checkpoint, recipe.publish.milestones if recipe.publish else None
    return [each for each in (*rule.every, rule.keep.every, rule.keep.weights_every, milestones) if each]


def saves_at_most(recipe: Recipe) -> list[Every]:
    """The same with the cadence of evaluations, if each may turn out to be the best so far."""
    every = recipe.evaluate.every
    return [*saves(recipe), *([every] if every and recipe.checkpoint.save_best else [])]


def may_lose_best(recipe: Recipe) -> bool:
    """Whether the best evaluated step may stay uncommitted."""
    every = recipe.evaluate.every
    if recipe.checkpoint.save_best or every is None or every.steps is None:
        return False
    return not any(each.steps and every.steps % each.steps == 0 for each in saves(recipe))


def history_every(plan: Plan) -> int:
    """Steps between loss entries of the history: a power of two, so an extended run never needs a skipped entry."""
    return 1 << (ceil(plan.steps / HISTORY_ENTRIES) - 1).bit_length()


def _is_due(every: Every | None, step: int) -> bool:
    return every is not None and every.steps is not None and step % every.steps == 0
