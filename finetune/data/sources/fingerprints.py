"""What the files of a source hold, as `blake3:…`, and the facts by which a change is seen. Names and times do not count."""

import json
import os
from collections.abc import Sequence
from functools import lru_cache

from blake3 import blake3

State = tuple[int, ...]
SMALL_BYTES = 1 << 20  # up to here a file is read, not mapped


def state_of_file(name: str) -> State | None:
    """Facts that change when a file does: device, inode, size and times. None if there is no file."""
    try:
        status = os.stat(name)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def of_file(name: str) -> str:
    """`blake3:…` of a file's content, read once in a process until the file changes. OSError if it cannot be read."""
    return _of_file(name, state_of_file(name) or ())


@lru_cache(maxsize=256)
def _of_file(name: str, as_it_is: State) -> str:
    digest = blake3(max_threads=blake3.AUTO)
    if as_it_is and as_it_is[2] > SMALL_BYTES:
        digest.update_mmap(name)
    else:
        with open(name, "rb") as file:
            digest.update(file.read())
    return f"blake3:{digest.hexdigest()}"


def of_files(names: Sequence[str], kinds: Sequence[str]) -> str:
    """Of several files in their order, or of one. A kind is empty where the same bytes are read only in this way."""
    if len(names) == 1 and not kinds[0]:
        return of_file(names[0])
    contents = json.dumps([[kind, of_file(name)] for name, kind in zip(names, kinds, strict=True)])
    return f"blake3:{blake3(contents.encode()).hexdigest()}"


def state_of_files(names: Sequence[str]) -> State:
    """The facts of many files in few numbers."""
    digest = blake3()
    for name in names:
        digest.update(f"{name}\0{state_of_file(name)}\n".encode("utf-8", "surrogateescape"))
    return len(names), int.from_bytes(digest.digest(16), "big")
