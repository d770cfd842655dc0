"""What a shape is: how it is recognised from a row's columns and values, and how it makes the row that a task reads."""

from collections.abc import Callable, Collection
from typing import NamedTuple, NoReturn

from finetune.data.conversation import kind_of
from finetune.data.example import Row
from finetune.data.json_text import json_of
from finetune.errors import DataError

FIRST = {"conversation": "messages", "text": "text"}
"""By form of a task's rows: the column that it reads before all others."""
HINT = "name another shape with data.train[].format, or write a pattern"


class Shape(NamedTuple):
    form: str
    """The rows that it makes: `conversation` or `text`."""
    fits: Callable[[Row], bool]
    """Whether a row has this shape; must not raise."""
    canonical: Callable[[Row, str], Row]
    """(row, place) -> the row with the columns of its form. It has none of the columns that were used, and all others. Raises DataError."""
    is_near: Callable[[Row], bool] = lambda row: False
    """Whether a row that has no shape is best refused by this one."""


def replaced(row: Row, used: Collection[str], made: Row, form: str, where: str) -> Row:
    """The row with the columns `made` in place of the `used` ones. Refuses another column that the task would read instead."""
    kept = {column: value for column, value in row.items() if column not in used}
    for column in (FIRST[form], *made):
        if kept.pop(column, None) is not None:
            read = ", ".join(f"`{name}`" for name in used if name in row)
            hint = f"name the one to drop: data.train[].skip: [{column}]"
            raise DataError(f"has a column `{column}` beside {read}", where=where, hint=hint)
    return kept | made


def refuse(name: str, row: Row, lacks: str, where: str) -> NoReturn:
    columns = ", ".join(sorted(row)) or "none"
    raise DataError(f"does not fit the format `{name}`: {lacks}; its columns are: {columns}", where=where, hint=HINT)


def listed(value: object) -> object:
    """A list, or the list that JSON text spells; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json_of(value)
        except ValueError:
            return value
    return value


def text_of(row: Row, column: str, name: str, where: str) -> str:
    """The text of a column; `name` is the shape's."""
    value = row.get(column)
    if value is None:
        refuse(name, row, f"`{column}` is null" if column in row else f"it has no `{column}`", where)
    if not isinstance(value, str):
        raise DataError(f"`{column}` must be text, not {kind_of(value)}", where=where)
    return value


def optional_text(row: Row, column: str, where: str) -> str:
    """The text of a column, empty for null or no column."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"`{column}` must be text, not {kind_of(value)}", where=where)
    return value


SYSTEMS = ("system", "system_prompt")


def system_of(row: Row, where: str) -> Row:
    """The canonical column `system`, if the row has a system message beside its turns."""
    texts = list(dict.fromkeys(filter(None, (optional_text(row, name, where) for name in SYSTEMS))))
    if len(texts) > 1:
        raise DataError("has a `system` column and another system message", where=where, hint="keep one of them")
    return {"system": texts[0]} if texts else {}
