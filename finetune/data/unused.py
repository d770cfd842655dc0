"""Unused content of the sources: columns without a field, and supervised tokens beyond `task.max_length`."""

from typing import TypedDict

from finetune.data import preflight
from finetune.data.batches import Examples
from finetune.data.refusals import listed
from finetune.data.sources.open import first_rows, located, open_source
from finetune.plan.plan import PinnedSource, Plan
from finetune.recipe.schema import Source


class IgnoredColumns(TypedDict):
    source: str
    columns: list[str]


class Lost(TypedDict):
    """What is cut away of the training sources, held-out rows included."""

    source_rows: int
    lost_rows: int
    lost_supervised_tokens: int
    source_supervised_tokens: int


class Unused(Lost):
    ignored_columns: list[IgnoredColumns]


def columns(plan: Plan, train: Examples, holdout: Examples) -> list[IgnoredColumns]:
    """For each source, the columns without a field of the task that the recipe does not skip."""
    recipe = plan.recipe
    found: list[IgnoredColumns] = []
    own = recipe.data.holdout if isinstance(recipe.data.holdout, list) else []
    sources = [*zip(recipe.data.train, plan.train, train.columns, strict=True)]
    sources += zip(own, plan.holdout, holdout.columns if own else (), strict=True)
    for source, pin, seen in sources:
        named = _of_first_rows(source, pin) if seen is None else seen
        # Columns that `skip` names are a decision; only the others are worth a line.
        if ignored := preflight.ignored_columns(source, named, recipe.task):
            found.append({"source": pin.name, "columns": ignored})
    return found


def _of_first_rows(source: Source, pin: PinnedSource) -> list[str]:
    """For rows encoded by older code: it kept no columns."""
    count = preflight.FIRST_ROWS
    place = located(source, pin)
    # For its first rows, a file is not read to the end.
    rows = open_source(place, pin.revision) if place.path is None else first_rows(place, count)
    return [*dict.fromkeys(name for index in range(min(len(rows), count)) for name in rows[index])]


def lost(plan: Plan, train: Examples) -> Lost:
    rows, tokens, of = train.lost()
    return {
        "source_rows": sum(pin.rows for pin in plan.train),
        "lost_rows": rows,
        "lost_supervised_tokens": tokens,
        "source_supervised_tokens": of,
    }


def lines(facts: Unused) -> list[str]:
    """Lines for a reader: ignored columns, and a warning about cut tokens. Empty if everything is used."""
    said = [f"{'ignored':11}columns {listed(each['columns'])} of {each['source']}" for each in facts["ignored_columns"]]
    return [*said, *warning(facts)]


def warning(facts: Lost) -> list[str]:
    if not facts["lost_rows"]:
        return []
    rows, tokens, of = facts["source_rows"], facts["lost_supervised_tokens"], facts["source_supervised_tokens"]
    return [
        f"warning: task.max_length cuts {facts['lost_rows']:,} of {rows:,} rows ({facts['lost_rows'] / rows:.1%}), and with them "
        f"{tokens:,} of {of:,} supervised tokens ({tokens / of:.1%}): raise it, or shorten the rows"
    ]
