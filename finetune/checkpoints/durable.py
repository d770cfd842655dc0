"""Floor 0. Files and names that survive a power cut, and the disk's refusals in plain words; for `store`, `lease` and `journal`."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import blake3

from finetune.checkpoints.tensors import TensorRecord
from finetune.errors import CheckpointError, FinetuneError

HINTS = {
    errno.ENOSPC: "free some space on this disk, or use another one; nothing that was committed is lost",
    errno.EDQUOT: "free some of your disk quota, or use another disk; nothing that was committed is lost",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows",
    errno.EIO: "the disk reports errors: look at `dmesg`, and use another disk",
    errno.EROFS: "the disk is mounted read-only: use another directory",
    errno.ENOENT: "somebody removed a directory of the run",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check owner and permissions of the directory, or use another one"),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST), "a file is where a directory should be: move it, or use another directory"
    ),
}


WRITE_BACK_BYTES = 16 << 20  # handed to the disk while the next ones are hashed, so that the sync at the end is short


class HashedFile:
    """A file under way; what is written passes through the digest, so nothing is read twice."""

    def __init__(self, raw: BinaryIO):
        self.bytes = 0
        self.tensors: tuple[TensorRecord, ...] = ()
        self._raw = raw
        self._handed_over = 0
        self._blake3 = blake3.blake3()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:  # an unbuffered write may take less than it is given
            count = self._raw.write(view)
            self._blake3.update(view[:count])
            self.bytes += count
            view = view[count:]
        if self.bytes - self._handed_over >= WRITE_BACK_BYTES:
            # DONTNEED begins to write dirty pages, and drops clean ones only: what is under way stays in memory to be read back
            os.posix_fadvise(
                self._raw.fileno(), self._handed_over, self.bytes - self._handed_over, os.POSIX_FADV_DONTNEED
            )
            self._handed_over = self.bytes

    def digest(self) -> str:
        return f"blake3:{self._blake3.hexdigest()}"


@contextmanager
def durable(path: Path) -> Iterator[HashedFile]:
    """A new file, synced before it is closed. It is read-only for everybody within the umask, and only this descriptor writes it."""
    with open(path, "xb", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o444)) as raw:
        yield HashedFile(raw)
        os.fsync(raw.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Writes a whole file, durably and read-only, so that a crash leaves the old or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    with durable(temporary) as file:
        file.write(data)
    os.replace(temporary, path)
    sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """`mkdir -p` whose directory is still there after a power cut, also if a killed process made it and had no time to sync."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Makes the bytes of a file that something else wrote durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable: fsync of a file does not sync its name."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def failures(path: Path, kind: type[FinetuneError] = CheckpointError, *, what: str = "cannot write") -> Iterator[None]:
    """Turns whatever the disk answers into one clear error about `path`; the OSError stays its `__cause__`."""
    try:
        yield
    except OSError as error:
        message = f"{what}: {(error.strerror or str(error)).lower()}"
        raise kind(message, where=str(path), hint=HINTS.get(error.errno)) from error
