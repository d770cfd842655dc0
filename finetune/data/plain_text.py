"""The text of a plain-text row, or its tokens. Refuses bad content by name."""

from collections.abc import Mapping
from typing import NamedTuple

from finetune.data.conversation import kind_of
from finetune.errors import DataError
from finetune.plan.plan import ROW_RULES

FIELDS = ("text", "input_ids", "labels", "attention_mask", "loss_mask")


class Tokens(NamedTuple):
    """A row that is tokens already."""

    ids: list[int]
    supervised: list[bool]


def content_of(row: Mapping[str, object], where: str, row_rules: int = ROW_RULES) -> str | Tokens:
    """The text of a row, or its tokens, as the shape `tokens` makes them."""
    ids, labels = row.get("input_ids"), row.get("labels")
    if row_rules == 1 or row.get("text") is not None or not isinstance(ids, list):
        return text_of(row, where, row_rules)
    learnt = labels if isinstance(labels, list) else ids
    return Tokens(ids, [label >= 0 for label in learnt])


def text_of(row: Mapping[str, object], where: str, row_rules: int = ROW_RULES) -> str:
    """The text of a row; the same for all row rules."""
    text = row.get("text")
    if "text" not in row:
        present = ", ".join(sorted(row)) or "none"
        raise DataError(
            f"has no `text`; its columns are: {present}",
            where=where,
            hint="map a column with data.train[].columns, like {text: body}",
        )
    if not isinstance(text, str):
        raise DataError(f"`text` must be text, not {kind_of(text)}", where=where)
    if not text.strip():
        raise DataError("has an empty text", where=where, hint="remove the row")
    return text
