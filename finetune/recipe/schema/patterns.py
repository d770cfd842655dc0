"""Patterns over the columns of a row, like `{context}\n\n{answers.text[0]}`: parsed here, filled in `data/shapes/patterns.py`.

No `str.format` and no `eval`: a pattern names fields of a row, and can do nothing else.
"""

import re
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, WithJsonSchema

_NAME = re.compile(r'[^{}\[\]."]+')
_ITEM = re.compile(r"\[(-?\d{1,9})\]")
_QUOTED = re.compile(r'\["([^"{}]+)"\]')
_BY_COLUMN = re.compile(r'\[([^{}\[\]."\d\s-][^{}\[\]."]*)\]')
_HINT = "write a field as `{name}`, `{name.field}`, `{name[0]}` or `{name[column]}`, and a brace as `{{` or `}}`"


class PatternError(ValueError):
    """A pattern that cannot be read; its text says where in the pattern."""

    hint = _HINT


class ByColumn(NamedTuple):
    """The item whose number, or the field whose name, a column of the row has."""

    column: str


Step = str | int | ByColumn


class Field(NamedTuple):
    """A value of a row: a column, then names of fields and numbers of items."""

    text: str
    """As the pattern writes it, without the braces."""
    path: tuple[Step, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return (str(self.path[0]), *(step.column for step in self.path if isinstance(step, ByColumn)))


Parts = tuple[str | Field, ...]


def parsed(pattern: str) -> Parts:
    """The texts and fields of a pattern, in its order. Raises PatternError."""
    parts: list[str | Field] = []
    place, text = 0, ""
    while place < len(pattern):
        if pattern.startswith(("{{", "}}"), place):
            text += pattern[place]
            place += 2
        elif pattern[place] == "}":
            raise PatternError(f"has a `}}` without `{{` at character {place + 1}")
        elif pattern[place] == "{":
            field, place = _field(pattern, place)
            parts += [text, field] if text else [field]
            text = ""
        else:
            text += pattern[place]
            place += 1
    return (*parts, text) if text else tuple(parts)


def fields(pattern: str) -> list[Field]:
    return [part for part in parsed(pattern) if isinstance(part, Field)]


def _field(pattern: str, start: int) -> tuple[Field, int]:
    """The field whose `{` is at `start`, and the place after its `}`."""
    end = pattern.find("}", start)
    if end < 0:
        raise PatternError(f"has a `{{` without `}}` at character {start + 1}")
    inside = pattern[start + 1 : end]
    path: list[Step] = []
    place = 0
    while place < len(inside):
        step, end_of_step = _step(inside, place, is_first=not path)
        if step is None:
            raise PatternError(f"has a field `{{{inside[:60]}}}` that cannot be read")
        path.append(step)
        place = end_of_step
    if not path:
        raise PatternError(f"has an empty field `{{}}` at character {start + 1}")
    return Field(inside, tuple(path)), end + 1


def _step(inside: str, place: int, is_first: bool) -> tuple[Step | None, int]:
    """The step at a place of a field, and where it ends; None if there is none."""
    if quoted := _QUOTED.match(inside, place):
        return quoted[1], quoted.end()
    if not is_first and (item := _ITEM.match(inside, place)):
        return int(item[1]), item.end()
    if not is_first and (named := _BY_COLUMN.match(inside, place)):
        return ByColumn(named[1]), named.end()
    is_after_dot = not is_first and inside[place] == "."
    name = _NAME.match(inside, place + is_after_dot) if is_first or is_after_dot else None
    return (name[0], name.end()) if name and name[0] == name[0].strip() else (None, place)


def _pattern(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError("must be a pattern like `{question}`")
    parsed(value)
    return value


def _pattern_with_field(value: object) -> object:
    _pattern(value)
    if isinstance(value, str) and not fields(value):
        raise ValueError("names no column, so it would be the same for each row; write a field as `{name}`")
    return value


_SCHEMA = WithJsonSchema({"type": "string"})
Pattern = Annotated[str, BeforeValidator(_pattern), _SCHEMA]
PatternWithField = Annotated[str, BeforeValidator(_pattern_with_field), _SCHEMA]
