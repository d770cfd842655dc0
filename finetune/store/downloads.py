"""Compares downloads from the Hub with their commit, and explains errors of a disk; for bases, data sets and
verified packages."""

import errno
import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from finetune.errors import FinetuneError
from finetune.store import cache
from finetune.store.boot import boot_id
from finetune.store.durable import HINTS

ErrorT = TypeVar("ErrorT", bound=FinetuneError)

PIECE_BYTES = 1 << 20
POINTER = b"version https://git-lfs.github.com/spec/"
PULL = "fetch it with `git lfs pull`"


def is_pointer(file: Path) -> bool:
    """Whether Git wrote the address of a large file in place of its content, as it does without Git LFS."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(POINTER)) == POINTER
    except OSError:
        return False


def refuse_damaged(files: Iterable[Path], kind: type[FinetuneError], where: str, made_of_them: str = "") -> None:
    """An error of `kind` if a file of the Hub's cache differs from the commit's hash; the Hub's client does not check.

    Reads each file once a boot, unless it changes. The cache names a large file by its SHA-256 and others by git's SHA-1, and may
    keep it elsewhere under another hash (https://huggingface.co/docs/hub/local-cache). It cannot tell if the disk has no symbolic
    links, or if a file was removed.
    """
    blobs = sorted((file.readlink().name, str(file.resolve())) for file in files if file.is_symlink() and file.exists())
    facts = [[*blob, *_state(Path(blob[1]))] for blob in blobs]

    def find() -> None:
        with ThreadPoolExecutor() as threads:
            are_sound = list(threads.map(_is_sound, blobs))
        if not all(are_sound):
            place = blobs[are_sound.index(False)][1]
            message = "a file is not what the Hub has: it was damaged on its way, or on this disk"
            rest = f" and {made_of_them}" if made_of_them else ""
            raise kind(message, where=where, hint=f"remove {place}{rest}, so that it is downloaded again")

    cache.found("downloads", [facts, boot_id()], find)


def _state(blob: Path) -> list[int]:
    status = blob.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _is_sound(blob: tuple[str, str]) -> bool:
    """Whether the file has the hash in its name; the number of digits tells which kind. Other names pass."""
    name, place = blob
    header = b"blob %d\0" % Path(place).stat().st_size
    sha1 = partial(hashlib.sha1, usedforsecurity=False)
    hashes = {64: [hashlib.sha256()], 40: [sha1(header), sha1()]}.get(len(name))  # proxies may not do it as git does
    if hashes is None:
        return True
    with open(place, "rb", buffering=0) as stream:
        while piece := stream.read(PIECE_BYTES):
            for one in hashes:
                one.update(piece)
    return name in [one.hexdigest() for one in hashes]


def refusal_of_disk(error: BaseException | None, kind: type[ErrorT], where: str) -> ErrorT | None:
    """The error about `where`, if a disk made a client of the Hub fail, whatever error the client raised; else None.

    A network may refuse permission, too. A disk's error has a file name, or comes from Rust, as in Xet's client.
    """
    while error is not None:
        in_rust = re.search(r"\(os error (\d+)\)", str(error))
        number = int(in_rust[1]) if in_rust else getattr(error, "errno", None)
        file = getattr(error, "filename", None)
        is_permission = number in (errno.EACCES, errno.EPERM) and (file or in_rust)
        if number and (is_permission or number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)):
            message = f"downloads cannot be kept: {os.strerror(number).lower()}{f': {file}' if file else ''}"
            return kind(message, where=where, hint=HINTS[number])
        error = error.__cause__ or error.__context__
    return None
