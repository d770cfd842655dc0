"""The content of a row, in one form for every file format: two rows are equal if this is. It must never refuse a row.

It skips columns unknown to the task, and everything that depends on a tokenizer or a template.
"""

from finetune.data.example import Row


def of_chat(row: Row) -> object:
    """The messages, those of `system`, `prompt` and `completion` too; keys without a value, which Parquet adds, do not count."""
    system = [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) else []
    if isinstance(given := row.get("messages"), list):
        return _without_nulls([*system, *given])
    parts = (("user", row.get("prompt")), ("assistant", row.get("completion")))
    messages = [[{"role": role, "content": part}] if isinstance(part, str) else part for role, part in parts]
    lists = [part for part in messages if isinstance(part, list)]
    if len(lists) == len(messages):
        return _without_nulls([*system, *lists[0], *lists[1]])
    # A bad row has a content, too. Encoding refuses it later, and names its place.
    return _without_nulls([given, *messages])


def of_text(row: Row) -> object:
    if row.get("text") is None and isinstance(row.get("input_ids"), list):
        return [row["input_ids"], row.get("labels")]
    return row.get("text")


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
