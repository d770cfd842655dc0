"""Finds the first bad step: recorded figures are looked up, states are evaluated by halves. Also finds the first that differs from its record."""

from collections import ChainMap
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import cast

from finetune.debug import predicates
from finetune.debug.against_record import Difference
from finetune.debug.predicates import Comparison, PredicateError
from finetune.debug.reexecute import Rerun
from finetune.debug.states import States
from finetune.errors import counted
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.run.records import Record


@dataclass
class Found:
    first_bad: int
    """The first bad step."""
    last_good: int
    evaluations: int = 0
    """States evaluated for this search, without figures from the journal."""
    notes: list[str] = field(default_factory=list)
    """Caveats of the answer."""


class NoAnswer(Exception):
    """No step is bad, or none is good; this is an answer as well."""

    def __init__(self, message: str, states: States | None = None):
        self.evaluations = states.evaluations if states else 0
        super().__init__(message)


def search_record(rerun: Rerun, comparison: Comparison, good: int | None, bad: int | None) -> Found:
    """The first bad step after a good one. Nothing is evaluated: the journal has every step."""
    # both are only read, and the steps one at a time
    recorded = ChainMap(cast(dict[int, Record], rerun.steps), cast(dict[int, Record], rerun.refused))
    values = predicates.recorded(rerun.run, recorded, comparison)
    steps = [step for step in sorted(values) if (good is None or step > good) and (bad is None or step <= bad)]
    is_bad = {step: comparison.holds(values[step]) for step in steps}
    if not any(is_bad.values()):
        raise NoAnswer(f"never bad: no recorded step has {comparison}")
    first_good = good if good is not None else next((step for step in steps if not is_bad[step]), None)
    if first_good is None:
        raise NoAnswer(f"never good: every recorded step has {comparison}")
    found = next((step for step in steps if step > first_good and is_bad[step]), None)
    if found is None:
        raise NoAnswer(
            f"bad until step {first_good - 1} and good from step {first_good} on: it never went from good to bad"
        )
    notes = []
    if before := [step for step in steps if step < first_good and is_bad[step]]:
        notes.append(f"bad as well until step {before[-1]}, before it was good for the first time")
    after = [step for step in steps if step > found]
    if recovered := [step for step in after if not is_bad[step]]:
        notes.append(
            f"not for good: {len(recovered)} of the {counted(len(after), 'step')} after it are good again, from step {recovered[0]} on"
        )
    notes += [
        f"nothing is recorded of step {step}" for step in range(first_good, found) if step not in values and step
    ][:3]
    return Found(found, found - 1, notes=notes)


def search_states(rerun: Rerun, predicate: Comparison | str, good: int | None, bad: int | None) -> Found:
    """By halves. The ends are evaluated unless they are given. Assumes that a bad state stays bad."""
    with closing(States(rerun, predicate)) as states:
        stored, damaged = rerun.sound_checkpoints()
        first = rerun.plan.parent.step if rerun.plan.parent else 0
        last = bad if bad is not None else max(stored, default=None)
        if last is None:
            raise NoAnswer("the run has no checkpoint yet")
        newest = max(rerun.steps, default=0)
        for name, step in (("good", good), ("bad", bad)):
            if step is not None and not first <= step <= newest:
                raise PredicateError(
                    f"the {name} step {step} is not one of the run, which has steps {first} to {newest}"
                )
        if good is not None and good >= last:
            raise NoAnswer(f"no state after step {good} is stored: train on, or give --bad STEP")
        low = start = good if good is not None else first
        verdict = states.is_bad(last, stored[last]) if bad is None else True
        if verdict is None:
            raise NoAnswer(f"the command cannot tell of step {last}, the last one that is stored", states)
        if not verdict:
            raise NoAnswer(f"never bad: the state at step {last}, the last one that is stored, is good", states)
        low, high, unknown = _halves(sorted(step for step in stored if low < step < last), low, last, stored, states)
        # the start is evaluated last: usually some later state is good, and it is not needed
        verdict = states.is_bad(low, stored.get(low)) if good is None and low == start else False
        if verdict is None:
            raise NoAnswer(f"the command cannot tell of step {low}, where the run begins", states)
        if verdict:
            raise NoAnswer(f"never good: the state at step {low}, where the run begins, is bad already", states)
        low, high, more = _between(rerun, states, low, high, stored)
        notes = [f"{name} is damaged, and was skipped" for name in damaged]
        notes += [f"the command could not tell of steps {sorted(unknown | more)}"] if unknown | more else []
        if any(low < step < high for step in unknown | more):
            notes.append(f"so the first bad step is one of {low + 1} to {high}")
        return Found(high, low, states.evaluations, notes)


def _halves(
    steps: list[int], low: int, high: int, stored: dict[int, Checkpoint], states: States
) -> tuple[int, int, set[int]]:
    """The last good and the first bad one of the stored states, and those the command could not judge."""
    unknown: set[int] = set()
    while left := [step for step in steps if low < step < high and step not in unknown]:
        step = left[len(left) // 2]
        verdict = states.is_bad(step, stored[step])
        if verdict is None:
            unknown.add(step)
        elif verdict:
            high = step
        else:
            low = step
    return low, high, unknown


def _between(
    rerun: Rerun, states: States, low: int, high: int, stored: dict[int, Checkpoint]
) -> tuple[int, int, set[int]]:
    """The same inside the bracket, by running its steps again. The search continues from a good state, and steps back from a bad one."""
    is_to_write = high - low > 1
    rerun.go_to(low, rerun.say)
    good_one = stored.get(low) or (states.write(None) if low and is_to_write else None)
    unknown: set[int] = set()
    while left := [step for step in range(low + 1, high) if step not in unknown]:
        step = left[len(left) // 2]
        if rerun.state.step > step:
            rerun.begin_at(good_one)
        rerun.go_to_from_here(step)
        written = states.write(good_one) if states.is_command else None
        verdict = states.is_bad(step, written)
        if verdict is False:
            low, before, good_one = step, good_one, written or states.write(good_one)
            states.remove(before)
            continue
        states.remove(written)
        if verdict is None:
            unknown.add(step)
        else:
            high = step
    return low, high, unknown


def earliest_difference(rerun: Rerun) -> tuple[Difference, int]:
    """The first step that differs from its record, given one that does. The fault may have begun between earlier checkpoints: these
    stretches run again, the previous one first, then by halves. Also returns the number of stretches."""
    found, probes = rerun.first_difference, 0
    if found is None:
        raise ValueError("all that ran again was as it was recorded")
    stored, _ = rerun.sound_checkpoints()
    starts = sorted(stored) if rerun.plan.parent and rerun.plan.parent.step else [0, *sorted(stored)]
    sound, broken = -1, max(place for place, start in enumerate(starts) if start < found.step)
    while broken - sound > 1:
        middle, probes = (sound + broken) // 2 if probes else broken - 1, probes + 1
        rerun.first_difference = None
        rerun.begin_at(stored.get(starts[middle]))
        while rerun.first_difference is None and rerun.state.step < starts[middle + 1]:
            rerun.advance()
            other = None if rerun.first_difference else rerun.stored_difference()
            if other:  # after that step's figures, before the next step's
                begun = min(other.step + 1, max(rerun.history.keys() | rerun.refused.keys()))
                about = f"{other.quantity} where it begins" if begun > other.step else other.quantity
                rerun.first_difference = replace(other, step=begun, quantity=about)
        if rerun.first_difference:
            broken, found = middle, rerun.first_difference
        else:
            sound = middle
    rerun.first_difference = found
    return found, probes
