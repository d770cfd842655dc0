"""`data convert`: the rows of a recipe as messages, in one file. Reading it back gives the same examples to the token.

Rows stream through memory; the file appears when it is whole.
"""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import IO, TYPE_CHECKING, TypedDict

from finetune.data.conversation import FIELDS, conversation_of
from finetune.data.example import Row
from finetune.data.refusals import listed
from finetune.errors import DataError, FinetuneError
from finetune.recipe.load import LoadedRecipe
from finetune.store import beside
from finetune.store.durable import failures, rename, sync_file
from finetune.training.recipe_rows import OpenedSource, open_rows

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 4096  # of a Parquet row group
Rows = Callable[[], Iterator[Row]]
"""The rows, from the first one at each call."""


class Converted(TypedDict):
    path: str
    rows: int
    skipped: int
    """Bad rows, which the recipe skips."""
    bytes: int


def convert(loaded: LoadedRecipe, out: Path, source: str | None, is_forced: bool) -> Converted:
    """Writes the rows of the training sources, or of one source, as the ending of `out` says."""
    write = _writer(out)
    if out.exists() and not is_forced:
        raise FinetuneError("exists already", where=str(out), hint="name another file, or give --force to replace it")
    if out.is_dir():
        raise FinetuneError("is a directory", where=str(out), hint="name a file")
    sources = open_rows(loaded).named(source)
    is_chat, skips_bad = loaded.recipe.task.row_form == "conversation", loaded.recipe.data.on_bad_row == "skip"
    with failures(out, FinetuneError), beside.staged(out) as folder:
        made = folder / out.name
        rows = write(made, lambda: _rows(sources, is_chat, skips_bad))
        sync_file(made)
        size = made.stat().st_size
        rename(made, out)
    skipped = sum(len(opened.rows) for opened in sources) - rows
    return {"path": str(out), "rows": rows, "skipped": skipped, "bytes": size}


def _rows(sources: Sequence[OpenedSource], is_chat: bool, skips_bad: bool) -> Iterator[Row]:
    for opened in sources:
        for number in range(len(opened.rows)):
            try:
                row = opened.rows[number]
                made = as_messages(row, opened.rows.where(number)) if is_chat else row
            except DataError:
                if not skips_bad:
                    raise
                continue
            yield made


def as_messages(row: Row, where: str) -> Row:
    """The row with one list of messages, its `tools`, and the columns beside them. Turns that are not learnt say `train: false`."""
    conversation = conversation_of(row, where)
    messages = [
        {**message, "train": False} if message["role"] == "assistant" and number not in conversation.turns else message
        for number, message in enumerate(conversation.messages)
    ]
    tools = {} if conversation.tools is None else {"tools": conversation.tools}
    others = {column: value for column, value in row.items() if column not in FIELDS}
    return {"messages": messages, **tools, **others}


def _writer(out: Path) -> Callable[[Path, Rows], int]:
    name = out.name.lower()
    for ending, write in WRITERS.items():
        if name.endswith(ending):
            return write
    endings = ", ".join(WRITERS)
    raise FinetuneError("unknown ending", where=str(out), hint=f"name a file with one of {endings}")


def _json_lines(path: Path, rows: Rows) -> int:
    with path.open("wb") as file:
        return _lines(file, rows)


def _compressed_lines(path: Path, rows: Rows) -> int:
    """Without a time in its head, so equal rows make equal files."""
    with path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as compressed:
        return _lines(compressed, rows)


def _lines(file: IO[bytes] | gzip.GzipFile, rows: Rows) -> int:
    count = 0
    for row in rows():
        file.write(_json(row) + b"\n")
        count += 1
    return count


def _parquet(path: Path, rows: Rows) -> int:
    """Columns of one plain kind as such; messages, tools and mixed columns as JSON (`arrow.json`), as `datasets` writes them."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    schema, count = _schema(rows()), 0
    with ParquetWriter(path, schema) as writer:
        for some in _batches(rows()):
            columns = [pa.array([_value(row.get(field.name), field) for row in some], field.type) for field in schema]
            writer.write_table(pa.table(columns, schema=schema))
            count += len(some)
    return count


def _schema(rows: Iterator[Row]) -> "pa.Schema":
    """Found by a first look at all rows: one late row may have a column, or a kind, that no other has."""
    import pyarrow as pa

    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            is_huge = isinstance(value, int) and abs(value) >= 2**63
            kinds.setdefault(name, set()).add(list if is_huge else type(value))
    plain = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    fields = []
    for name, found in kinds.items():
        others = found - {NoneType}
        [kind] = others if len(others) == 1 else [list]
        fields.append(pa.field(name, plain.get(kind, pa.json_(pa.string()))))
    return pa.schema(fields)


def _value(value: object, field: "pa.Field") -> object:
    """An absent column is null, and so is a null."""
    is_json = getattr(field.type, "extension_name", None) == "arrow.json"
    return _json(value, field.name).decode() if is_json and value is not None else value


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while some := list(islice(rows, ROWS_AT_ONCE)):
        yield some


def _json(value: object, column: str = "") -> bytes:
    """Readable where it can be: only halves of surrogate pairs need escapes."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()
    except TypeError as error:
        named = [name for name in value if not _is_json(value[name])] if isinstance(value, dict) else []
        names = named or [column]
        hint = f"name it with data.train[].skip: [{', '.join(names)}]"
        raise DataError(f"the column {listed(names)} has no form in JSON: {error}", hint=hint) from None


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


WRITERS: dict[str, Callable[[Path, Rows], int]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _compressed_lines,
    ".parquet": _parquet,
}
