"""Patterns over the columns of a row, like `{context}\n\n{answers.text[0]}`: parsed here, filled in `data/shapes/patterns.py`.

No `str.format` and no `eval`: a pattern names fields of a row, and can do nothing else.
"""

import re
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator, WithJsonSchema

_NAME = re.compile(r'[^{}\[\]."]+')
_ITEM = re.compile(r"\[(-?\d{1,9})\]")
_QUOTED = re.compile(r'\["([^"{}]+)"\]')
_HINT = "write a field as `{name}`, `{name.field}` or `{name[0]}`, and a brace as `{{` or `}}`"


class PatternError(ValueError):
    """A pattern that cannot be read; its text says where in the pattern."""

    hint = _HINT


class Field(NamedTuple):
    """A value of a row: a column, then names of fields and numbers of items."""

    text: str
    """As the pattern writes it, without the braces."""
    path: tuple[str | int, ...]

    @property
    def column(self) -> str:
        return str(self.path[0])


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
    path: list[str | int] = []
    place = 0
    while place < len(inside):
        is_after_dot = bool(path) and inside[place] == "."
        name = _NAME.match(inside, place + is_after_dot) if is_after_dot or not path else None
        item = _ITEM.match(inside, place) if path else None
        found = name or item or _QUOTED.match(inside, place)
        if found is None or (found is name and found[0] != found[0].strip()):
            raise PatternError(f"has a field `{{{inside[:60]}}}` that cannot be read")
        path.append(int(found[1]) if found is item else found[0] if found is name else found[1])
        place = found.end()
    if not path:
        raise PatternError(f"has an empty field `{{}}` at character {start + 1}")
    return Field(inside, tuple(path)), end + 1


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
