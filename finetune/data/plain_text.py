"""The text of a plain-text row. Refuses bad content by name."""

from collections.abc import Mapping

from finetune.data.conversation import kind_of
from finetune.errors import DataError
from finetune.plan.plan import ROW_RULES

FIELDS = ("text",)


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
