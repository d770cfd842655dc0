"""The reader of `.json` files: one array of objects, an object with one list of objects in it, or objects one after another.

A large file has no places to jump to, so its rows are written as lines into the cache once, in bounded memory.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from blake3 import blake3
from pydantic_core import from_json

from finetune.data.example import Row
from finetune.data.refusals import listed
from finetune.data.sources import fingerprints
from finetune.data.sources.json_lines import JsonLines, parsed
from finetune.data.sources.json_scanner import Scanner
from finetune.data.sources.lines import BYTE_ORDER_MARK, Lines, is_utf_16
from finetune.data.sources.opened import Opened, Reading
from finetune.errors import DataError
from finetune.store import cache

VERSION = 1  # of the lines in the cache
START_BYTES = 1 << 24
SMALL_BYTES = 1 << 20  # up to here a file is held in memory
ROWS, FACTS = "rows.jsonl", "facts.json"
ITEM_HINT = 'each item is one object, like `{"text": "..."}`'
ROW_FIELDS = frozenset(
    ("messages", "prompt", "completion", "text", "conversations", "instruction", "output", "chosen", "rejected")
)
"""An object with one of these is a row itself, whatever lists it has."""


def is_document(file: Opened) -> bool:
    """Whether the rows are the items of a list or an object that takes several lines, and not JSON Lines."""
    with file.open() as stream:
        start = stream.read(START_BYTES).removeprefix(BYTE_ORDER_MARK)
        is_whole = not stream.read(1)
    content = start.lstrip()
    if is_utf_16(start) or content[:1] not in (b"[", b"{"):
        return False
    if content[:1] == b"[":
        return True
    line, _, rest = content.partition(b"\n")
    row = _json(line)
    if row is not None:
        return not rest.strip() and is_whole and not _is_row(row)
    return True


def json_file(file: Opened, most: int | None, reading: Reading) -> "JsonLines | JsonDocument":
    """The reader of a `.json` file, whichever it is."""
    return (JsonDocument if is_document(file) else JsonLines)(file, most, reading)


class JsonDocument:
    """The objects of a JSON file that are its rows. Memory: 8 bytes a row, or a small file."""

    kinds = None

    def __init__(self, file: Opened, most: int | None, reading: Reading):
        if file.size <= SMALL_BYTES:
            with file.open() as stream:
                scan = _Scan(Scanner(stream, file.name), file)
                texts = [text.encode() for text in islice(scan.texts(), most)]
            self._text: Callable[[int], bytes] = texts.__getitem__
            self._count, name, about = len(texts), scan.list, scan.about
        else:
            key = "\n".join([str(VERSION), _content(file), str(most)])
            made = cache.built("json-rows", blake3(key.encode()).hexdigest()[:32], partial(_build, file, most))
            facts = json.loads((made / FACTS).read_text())
            lines = Lines(Opened(file.name, str(made / ROWS)), None) if facts["rows"] else None
            self._text = lines.content if lines else lambda _: b""
            self._count, name, about = facts["rows"], facts["list"], facts["about"]
        self.about = f"{about}{file.packing}"
        self._name, self._row_rules = f"{file.name} {name}" if name else file.name, reading.row_rules

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Row:
        return parsed(self._text(index), self.where(index), ITEM_HINT, self._row_rules)

    def where(self, index: int) -> str:
        return f"{self._name}[{index}]"


def _build(file: Opened, most: int | None, directory: Path) -> None:
    count = 0
    with file.open() as stream, open(directory / ROWS, "w", encoding="utf-8") as rows:
        scan = _Scan(Scanner(stream, file.name), file)
        for text in islice(scan.texts(), most):
            count += 1
            rows.write(text.replace("\r", " ").replace("\n", " ") + "\n")  # in JSON they stand only between values
    (directory / FACTS).write_text(json.dumps({"rows": count, "list": scan.list, "about": scan.about}))


class _Scan:
    """The texts of a file's rows; which list they are in is known after the first."""

    def __init__(self, scanner: Scanner, file: Opened):
        self._scanner, self._file = scanner, file
        self._document: _Document | None = None
        self._about = "a JSON array"

    def texts(self) -> Iterator[str]:
        if self._scanner.peek() == "[":
            return _items(self._scanner, self._file.name)
        if _is_sequence(self._file):
            self._about = "JSON objects"
            return _sequence(self._scanner, self._file.name)
        self._document = _Document(self._scanner, self._file.name)
        return self._document.rows()

    @property
    def list(self) -> str:
        """The name of the list that the rows are in, if they are in an object."""
        return self._document.name if self._document else ""

    @property
    def about(self) -> str:
        return f"the list `{self.list}` of a JSON object" if self._document else self._about


