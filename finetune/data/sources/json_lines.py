"""The reader of JSON Lines, in UTF-8. A bad file or row raises DataError."""

import re

from pydantic_core import from_json

from finetune.data.example import Row
from finetune.data.sources.lines import Lines
from finetune.data.sources.opened import Opened, Reading
from finetune.errors import DataError
from finetune.store import strict_json

HINT = 'each line holds one JSON object, like `{"text": "..."}`'


class JsonLines:
    """One JSON object a line. The file is mapped and rows are parsed on access."""

    kinds = None

    def __init__(self, file: Opened, most: int | None, reading: Reading):
        self._name, self._row_rules = file.name, reading.row_rules
        self.about = f"JSON Lines{file.packing}"
        self._lines = Lines(file, most)

    def __len__(self) -> int:
        return len(self._lines.numbers)

    def __getitem__(self, index: int) -> Row:
        content = self._lines.content(int(self._lines.numbers[index]))
        is_array = content.lstrip().startswith(b"[")
        hint = f"{HINT}; `jq -c '.[]'` makes lines of an array, or call the file `.json`" if is_array else HINT
        return parsed(content, self.where(index), hint, self._row_rules)

    def where(self, index: int) -> str:
        return f"{self._name}:{self._lines.numbers[index] + 1}"


def parsed(content: bytes, where: str, hint: str, row_rules: int) -> Row:
    """The object in these bytes."""
    try:
        row = from_json(content.decode())
        if row_rules > 1:
            strict_json.from_json(content)
    except UnicodeDecodeError as error:
        raise DataError("is not UTF-8 text", where=where, hint="save the file as UTF-8") from error
    except strict_json.RepeatedKeyError as error:
        raise DataError(f"repeats the key `{error.key}`", where=where, hint="keep one of the values") from None
    except ValueError as error:
        reason = re.sub(r" at line \d+ column (\d+)$", r" at column \1", str(error))
        raise DataError(f"bad JSON: {reason}", where=where, hint=hint) from error
    if not isinstance(row, dict):
        raise DataError("is not a JSON object", where=where, hint=hint)
    return row
