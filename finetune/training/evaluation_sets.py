"""The named evaluation sets of a recipe, and rows of files: read, encoded like the rows that a plan trains on, and pinned.

No other code opens them, so a set that is gone never keeps a run from being replayed or packaged.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from finetune.data.batches import select
from finetune.data.heldout import lineage
from finetune.data.heldout.draw import HeldOut
from finetune.data.heldout.lineage import Found
from finetune.data.row_set import RowSet
from finetune.errors import DataError, counted
from finetune.plan.pinned import PinnedSet, PinnedSource, Stage
from finetune.plan.plan import Plan
from finetune.plan.split import BAD
from finetune.recipe.schema import HELD_OUT, Source
from finetune.training.encoding import Encoding, read
from finetune.training.resolve import Resolved


def held_out_set(resolved: Resolved) -> RowSet:
    held_out = resolved.held_out
    return RowSet(HELD_OUT, resolved.holdout, held_out.evaluated, held_out.says)


def watched_sets(resolved: Resolved) -> list[RowSet]:
    """What a training evaluates: the held-out rows, and all sets but the test set."""
    test_set = resolved.plan.recipe.evaluate.test_set
    return [held_out_set(resolved), *(rows for rows in resolved.sets if rows.name != test_set)]


def with_sets(resolved: Resolved, earlier: Plan | None = None) -> Resolved:
    """With the evaluation sets of its recipe, pinned. Of a set that the plan `earlier` names as well, the commits of Hub data sets hold.

    DataError where the test set has rows of another one.
    """
    recipe = resolved.plan.recipe
    before = {each.name: each.sources for each in earlier.sets} if earlier else {}
    held = earlier.recipe.evaluate.sets if earlier else {}
    stages = (lineage.stage_of(resolved.plan, lineage.THIS_RUN), *(resolved.plan.stages or ()))
    pins, sets = [], []
    for name, given in recipe.evaluate.sets.items():
        known = before.get(name) if held.get(name) == given else None
        pinned, rows = read_set(name, given.rows, resolved.encoding, known)
        pins.append(pinned.model_copy(update={"seen": seen_by(rows, resolved, stages).seen}))
        sets.append(rows)
    made = replace(resolved, plan=resolved.plan.model_copy(update={"sets": tuple(pins)}), sets=tuple(sets))
    _refuse_shared(made)
    return made


def _refuse_shared(resolved: Resolved) -> None:
    """The test set must have no row by which anything may be chosen. Its rows of training are counted as those of other sets."""
    name = resolved.plan.recipe.evaluate.test_set
    for rows in (each for each in resolved.sets if each.name == name):
        for other in watched_sets(resolved):
            if shared := int(np.isin(rows.says, other.says).sum()):
                of = f"{HELD_OUT} rows" if other.name == HELD_OUT else f"rows of the set {other.name}"
                message = f"{shared:,} of {counted(len(rows.says), 'row')} of {name} are also {of}"
                hint = "give rows that are nowhere else in the recipe: nothing may be chosen by them"
                raise DataError(message, where="evaluate.test_set", hint=hint)


def read_set(
    name: str, sources: Sequence[Source], encoding: Encoding, pins: Sequence[PinnedSource] | None = None
) -> tuple[PinnedSet, RowSet]:
    """DataError where no row of the set can be evaluated."""
    found, encoded = read(sources, pins, encoding, None)
    says = np.concatenate([each.contents for each in encoded])
    rows = np.flatnonzero(says != BAD)
    examples, counts = select(encoded, [pin.rows for pin in found], rows, is_kept=True)
    if not len(examples):
        raise DataError("has no row to evaluate", where=name, hint="give rows with an answer within task.max_length")
    made = RowSet(name, examples, rows, says[rows])
    return PinnedSet(name=name, sources=tuple(found), counts=counts, contents=made.contents), made


def seen_by(rows: RowSet, resolved: Resolved, stages: Sequence[Stage]) -> Found:
    """Rows of a set that runs trained on."""
    if rows.says is resolved.held_out.says:
        return resolved.held_out.seen_by(stages)
    nothing = np.zeros(0, dtype=np.int64)
    return HeldOut(None, nothing, rows.rows, rows.says, resolved.held_out.contents).seen_by(stages)


def sets_told(plan: Plan, earlier: Plan | None = None) -> list[str]:
    """A line for each set with rows that were trained on, or with other rows than in an earlier plan."""
    before = {each.name: each.contents for each in earlier.sets} if earlier else {}
    changed = [each.name for each in plan.sets if before.get(each.name, each.contents) != each.contents]
    told = [f"evaluation set {each.name}: {item.told(each.counts.rows)}" for each in plan.sets for item in each.seen]
    return [*told, *(f"evaluation set {name} has other rows than before" for name in changed)]
