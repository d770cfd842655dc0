"""Files and names that survive a power cut, and the disk's refusals in plain words."""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import blake3

from finetune.errors import CheckpointError, FinetuneError
from finetune.store.tensors import TensorRecord

STALL_SECONDS = 60.0
SLOWEST_DISK = 10e6  # bytes a second; a save that is slower than that, with a minute's grace, hangs
HINTS = {
    errno.ENOSPC: "free some space on this disk, or use another one; nothing that was committed is lost",
    errno.EDQUOT: "free some of your disk quota, or use another disk; nothing that was committed is lost",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows",
    errno.EIO: "the disk reports errors: look at `dmesg`, and use another disk",
    errno.EROFS: "the disk is mounted read-only: use another directory",
    errno.EOPNOTSUPP: "use a directory on a disk",
    errno.ENOENT: "somebody removed a directory of the run",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check owner and permissions of the directory, or use another one"),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST), "a file is where a directory should be: move it, or use another directory"
    ),
}


BUFFER_BYTES = 4 << 20  # whole pages; of larger ones the disk is no faster
O_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none
MOUNTS = Path("/proc/self/mountinfo")


class HashedFile:
    """A file under construction. It hashes bytes as they are written, so none is read twice.

    Whole buffers bypass the page cache: copying 1.6 GB into it took 2.3 to 5.1 s of a core (ext4, two cores), and training lost them;
    bypassing it took 0.1 s. Reading back then comes from the disk. File systems without direct writes get normal ones.
    """

    def __init__(self, descriptor: int):
        self.bytes = 0
        self.tensors: tuple[TensorRecord, ...] = ()
        self._descriptor = descriptor
        # Mapped, so that it begins with a page: direct writes need that.
        self._buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
        self._filled = 0
        self._blake3 = blake3.blake3()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        if not view.nbytes:  # it could not be cast
            return
        view = view.cast("B")
        self._blake3.update(view)
        self.bytes += len(view)
        while view:
            count = min(len(view), BUFFER_BYTES - self._filled)
            self._buffer[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == BUFFER_BYTES:
                self._set_direct(True)
                self._empty()

    def sync(self) -> None:
        """Returns when every byte is on the disk."""
        self._set_direct(False)  # what is left may end anywhere
        self._empty()
        os.fsync(self._descriptor)

    def digest(self) -> str:
        return f"blake3:{self._blake3.hexdigest()}"

    def _empty(self) -> None:
        left = self._buffer[: self._filled]
        while left:  # a write may take less than it is given
            try:
                left = left[os.write(self._descriptor, left) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._set_direct(False):
                    raise
        self._filled = 0

    def _set_direct(self, is_direct: bool) -> bool:
        """Returns whether it changed anything."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        wanted = flags | O_DIRECT if is_direct else flags & ~O_DIRECT
        if wanted != flags:
            with suppress(OSError):  # the file system has no such thing
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, wanted)
                return True
        return False


@contextmanager
def durable(path: Path) -> Iterator[HashedFile]:
    """A new file, synced before it is closed. It is read-only, within the umask, and only this descriptor writes it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    try:
        file = HashedFile(descriptor)
        yield file
        file.sync()
    finally:
        os.close(descriptor)


def open_uncached(path: Path) -> int:
    """A descriptor that reads from the disk, not from the page cache, if the file system can do that."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def is_on_nfs(path: Path) -> bool:
    """Whether other hosts may write the file too, without locks of its pages. Elsewhere than on Linux it is taken for a local disk."""
    try:
        mounts = MOUNTS.read_text().splitlines()
    except FileNotFoundError:
        return False
    # `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw` (proc_pid_mountinfo(5))
    device = os.stat(path).st_dev
    own = f"{os.major(device)}:{os.minor(device)}"
    return any(line.split()[2] == own and line.partition(" - ")[2].startswith("nfs") for line in mounts)


@contextmanager
def replacing(path: Path) -> Iterator[HashedFile]:
    """A file, written beside `path` and then renamed over it, durably and read-only: a crash leaves the old or the new one. An error leaves
    the old one, and nothing beside it."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with durable(temporary) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def replace_file(path: Path, data: bytes) -> None:
    """The same with the whole content at once."""
    with replacing(path) as file:
        file.write(data)


def rename(path: Path, destination: Path) -> None:
    """Renames a file or folder durably. On an OSError it has its old name."""
    os.rename(path, destination)
    try:
        sync_directory(destination.parent)
    except OSError:  # whether the new name is on the disk is not known: take it back
        os.rename(destination, path)
        raise


def make_directory(path: Path) -> None:
    """A durable `mkdir -p`, also if a killed process made the directory without a sync."""
    if not path.is_dir():
        make_directory(path.parent)
        try:
            path.mkdir(exist_ok=True)
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            raise OSError(errno.EOPNOTSUPP, "this file system takes no new directories") from None  # like /proc
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Makes the bytes of another writer's file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_tree(directory: Path) -> None:
    """Makes all bytes and all names below a folder durable."""
    for path in directory.rglob("*"):
        (sync_directory if path.is_dir() else sync_file)(path)
    sync_directory(directory)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable: fsync of a file does not sync its name."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def failures(path: Path, kind: type[FinetuneError] = CheckpointError, *, what: str = "cannot write") -> Iterator[None]:
    """Turns any error of the disk into one clear error about `path`; the OSError stays its `__cause__`."""
    try:
        yield
    except OSError as error:
        message = f"{what}: {(error.strerror or str(error)).lower()}"
        raise kind(message, where=str(path), hint=HINTS.get(error.errno or 0)) from error
