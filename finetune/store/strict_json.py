"""JSON without its traps: reading refuses repeated keys, and writing turns NaN and infinity into strings."""

import json
from collections.abc import Mapping
from math import isfinite


class RepeatedKeyError(ValueError):
    """Refuses a repeated key: Python keeps only its last value."""

    def __init__(self, key: str):
        self.key = key
        super().__init__("a key is repeated")


def from_json(text: str | bytes) -> object:
    """ValueError if it is not JSON, or an object has a key twice."""
    return json.loads(text, object_pairs_hook=_without_repeats)


def to_json(value: object) -> str:
    """Strict JSON on one line: floats as Python repr (they round-trip), non-finite ones as the strings "nan", "inf" and "-inf"."""
    return json.dumps(strict(value), allow_nan=False)


def strict(value: object) -> object:
    """A value whose non-finite floats are strings."""
    if isinstance(value, float):
        return value if isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKeyError(next(key for place, key in enumerate(keys) if key in keys[:place]))
    return found
