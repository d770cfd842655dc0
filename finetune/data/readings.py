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
    found: Readings = {"formats": [], "bad_rows": _bad(plan, train, holdout)}
    for source, pin in _sources(plan):
        rows = _opened(source, pin, plan)
        if rows.choice:
            found["formats"].append({"source": pin.name, "format": rows.choice.name, "first_row": _first_row(rows)})
    return found


def warning(plan: Plan, train: Examples, holdout: Examples) -> Iterator[str]:
    """A line for each source with bad rows, for `train`."""
    for bad in _bad(plan, train, holdout):
        [one, *_] = bad["first"]
        skipped = f"warning: {counted(bad['bad_rows'], 'row')} of {bad['source']} skipped as bad (data.on_bad_row)"
        yield f"{skipped}; the first one is {one['where']}: {one['message']}"


def _sources(plan: Plan) -> list[tuple[Source, PinnedSource]]:
    own = plan.recipe.data.holdout if isinstance(plan.recipe.data.holdout, list) else []
    return [*zip(plan.recipe.data.train, plan.train, strict=True), *zip(own, plan.holdout, strict=True)]


def _bad(plan: Plan, train: Examples, holdout: Examples) -> list[Bad]:
    """The sources with bad rows."""
    own = isinstance(plan.recipe.data.holdout, list)
    found: list[Bad] = []
    for (source, pin), (count, first) in zip(
        _sources(plan), [*train.bad_rows, *(holdout.bad_rows if own else [])], strict=True
    ):
        if count:
            # the cache has the places of the file that was encoded, which may have moved since
            rows = _opened(source, pin, plan, is_whole=True)
            named: list[BadRow] = [{**bad, "where": rows.where(bad["row"])} for bad in first]
            found.append({"source": pin.name, "bad_rows": count, "first": named})
    return found


def lines(facts: Readings) -> Iterator[str]:
    """Lines for a reader."""
    for each in facts["formats"]:
        yield f"{'format':11}{each['format']}  {each['source']}  first row {each['first_row']}"
    for bad in facts["bad_rows"]:
        yield f"{'bad rows':11}{counted(bad['bad_rows'], 'row')} of {bad['source']} skipped (data.on_bad_row)"
        yield from (f"{'':11}{row['where']}: {row['message']}" for row in bad["first"])
        if (more := bad["bad_rows"] - len(bad["first"])) > 0:
            yield f"{'':11}and {more:,} more"


def _opened(source: Source, pin: PinnedSource, plan: Plan, is_whole: bool = False) -> Rows:
    place, form = located(source, pin), plan.recipe.task.row_form
    if place.path is not None and not is_whole and plan.row_rules > 1:
        return first_rows(place, FIRST_ROWS, form)
    return open_source(place, pin.revision, plan.row_rules, form, skips_bad=True)


def _first_row(rows: Rows) -> str:
    first = next((row for row, _ in rows.first_readable()), {})
    text = json.dumps(shortened(first), ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_LINE else f"{text[:SHOWN_LINE]}…"


def shortened(value: object) -> object:
    """The value with long texts and lists cut."""
    if isinstance(value, str):
        return value if len(value) <= SHOWN_CHARACTERS else f"{value[:SHOWN_CHARACTERS]}…"
    if isinstance(value, list):
        more = [f"… {len(value) - SHOWN_ITEMS:,} more"] if len(value) > SHOWN_ITEMS else []
        return [*map(shortened, value[:SHOWN_ITEMS]), *more]
    return {name: shortened(item) for name, item in value.items()} if isinstance(value, dict) else value
