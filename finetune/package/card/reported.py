"""The figures of a package on `evaluate.test_set`, and what its card says of the rows that its figures are of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from finetune.errors import counted
from finetune.plan.choosing import choosing_rows
from finetune.plan.facts import Metrics
from finetune.plan.plan import Plan
from finetune.plan.split import Seen
from finetune.recipe.schema import HELD_OUT
from finetune.store.run.records import EventRecord, Record
from finetune.store.strict_json import strict

CHOSEN = (
    "Checkpoints of this run are chosen on these rows. The figures of a chosen one are better on them than on new rows."
)


@dataclass(frozen=True)
class Reported:
    """The evaluation of a package and of its base on the test set."""

    name: str
    base: Metrics | None
    """None where the base is gone."""
    own: Metrics
    base_answers: Mapping[str, float] = field(default_factory=dict)
    answers: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the model's own answers, if the recipe names some for these rows."""
    earlier: int = 0
    """Other checkpoints of the run that were evaluated on these rows before: a choice may have seen them."""
    seen: Sequence[Seen] = ()
    """Runs that trained on some of the rows."""

    def records(self, plan: Plan, step: int) -> list[Record]:
        """Events for the figures-only journal of the package."""
        about = {"kind": "event", "event": "reported", "set": self.name}
        own = {**about, "step": step, "chosen": choosing_rows(plan), "earlier": self.earlier}
        own |= {**self.own, "answers": {**self.answers}}
        of_base = [{**about, "step": 0, **self.base, "answers": {**self.base_answers}}] if self.base else []
        return [cast(Record, strict(record)) for record in (*of_base, own)]


def told(event: EventRecord) -> str:
    """A sentence about the rows of an event `reported`."""
    rows = f"(`{event['set']}`, {event['tokens']:,} tokens with a loss)"
    chosen, earlier = event["chosen"], event["earlier"]
    if chosen:
        begin = f"Chosen on {_listed(chosen)}, reported on {counted(event['rows'], 'other row')} {rows}"
    else:
        begin = f"Reported on {counted(event['rows'], 'row')} {rows}"
    if earlier:
        was = f"{counted(earlier, 'other checkpoint')} of the run {'was' if earlier == 1 else 'were'}"
        return f"{begin}. {was} evaluated on these rows before, so a choice may have seen them."
    return f"{begin} that no choice has seen."


def _listed(chosen: Mapping[str, int]) -> str:
    return " and ".join(
        counted(count, f"{HELD_OUT} row") if name == HELD_OUT else f"{counted(count, 'row')} of `{name}`"
        for name, count in chosen.items()
    )


def warned(plan: Plan, is_reported: bool) -> list[str]:
    """What a card says where its figures are of rows by which its checkpoint may be chosen."""
    return [CHOSEN] if not is_reported and HELD_OUT in choosing_rows(plan) else []
