"""Values of Arrow columns: reads JSON kept as text, and drops nulls that only fill in for absent fields.

`datasets` writes lists of mixed objects as JSON (the extension type `arrow.json`). A null in there is real and stays.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.data.json_text import json_of

if TYPE_CHECKING:
    import pyarrow as pa

Kinds = Mapping[str, "pa.DataType"]
"""Arrow's type of each column."""


def without_nulls(row: dict[str, object], kinds: Kinds) -> dict[str, object]:
    """A row without the null fields that only other rows have; its columns stay."""
    return {column: _without_nulls(value, kinds.get(column)) for column, value in row.items()}


def has_json(kind: "pa.DataType") -> bool:
    return _is_json(kind) or any(has_json(kind.field(number).type) for number in range(kind.num_fields))


def with_json(value: object, kind: "pa.DataType") -> object:
    """The value with its JSON parsed. Raises ValueError if that is damaged."""
    if _is_json(kind):
        return json_of(value) if isinstance(value, str) else value
    if isinstance(value, list):
        return [with_json(item, kind.value_type) for item in value]
    if isinstance(value, dict):
        return {field: with_json(item, kind.field(field).type) for field, item in value.items()}
    return value


def _without_nulls(value: object, kind: "pa.DataType | None") -> object:
    if kind is not None and _is_json(kind):
        return value
    if isinstance(value, list):
        inner = getattr(kind, "value_type", None)
        return [_without_nulls(item, inner) for item in value]
    if isinstance(value, dict):
        inside = {kind.field(number).name: kind.field(number).type for number in range(kind.num_fields)} if kind else {}
        return {field: _without_nulls(item, inside.get(field)) for field, item in value.items() if item is not None}
    return value


def _is_json(kind: "pa.DataType") -> bool:
    return getattr(kind, "extension_name", None) == "arrow.json"
