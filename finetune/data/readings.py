"""How the sources of a plan were read, for `plan`: the format and the first row of each, and the rows that were skipped as bad."""

import json
from collections.abc import Iterator
from typing import TypedDict

from finetune.data.bad_rows import BadRow
from finetune.data.batches import Examples
from finetune.data.shapes.choice import FIRST_ROWS
from finetune.data.sources.open import Rows, first_rows, located, open_source
from finetune.errors import counted
from finetune.plan.plan import PinnedSource, Plan
from finetune.recipe.schema import Source

SHOWN_CHARACTERS, SHOWN_ITEMS, SHOWN_LINE = 60, 3, 320


class Format(TypedDict):
    source: str
    format: str
    """A name of `data.train[].format`, or the patterns."""
    first_row: str
    """As the source writes it, in JSON, shortened."""


class Bad(TypedDict):
    source: str
    bad_rows: int
    first: list[BadRow]


class Readings(TypedDict):
    formats: list[Format]
    bad_rows: list[Bad]


def readings(plan: Plan, train: Examples, holdout: Examples) -> Readings:
    own = plan.recipe.data.holdout if isinstance(plan.recipe.data.holdout, list) else []
    pairs = [*zip(plan.recipe.data.train, plan.train, strict=True), *zip(own, plan.holdout, strict=True)]
    bad = [*train.bad_rows, *(holdout.bad_rows if own else [])]
    listed = zip(pairs, bad, strict=True)
    return {
        "formats": [_format(source, pin, plan) for source, pin in pairs] if plan.row_rules > 1 else [],
        "bad_rows": [
            {"source": pin.name, "bad_rows": count, "first": first} for (_, pin), (count, first) in listed if count
        ],
    }


def lines(facts: Readings) -> Iterator[str]:
    """Lines for a reader."""
    for each in facts["formats"]:
        yield f"{'format':11}{each['format']}  {each['source']}  first row {each['first_row']}"
    for bad in facts["bad_rows"]:
        yield f"{'bad rows':11}{counted(bad['bad_rows'], 'row')} of {bad['source']} skipped (data.on_bad_row)"
        yield from (f"{'':11}{row['where']}: {row['message']}" for row in bad["first"])
        if (more := bad["bad_rows"] - len(bad["first"])) > 0:
            yield f"{'':11}and {more:,} more"


def _format(source: Source, pin: PinnedSource, plan: Plan) -> Format:
    rows, form = _opened(source, pin, plan), plan.recipe.task.row_form
    first = next((row for row, _ in rows.first_readable()), {})
    text = json.dumps(shortened(first), ensure_ascii=False, default=str)
    text = text if len(text) <= SHOWN_LINE else f"{text[:SHOWN_LINE]}…"
    return {"source": pin.name, "format": rows.choice.name if rows.choice else form, "first_row": text}


def _opened(source: Source, pin: PinnedSource, plan: Plan) -> Rows:
    place, form = located(source, pin), plan.recipe.task.row_form
    if place.path is not None:
        return first_rows(place, FIRST_ROWS, form)
    return open_source(place, pin.revision, plan.row_rules, form, skips_bad=True)


def shortened(value: object) -> object:
    """The value with long texts and lists cut."""
    if isinstance(value, str):
        return value if len(value) <= SHOWN_CHARACTERS else f"{value[:SHOWN_CHARACTERS]}…"
    if isinstance(value, list):
        more = [f"… {len(value) - SHOWN_ITEMS:,} more"] if len(value) > SHOWN_ITEMS else []
        return [*map(shortened, value[:SHOWN_ITEMS]), *more]
    return {name: shortened(item) for name, item in value.items()} if isinstance(value, dict) else value
