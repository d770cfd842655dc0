"""Rows by the patterns of a recipe: fills `{fields}` with the values of a row. It must never evaluate anything."""

import json
from collections.abc import Mapping
from contextlib import suppress
from math import isfinite

from finetune.data.conversation import kind_of
from finetune.data.example import Row
from finetune.data.json_text import json_of
from finetune.data.shapes.shape import Shape, replaced
from finetune.errors import DataError
from finetune.recipe.schema.patterns import ByColumn, Field, Parts, parsed


def shape_of(patterns: Mapping[str, str], form: str) -> Shape:
    """The shape that patterns make: by the name of a canonical column, its pattern."""
    parts = {column: parsed(pattern) for column, pattern in patterns.items()}
    used = {column for some in parts.values() for part in some if isinstance(part, Field) for column in part.columns}

    def canonical(row: Row, where: str) -> Row:
        made: Row = {column: filled(some, column, row, where) for column, some in parts.items()}
        return replaced(row, used, made, form, where)

    return Shape(form, lambda row: True, canonical)


def filled(parts: Parts, column: str, row: Row, where: str) -> str:
    """The text of a pattern for a row; `column` is what it makes."""
    return "".join(part if isinstance(part, str) else _value(part, column, row, where) for part in parts)


def _value(field: Field, column: str, row: Row, where: str) -> str:
    value: object = row
    reached = ""
    for each in field.path:
        step = _key(each, row, field, column, where) if isinstance(each, ByColumn) else each
        value = _stepped(value, step, reached, field, column, where)
        reached += f"[{step}]" if isinstance(step, int) else f".{step}" if reached else step
    return written(value, f"`{field.text}` of the pattern `{column}`", where)


def _key(by: ByColumn, row: Row, field: Field, column: str, where: str) -> str | int:
    """The number of an item, or the name of a field, that a column has. Text of digits is a number: labels are often written so."""
    key = _stepped(row, by.column, "", field, column, where)
    if isinstance(key, str) and key.isdecimal() and len(key) < 10:
        return int(key)
    if isinstance(key, str) or (isinstance(key, int) and not isinstance(key, bool)):
        return key
    raise _refusal(f"`{by.column}` is {kind_of(key)}, not the number of an item", field, column, where)


def _stepped(value: object, step: str | int, reached: str, field: Field, column: str, where: str) -> object:
    """The field or item of a value. JSON text counts as what it spells."""
    if isinstance(value, str):
        with suppress(ValueError):  # of text that is no JSON, which is refused below
            value = json_of(value)
    if isinstance(step, int):
        if not isinstance(value, list):
            raise _refusal(f"`{reached}` is {kind_of(value)}, not a list", field, column, where)
        if not -len(value) <= step < len(value):
            raise _refusal(f"`{reached}` has {len(value)} items, no item {step}", field, column, where)
        return value[step]
    if not isinstance(value, dict):
        raise _refusal(f"`{reached}` is {kind_of(value)}, not an object", field, column, where)
    if step not in value:
        there = ", ".join(f"`{name}`" for name in value) or "none"
        named = (
            f"`{reached}` has no field `{step}`, there is {there}"
            if reached
            else f"no column `{step}`, there is {there}"
        )
        raise _refusal(named, field, column, where)
    return value[step]


def _refusal(message: str, field: Field, column: str, where: str) -> DataError:
    return DataError(f"`{field.text}` of the pattern `{column}`: {message}", where=where, hint="correct the pattern")


def written(value: object, name: str, where: str) -> str:
    """A value as text: text as it is, numbers, true and false as JSON writes them. Refuses any other value by name."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int) or (isinstance(value, float) and isfinite(value)):
        return json.dumps(value)
    if value is None:
        raise DataError(f"{name} is null", where=where, hint="remove the row, or set data.on_bad_row: skip")
    if isinstance(value, float) and value == value:
        raise DataError(f"{name} is infinite", where=where)
    hint = "name an item or a field of it" if isinstance(value, list | dict) else None
    raise DataError(f"{name} is {kind_of(value)}, not text or a number", where=where, hint=hint)
