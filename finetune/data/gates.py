"""The gates before compute: what a new run is refused for, unless `data.allow` names it. A resume has passed them, and
so has a branch with the data and the task of its run.

`lost_text` and `unlearnt_stop` hold for single rows as well: there the encoder asks.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from finetune.data.batches import Examples
from finetune.data.unused import lost
from finetune.errors import DataError, counted
from finetune.plan.plan import Plan

MOST_CUT = 0.05  # of the rows; more is no longer a few outliers
LOOKED = 256  # examples of a source in which a stop token is looked for
OF_ROWS = ("lost_text", "unlearnt_stop")


@dataclass(frozen=True)
class Encoded:
    """What gates look at."""

    plan: Plan
    train: Examples
    stops: Collection[int]
    """Tokens that end an answer; none where rows have no answers."""


class Gate(NamedTuple):
    find: Callable[[Encoded], str | None]
    """What is wrong, or None."""
    hint: str


def refuse(encoded: Encoded, where: str) -> None:
    """Raises DataError with everything that is wrong and not allowed."""
    allowed = encoded.plan.recipe.data.allow
    found = {name: message for name, gate in GATES.items() if name not in allowed and (message := gate.find(encoded))}
    if found:
        hints = [GATES[name].hint for name in found]
        hint = f"{'; '.join(hints)}; or start all the same with data.allow: [{', '.join([*allowed, *found])}]"
        raise DataError("\n".join(found.values()), where=where, hint=hint)


def _nothing_learnt(encoded: Encoded) -> str | None:
    rows = encoded.plan.counts.left_out_rows + encoded.plan.holdout_counts.left_out_rows
    of = encoded.plan.counts.rows + encoded.plan.holdout_counts.rows
    return f"task.max_length cuts the whole answer of {rows:,} of {counted(of, 'row')} away" if rows else None


def _unlearnt_stop(encoded: Encoded) -> str | None:
    sizes = [0, *np.cumsum(encoded.train.sizes).tolist()]
    for pin, first, end in zip(encoded.plan.train, sizes, sizes[1:], strict=False):
        examples = [encoded.train[number] for number in range(first, min(end, first + LOOKED))] if encoded.stops else []
        is_learnt = (np.isin(each.tokens[each.supervised], [*encoded.stops]).any() for each in examples)
        if examples and not any(is_learnt):
            return f"no stop token is learnt in the first {counted(len(examples), 'example')} of {pin.name}"
    return None


def _cut_rows(encoded: Encoded) -> str | None:
    facts = lost(encoded.plan, encoded.train)
    rows, of = facts["lost_rows"], facts["source_rows"]
    if rows <= MOST_CUT * of:
        return None
    tokens, of_tokens = facts["lost_supervised_tokens"], facts["source_supervised_tokens"]
    return (
        f"task.max_length cuts {rows:,} of {of:,} rows ({rows / of:.1%}), and with them "
        f"{tokens:,} of {of_tokens:,} supervised tokens ({tokens / of_tokens:.1%})"
    )


def _seen_holdout(encoded: Encoded) -> str | None:
    """Of held-out rows that are drawn, `data.seen` decides."""
    plan = encoded.plan
    said = [] if plan.split is not None else [seen.told(plan.holdout_counts.rows) for seen in plan.seen if seen.rows]
    of_sets = [(each, seen) for each in plan.sets for seen in each.seen if seen.rows]
    said += [f"evaluation set {each.name}: {seen.told(each.counts.rows)}" for each, seen in of_sets]
    return "; ".join(said) or None


GATES: dict[str, Gate] = {
    "cut_rows": Gate(_cut_rows, "raise task.max_length, or shorten the rows"),
    "nothing_learnt": Gate(_nothing_learnt, "raise task.max_length, or remove these rows"),
    "seen_holdout": Gate(_seen_holdout, "hold out other rows, or remove these from training"),
    "unlearnt_stop": Gate(_unlearnt_stop, "raise task.max_length, or look at `finetune data show`"),
    "lost_text": Gate(lambda encoded: None, "use a template that shows it"),
}
