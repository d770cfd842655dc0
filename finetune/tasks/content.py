"""The content of a row, in one form for every file format: two rows are equal if this is. It must never refuse a row.

It skips columns unknown to the task, and everything that depends on a tokenizer or a template.
"""


def of_chat(row: dict) -> object:
    """The messages, those of `system`, `prompt` and `completion` too; keys without a value, which Parquet adds, do not count."""
    system = [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) else []
    if isinstance(row.get("messages"), list):
        return _without_nulls([*system, *row["messages"]])
    parts = (("user", row.get("prompt")), ("assistant", row.get("completion")))
    messages = [[{"role": role, "content": part}] if isinstance(part, str) else part for role, part in parts]
    if all(isinstance(part, list) for part in messages):
        return _without_nulls([*system, *messages[0], *messages[1]])
    return _without_nulls([row.get("messages"), *messages])


def of_text(row: dict) -> object:
    return row.get("text")


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
