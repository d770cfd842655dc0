"""The value of JSON text within a row. Everything that could lose a part of it, or exhaust the stack later, is refused."""

from pydantic_core import from_json

from finetune.store import strict_json


def json_of(text: str) -> object:
    """The value of JSON text. ValueError if it is damaged, repeats a key, is nested too deep, or has half of a surrogate pair."""
    value: object = from_json(text.encode())  # unlike `json`, it has a limit for depth, and refuses surrogates
    return strict_json.from_json(text) if isinstance(value, dict | list) else value
