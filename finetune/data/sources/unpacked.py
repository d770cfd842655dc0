"""Packed text files: unpacked once into the cache, a piece at a time, by the content of the packed file; small ones in memory."""

import bz2
import gzip
import lzma
import os
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from blake3 import blake3

from finetune.data.refusals import first_line
from finetune.data.sources import fingerprints
from finetune.data.sources.opened import Opened
from finetune.errors import DataError
from finetune.store import cache

VERSION = 1  # of the files in the cache
PIECE_BYTES = 1 << 20
SAID_BYTES = 1 << 28  # from here on it takes seconds
CONTENT = "content"
SMALL_BYTES, MOST_SMALL_BYTES = 1 << 16, 1 << 20  # of files that are unpacked in memory: packed, and unpacked


class Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


def unpacked(path: str, name: str) -> Opened:
    """The file, or what it holds if it is packed; messages call it `name`."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in PACKERS:
        return Opened(name, path)
    if os.stat(path).st_size <= SMALL_BYTES and (small := _in_memory(Opened(name, path), PACKERS[ending])) is not None:
        return Opened(name, path, small)
    content = fingerprints.of_file(path)
    key = blake3(f"{VERSION}\n{ending}\n{content}".encode()).hexdigest()[:32]
    made = cache.built("unpacked", key, partial(_unpack, Opened(name, path), PACKERS[ending], content))
    return Opened(name, str(made / CONTENT))


def _in_memory(file: Opened, unpacking: Callable[[BinaryIO], Stream]) -> bytes | None:
    """What a small file holds; None if that is not small. An entry of the cache takes longer to make than to unpack it again."""
    pieces, size = [], 0
    with open(file.path, "rb") as packed:
        stream = _opened(file.name, unpacking, _Hashed(packed))
        while piece := _piece(file.name, stream):
            pieces.append(piece)
            size += len(piece)
            if size > MOST_SMALL_BYTES:
                return None
    return b"".join(pieces)


def _unpack(file: Opened, unpacking: Callable[[BinaryIO], Stream], content: str, directory: Path) -> None:
    name = file.name
    if os.stat(file.path).st_size >= SAID_BYTES:
        print(f"unpacking {name}, once", file=sys.stderr, flush=True)
    with open(file.path, "rb") as packed, open(directory / CONTENT, "wb") as made:
        hashed = _Hashed(packed)
        stream = _opened(name, unpacking, hashed)
        while piece := _piece(name, stream):
            made.write(piece)
        while hashed.read(PIECE_BYTES):
            pass
    if f"blake3:{hashed.digest.hexdigest()}" != content:
        raise DataError("was changed while it was unpacked", where=name, hint="run again when nothing writes to it")


def _opened(name: str, unpacking: Callable[[BinaryIO], Stream], packed: "_Hashed") -> Stream:
    try:
        return unpacking(packed)  # type: ignore[arg-type] # what is read of it
    except (OSError, EOFError, ValueError) as error:
        raise _damaged(name, error) from error


def _piece(name: str, stream: Stream) -> bytes:
    try:
        return stream.read(PIECE_BYTES)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> DataError:
    ending = os.path.splitext(name)[1].lower()
    return DataError(f"is not a whole `{ending}` file: {first_line(error)}", where=name, hint="write or fetch it again")


class _Hashed:
    """A file whose bytes are hashed as they are read."""

    closed = False
    mode = "rb"

    def __init__(self, file: BinaryIO):
        self._file, self.digest = file, blake3()

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self.digest.update(piece)
        return piece

    def close(self) -> None:
        """Its opener closes the file."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


def _zstd(packed: BinaryIO) -> Stream:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd")


PACKERS: dict[str, Callable[[BinaryIO], Stream]] = {
    ".gz": lambda packed: gzip.GzipFile(fileobj=packed),
    ".zst": _zstd,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
