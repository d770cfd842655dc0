"""What a training has to know of the steps behind it. Neither its memory nor the time to read it grows with their number; of
evaluations, which are few, it knows all.

`recorder` owns one: of the newest checkpoint's `trainer_state.json` and the journal's end when a run is resumed, of what happens after that.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from finetune.plan.cadence import history_every
from finetune.plan.plan import Plan
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.trainer_state import History, evaluations_of, loss_entry, losses_of, trainer_state
from finetune.store.run import journal, scan
from finetune.store.run.records import EventRecord, StepRecord
from finetune.training import guard
from finetune.training.guard import Amendment


class Past:
    def __init__(self, run: Path, plan: Plan, last: Checkpoint | None):
        """The past of a run that goes on from checkpoint `last`, or from its start."""
        step, state = (last.step, _state_of(last)) if last else (0, None)
        # All of the journal is read only if its end does not suffice: after a lost attempt, or older code.
        events, by_step = (_since(run, step) if state else None) or scan.read(run)
        before = sorted(number for number in by_step if number <= step)
        if len(before) == step:  # the journal has all, as it had before there were these states
            state = None
        self.step = step
        """Where the run goes on."""
        self._plan = plan
        # The guard looks back on WINDOW steps. All of them would grow with the run.
        self._steps = {number: by_step[number] for number in by_step if number >= step - guard.WINDOW}
        self._tokens = state["num_input_tokens_seen"] if state else 0
        entries = losses_of(state) if state else []
        for number in () if state else before:
            record = by_step[number]
            self._tokens += record["tokens"]
            if number % history_every(plan) == 0 and _counts(record):
                entries.append(loss_entry(plan, record))
        self._losses = {entry["step"]: entry for entry in entries if entry["step"] % history_every(plan) == 0}
        carried = last.manifest.amendments if last else []
        self.amendments = guard.amendments(carried, events)
        """What was decided against the plan, by the first step."""
        self.is_abandoned = any(each.first <= step for each in {*self.amendments} - {*guard.amendments(carried, ())})
        """Whether `last` is of a way that a rollback has given up."""
        self.evaluated = (evaluations_of(state) if state else {}) | journal.evaluations(events)
        """Held-out figures of each step that was evaluated."""
        self.newest_step = max(by_step, default=step)
        """The newest step that the journal has; those after `last` run again."""
        self.newest_committed = max(journal.that_count(events, _is_commit), default=step)
        self.extended = {record["plan_id"] for record in events if record["event"] == "extended"}
        """What the journal says of extensions; those that `last` knows may be missing."""

    def earlier(self, step: int) -> StepRecord | None:
        """The record of a step that ran before."""
        return self._steps.get(step)

    def add(self, record: StepRecord) -> None:
        """A step has ended."""
        step = record["step"]
        self._steps[step] = record
        # So memory stays the same however long the run is.
        self._steps.pop(step - guard.WINDOW - 1, None)
        self._tokens += record["tokens"]
        self.newest_step = max(self.newest_step, step)
        if step % history_every(self._plan) == 0 and _counts(record):
            self._losses[step] = loss_entry(self._plan, record)

    def amend(self, amendment: Amendment) -> None:
        """A step is skipped."""
        self.amendments = sorted([*self.amendments, amendment])

    def window(self, quantity: str, before: int) -> list[float]:
        """A recorded quantity in the steps before a step, as many as tell a spike from noise; without skipped ones."""
        steps = range(max(1, before - guard.WINDOW), before)
        known = [self._steps[step] for step in steps if step in self._steps]
        return [record["loss"] if quantity == "loss" else record["grad_norm"] for record in known if _counts(record)]

    def trainer_state(self, step: int) -> Callable[[], History]:
        """Makes it as it is after a step, the newest one: elsewhere, for it takes milliseconds."""
        # Copies: the writer's thread reads them while the next steps add to the originals.
        losses = dict(self._losses)
        if step in self._steps and _counts(self._steps[step]):
            losses[step] = loss_entry(self._plan, self._steps[step])
        return partial(trainer_state, self._plan, step, list(losses.values()), dict(self.evaluated), self._tokens)


def _counts(record: StepRecord) -> bool:
    """Whether a step moved the weights; the loss of a skipped one may be NaN."""
    return "skipped" not in record


def _state_of(checkpoint: Checkpoint) -> History | None:
    """Verified before, like all of a checkpoint that is resumed from."""
    path = checkpoint.path / "trainer_state.json"
    return json.loads(path.read_bytes()) if path.name in checkpoint.manifest.files else None


def _since(run: Path, step: int) -> tuple[list[EventRecord], Mapping[int, StepRecord]] | None:
    """Events and steps of the journal from a window before a committed step on; None where steps after it may be recorded before that, by
    an attempt that was lost, so that all of it has to be read."""
    records = journal.end_since(run, lambda record: record["kind"] == "step" and record["step"] <= step - guard.WINDOW)
    if records is None:
        return None
    events = [record for record in records if journal.is_event(record)]
    commits = [record for record in events if _is_commit(record) and record["step"] == step]
    if not commits or commits[-1].get("newest_step") != step:
        return None
    return events, journal.steps(records)


def _is_commit(record: EventRecord) -> bool:
    return record["event"] == "committed"
