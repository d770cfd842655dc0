"""Encodes the rows of a recipe into the cache ahead of a training: all of them, or the shards of one of several tasks."""

from datetime import date
from typing import TypedDict

from finetune.data import preflight
from finetune.data.encode import Part
from finetune.errors import counted
from finetune.recipe.load import LoadedRecipe
from finetune.training.encoding import encoding_of, read_part
from finetune.training.resolve import open_base


class SourceReport(TypedDict):
    name: str
    rows: int
    fingerprint: str
    examples: int | None
    """None, like `tokens`, until all tasks are done."""
    tokens: int | None


class Report(TypedDict):
    ok: bool
    """Whether all sources are encoded."""
    sources: list[SourceReport]


def encode_ahead(loaded: LoadedRecipe, part: Part, today: date | None = None) -> Report:
    """The sources of training rows, held-out rows and evaluation sets. A source that is encoded already costs a look at its content."""
    recipe = loaded.recipe
    preflight.check(loaded)
    opened = open_base(loaded, None, None, is_to_load=False)
    encoding = encoding_of(recipe, opened.directory, opened.tokenizer, None, None, today)
    named = recipe.data.holdout if isinstance(recipe.data.holdout, list) else []
    reports: list[SourceReport] = []
    of_sets = [source for each in recipe.evaluate.sets.values() for source in each.rows]
    for source in (*recipe.data.train, *named, *of_sets):
        pin, encoded = read_part(source, encoding, part)
        counts = (None, None) if encoded is None else (len(encoded), len(encoded.tokens))
        reports.append(
            {
                "name": pin.name,
                "rows": pin.rows,
                "fingerprint": pin.fingerprint,
                "examples": counts[0],
                "tokens": counts[1],
            }
        )
    return {"ok": all(report["examples"] is not None for report in reports), "sources": reports}


def listing(report: Report, part: Part) -> str:
    """A line for each source."""
    lines = []
    for one in report["sources"]:
        found = (
            f"{one['examples']:,} examples, {one['tokens']:,} tokens"
            if one["tokens"] is not None
            else "waits for other tasks"
        )
        lines.append(f"{one['name']}  {counted(one['rows'], 'row')}  {found}")
    return "\n".join([*lines, *([f"shard {part.number} of {part.of} is done"] if part.of > 1 else [])])