def _items(scanner: Scanner, place: str) -> Iterator[str]:
    """The texts of the objects of an array, up to the end of the file."""
    yield from _objects(scanner, place)
    if rest := scanner.peek():
        raise scanner.error(f"bad JSON: `{rest}` after the end of the array")


def _objects(scanner: Scanner, place: str) -> Iterator[str]:
    """The texts of the items of a list, which have to be objects."""
    scanner.skip("[")
    number, sign = 0, "" if scanner.peek() != "]" else scanner.skip("]")
    while sign != "]":
        value, text = scanner.value()
        if not isinstance(value, dict):
            raise DataError("is not a JSON object", where=f"{place}[{number}]", hint=ITEM_HINT)
        yield text
        number, sign = number + 1, scanner.skip(",", "]")


def _sequence(scanner: Scanner, place: str) -> Iterator[str]:
    number = 0
    while scanner.peek():
        value, text = scanner.value()
        if not isinstance(value, dict):
            raise DataError("is not a JSON object", where=f"{place}[{number}]", hint=ITEM_HINT)
        yield text
        number += 1


class _Document:
    """An object, in which one list of objects is looked for, also one level deeper."""

    def __init__(self, scanner: Scanner, place: str):
        self._scanner, self._place = scanner, place
        self._lists: list[str] = []

    @property
    def name(self) -> str:
        return self._lists[0]

    def rows(self) -> Iterator[str]:
        yield from self._fields("")
        if self._scanner.peek():
            raise self._scanner.error(f"bad JSON: `{self._scanner.peek()}` after the end of the object")
        if len(self._lists) > 1:
            hint = "write each list to a file, and name the files"
            message = f"has several lists of objects: {listed(self._lists)}"
            raise DataError(message, where=self._place, hint=hint)
        if not self._lists:
            hint = "give an array of objects; pandas writes one with `to_json(orient='records')`"
            raise DataError("has no list of objects, so no rows", where=self._place, hint=hint)

    def _fields(self, prefix: str) -> Iterator[str]:
        """The rows among the fields of an object."""
        self._scanner.skip("{")
        sign = "" if self._scanner.peek() != "}" else self._scanner.skip("}")
        while sign != "}":
            if self._scanner.peek() != '"':
                self._scanner.skip('"')
            name = f"{prefix}{self._scanner.value()[0]}"
            self._scanner.skip(":")
            opening = self._scanner.peek()
            if opening == "[":
                yield from self._items(name)
            elif opening == "{" and not prefix:
                yield from self._fields(f"{name}.")
            else:
                self._scanner.value()
            sign = self._scanner.skip(",", "}")

    def _items(self, name: str) -> Iterator[str]:
        """The rows in a list, if it is one of objects."""
        self._scanner.skip("[")
        number, sign, has_rows = 0, "" if self._scanner.peek() != "]" else self._scanner.skip("]"), False
        while sign != "]":
            value, text = self._scanner.value()
            if number == 0 and isinstance(value, dict):
                has_rows = True
                self._lists.append(name)
            if has_rows and not isinstance(value, dict):
                where = f"{self._place} {name}[{number}]"
                raise DataError("is not a JSON object", where=where, hint=ITEM_HINT)
            if has_rows and len(self._lists) == 1:
                yield text
            number, sign = number + 1, self._scanner.skip(",", "]")


def _content(file: Opened) -> str:
    return fingerprints.of_file(file.path) if file.content is None else blake3(file.content).hexdigest()


def _is_sequence(file: Opened) -> bool:
    """Whether the file is objects one after another, or one object that is a row."""
    with file.open() as stream:
        start = stream.read(START_BYTES).removeprefix(BYTE_ORDER_MARK)
        is_whole = not stream.read(1)
    try:
        text = start.decode(errors="ignore").lstrip()
        row, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return bool(text[end:].strip()) or not is_whole or _is_row(row)


def _json(line: bytes) -> dict[str, object] | None:
    try:
        row = from_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _is_row(found: dict[str, object]) -> bool:
    """Whether an object is a row, and not what holds the rows."""
    inside = [found, *(value for value in found.values() if isinstance(value, dict))]
    lists = [value for each in inside for value in each.values() if isinstance(value, list) and value]
    firsts = [value[0] for value in lists if isinstance(value[0], dict)]
    is_turn = any("role" in first or "from" in first for first in firsts)
    return is_turn or not firsts or not ROW_FIELDS.isdisjoint(found)
