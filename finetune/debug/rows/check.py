"""`data check`: looks at every row of a recipe once, in bounded memory, and reports what is wrong. A bad row never ends it."""

import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from finetune.data.checks import CHECKS
from finetune.data.checks.facts import Counts
from finetune.data.checks.looked import Context, Found, Level, Looked, parts_of
from finetune.data.checks.tokens import TOO_LONG
from finetune.data.example import Encoder
from finetune.data.heldout import draw
from finetune.data.heldout.lineage import Contents
from finetune.debug.rows.report import Checked, Problem
from finetune.errors import DataError, counted
from finetune.plan.plan import PinnedSource
from finetune.plan.split import content_of
from finetune.recipe.load import LoadedRecipe
from finetune.recipe.schema import Recipe
from finetune.tasks import TASKS
from finetune.training.encoding import encoder_of
from finetune.training.recipe_rows import OpenedSource, RecipeRows, open_encoding, open_rows

ROWS_AT_ONCE, CHARACTERS_AT_ONCE = 256, 1 << 20  # in one call of the encoder
MOST_KEPT = 100_000  # findings of a check; more are counted
SAY_EVERY_SECONDS = 10.0
# A row with one of these is not named as refused as well.
REASONS = ("empty", "control_tokens")


@dataclass
class Noted:
    """What was found, by check."""

    found: dict[str, list[Found]]
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, more: Iterable[Found]) -> None:
        for found in more if name in self.found else ():
            self.counts[name] = self.counts.get(name, 0) + 1
            if self.counts[name] <= MOST_KEPT:
                self.found[name].append(found)

    def of(self, level: Level) -> list[Problem]:
        return [
            {"check": name, "row": found.row, "where": found.where, "message": found.message}
            for name, each in self.found.items()
            if CHECKS[name].level == level
            for found in each
        ]


def check(loaded: LoadedRecipe, skip: Collection[str] = ()) -> Checked:
    """The findings of all checks but those to skip, and facts about the rows."""
    rows, encoding = open_rows(loaded, is_first_read=False), open_encoding(loaded)
    control = [token.content for token in encoding.tokenizer.added_tokens_decoder.values() if token.special]
    context = Context(control, lambda number: parts_of(rows[number]), rows.where)
    noted = Noted({name: [] for name in CHECKS if name not in skip})
    lookers = {name: CHECKS[name].start(context) for name in noted.found}
    counts, contents = Counts(), np.zeros(len(rows), dtype=np.uint64)
    noted.add("refused", [Found(None, error.where or "", error.message) for error in rows.unopened])
    for looked in _all_looked(loaded.recipe, rows, encoder_of(encoding)):
        contents[looked.row] = looked.content
        counts.look(looked)
        here = {name: list(looker.look(looked)) for name, looker in lookers.items()}
        if any(here.get(name) for name in REASONS):
            here.pop("refused", None)
        for name, found in here.items():
            noted.add(name, found)
    try:
        held_out = _held_out(loaded.recipe, rows, contents)
    except DataError as error:
        held_out = np.arange(len(rows)) >= rows.trained
        noted.add("refused", [Found(None, loaded.file, error.message)])
    for name, looker in lookers.items():
        noted.add(name, looker.end(held_out))
    return _report(rows, noted, counts, int(held_out.sum()))


def _report(rows: RecipeRows, noted: Noted, counts: Counts, held_out: int) -> Checked:
    problems = noted.of("problem")
    return {
        "ok": not problems,
        "problems": problems,
        "remarks": noted.of("remark"),
        "counts": {name: noted.counts[name] for name in CHECKS if name in noted.counts},
        "left_out": {name: count - MOST_KEPT for name, count in noted.counts.items() if count > MOST_KEPT},
        "rows": len(rows),
        "held_out_rows": held_out,
        "sources": [{"key": each.key, "name": each.source.place, "rows": len(each.rows)} for each in rows.sources],
        **counts.facts(),
    }


def _held_out(recipe: Recipe, rows: RecipeRows, contents: np.ndarray) -> np.ndarray:
    """Which rows are held out: those of held-out sources, or those that a count or a share draws."""
    by_source = [contents[each.first : each.first + len(each.rows)] for each in rows.sources if not each.is_held_out]
    is_out = np.arange(len(rows)) >= rows.trained
    if is_out.any() or not by_source:
        return is_out
    pins = [PinnedSource(name=each.key, revision=None, fingerprint="", rows=len(each.rows)) for each in rows.sources]
    of_rows = Contents(recipe.task.name, TASKS[recipe.task.name].content)
    origin = draw.origin(recipe, None, draw.stages(recipe, None, None))
    drawn = draw.held_out(recipe, draw.Sources(pins, by_source, (), of_rows), None, origin)
    is_out[drawn.untrained] = True
    return is_out


def _all_looked(recipe: Recipe, rows: RecipeRows, encoder: Encoder) -> Iterator[Looked]:
    """Every row with its examples, in order; rows that cannot be read as well."""
    content, said_at = TASKS[recipe.task.name].content, time.monotonic()
    for opened in rows.sources:
        for batch in _batches(opened):
            for looked in _with_examples(batch, encoder):
                yield replace(looked, content=content_of(content(looked.columns)))
            if time.monotonic() - said_at > SAY_EVERY_SECONDS:
                said_at = time.monotonic()
                print(f"looked at {batch[-1].row + 1:,} of {len(rows):,} rows", file=sys.stderr, flush=True)


def _batches(opened: OpenedSource) -> Iterator[list[Looked]]:
    """Rows for one call of the encoder."""
    batch: list[Looked] = []
    characters = 0
    for row in opened.numbers:
        batch.append(looked := _read(opened, row))
        characters += sum(len(part.text) for part in looked.parts)
        if len(batch) == ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _read(opened: OpenedSource, row: int) -> Looked:
    where = opened.rows.where(row - opened.first)
    try:
        columns = opened.rows[row - opened.first]
    except DataError as error:
        return Looked(row, where, {}, (), 0, refusal=error)
    looked = Looked(row, where, columns, parts_of(columns), 0)
    if (characters := sum(len(part.text) for part in looked.parts)) > TOO_LONG:
        message = f"has {counted(characters, 'character')}: its tokens are not looked at"
        return replace(looked, refusal=DataError(message, where=where))
    return looked


def _with_examples(batch: Sequence[Looked], encoder: Encoder) -> Sequence[Looked]:
    """All rows at once, or each half by itself where one of them is bad."""
    good = [looked for looked in batch if looked.refusal is None]
    try:
        made = iter(encoder([each.columns for each in good], [each.where for each in good]) if good else [])
    except DataError as error:
        if len(batch) == 1:
            return [replace(batch[0], refusal=error)]
        middle = len(batch) // 2
        return [*_with_examples(batch[:middle], encoder), *_with_examples(batch[middle:], encoder)]
    return [looked if looked.refusal else replace(looked, examples=next(made)) for looked in batch]
