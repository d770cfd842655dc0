"""The section `evaluate`: when to evaluate, and on which rows beside the held-out ones."""

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field, PositiveInt, field_validator

from finetune.recipe.schema.data import Source
from finetune.recipe.schema.metrics import Metric
from finetune.recipe.schema.values import Section, Short, StepCadence

HELD_OUT = "held-out"
"""The name of the rows that a run holds out; no set can have it."""
SET_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


class EvaluationSet(Section):
    """Rows to evaluate beside the held-out ones. They are encoded like training rows, and never trained on. A list of sources is short for `rows`."""

    rows: list[Source] = Field(min_length=1)
    """The sources of its rows."""
    metrics: list[Metric] = []
    """What to measure of the model's own answers: names like `[exact_match, rouge]`, or sections. `finetune evaluate` computes them; training does not, because answers take long."""
    max_new_tokens: PositiveInt = 128
    """Tokens of the longest answer."""

    @field_validator("metrics")
    @classmethod
    def _differ(cls, metrics: list[Metric]) -> list[Metric]:
        if len({each.name for each in metrics}) < len(metrics):
            raise ValueError("must have each metric once")
        return metrics


def _set(value: object) -> object:
    return {"rows": value} if isinstance(value, list) else value


class Evaluate(Section):
    """When to evaluate the held-out rows, and which other rows. This always happens before the first and after the last step."""

    every: StepCadence | None = None
    """Evaluate every N steps, like `100 steps`."""
    sets: dict[str, Annotated[EvaluationSet, BeforeValidator(_set), Short("rows")]] = {}
    """More rows to evaluate at the same steps, by name, like `{docs: [{path: data/docs.jsonl}]}`. Their figures are named `docs/loss`; the held-out rows alone choose the best checkpoint."""
    test_set: str | None = Field(default=None, min_length=1)
    """The name of the set for the figures of a package's card. Training does not evaluate it, and nothing is chosen by it. It is refused if it has held-out rows, rows of another set, or training rows."""

    @field_validator("sets")
    @classmethod
    def _have_names(cls, sets: Mapping[str, EvaluationSet]) -> Mapping[str, EvaluationSet]:
        for name in sets:
            if not SET_NAME.fullmatch(name) or name == HELD_OUT:
                raise ValueError(
                    f"`{name}` cannot be the name of a set: use letters, digits and `_.-`, not `{HELD_OUT}`"
                )
        return sets
