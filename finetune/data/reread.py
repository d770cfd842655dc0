"""Rows by their numbers, read again from their sources for a reader. Nothing here tokenizes."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from finetune.data.example import Row
from finetune.data.sources.open import located, open_source
from finetune.errors import DataError, FinetuneError
from finetune.plan.pinned import PinnedSource
from finetune.plan.plan import ROW_RULES, Plan
from finetune.recipe.schema import Source
from finetune.recipe.schema.tasks import Task

LONGEST = 2000  # characters of a text


@dataclass(frozen=True)
class Reread:
    """The sources that row numbers count through."""

    pairs: Sequence[tuple[Source, PinnedSource | None]]
    """Without a pin, a source is read as it is now."""
    task: Task
    row_rules: int

    def texts(self, numbers: Collection[int]) -> dict[int, str]:
        """The text of each row. DataError if a source is gone or has changed."""
        return {number: shown(row) for number, row in self._rows(numbers, is_written=False).items()}

    def column(self, name: str, numbers: Sequence[int]) -> list[str]:
        """What the rows have in a column, as text; the same errors, and one for a row without the column."""
        rows = self._rows(numbers, is_written=True)
        for number in numbers:
            if name not in rows[number]:
                known = ", ".join(rows[number])
                raise FinetuneError(f"row {number:,} has no column `{name}`", hint=f"its columns are: {known}")
        return [json.dumps(rows[number][name], sort_keys=True, default=str) for number in numbers]

    def _rows(self, numbers: Collection[int], is_written: bool) -> dict[int, Row]:
        found: dict[int, Row] = {}
        first = 0
        for source, pin in self.pairs:
            if pin and not any(first <= number < first + pin.rows for number in numbers):
                first += pin.rows
                continue
            place, revision = located(source, pin), pin.revision if pin else None
            rows = open_source(place, revision, self.row_rules, self.task.row_form, is_first_read=False)
            if pin and rows.fingerprint != pin.fingerprint:
                raise DataError("has other content than it had then", where=rows.name, hint="restore the file")
            read = rows.as_written if is_written else rows.__getitem__
            found |= {number: read(number - first) for number in numbers if first <= number < first + len(rows)}
            first += len(rows)
        return found


def held_out_rows(plan: Plan) -> Reread:
    """The sources of the held-out rows of a plan."""
    given = plan.recipe.data.holdout
    pairs = (
        zip(given, plan.holdout, strict=True)
        if isinstance(given, list)
        else zip(plan.recipe.data.train, plan.train, strict=True)
    )
    return Reread(list(pairs), plan.recipe.task, plan.row_rules)


def rows_of_set(plan: Plan, name: str) -> Reread:
    """The sources of an evaluation set of a plan."""
    pins = next(each.sources for each in plan.sets if each.name == name)
    return Reread(list(zip(plan.recipe.evaluate.sets[name].rows, pins, strict=True)), plan.recipe.task, plan.row_rules)


def rows_of_sources(sources: Sequence[Source], task: Task) -> Reread:
    """Sources as they are now."""
    return Reread([(source, None) for source in sources], task, ROW_RULES)


def shown(row: Row) -> str:
    """A row for a reader: its conversation, its text, or all of its columns as JSON."""
    if isinstance(messages := row.get("messages"), list):
        text = "\n".join(_turn(message) for message in messages)
    elif isinstance(row.get("text"), str):
        text = str(row["text"])
    else:
        text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _turn(message: object) -> str:
    if not isinstance(message, dict):
        return str(message)
    content = message.get("content")
    others = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    parts = [content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)]
    parts += [json.dumps(others, ensure_ascii=False, default=str)] if others else []
    return f"{message.get('role')}: {' '.join(parts)}"
