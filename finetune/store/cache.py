"""Things made once and shared between runs (converted bases, encoded rows), keyed by their content.

An entry is built in a directory beside it, synced, and renamed into place, so a half-made one is never seen. Other
processes that want the entry wait. Sealed parts of a killed build stay for a week: the next build continues from them.
"""

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar, cast

import blake3

from finetune.errors import FinetuneError
from finetune.store import lock
from finetune.store.boot import boot_id
from finetune.store.durable import sync_directory, sync_file

FoundT = TypeVar("FoundT")

SEAL, FOUND = "digests.json", "found.json"
UNFINISHED = ".building"
QUIET_SECONDS, BETWEEN_LOOKS_SECONDS = 4.0, 0.02
KEPT_SECONDS = 7 * 24 * 3600  # how long a killed build can be continued
STAMPED_BYTES = 256 << 20  # up to here every use hashes the whole entry, in 0.04 s
PIECE_BYTES = 4 << 20  # a piece at a time is shared by threads


def root() -> Path:
    """`$FINETUNE_CACHE`, else `finetune` in the user's cache directory."""
    if named := os.environ.get("FINETUNE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"


def built(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The directory `root()/kind/key`, made by `build(directory)` unless it is there and sound; see `_is_verified`.

    `directory` may hold sealed parts (see `part`) of a killed build; its subdirectories do not become part of the entry.
    """
    entry = root() / kind / key
    if _is_verified(entry):
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        _sweep(entry.parent)
        with _alone(entry) as unfinished:
            if _is_verified(entry):  # another process was faster
                _remove(unfinished)
            else:
                _remove(entry)
                _make(unfinished, build)
                _put(unfinished, entry)
    except OSError as error:
        if _is_verified(entry):  # another host was faster, and removed what both read
            return entry
        if not os.access(entry.parent, os.W_OK):
            message, hint = "the cache cannot be written", "set FINETUNE_CACHE to a directory of yours"
            raise FinetuneError(f"{message}: {error.strerror}", where=str(entry.parent), hint=hint) from error
        message, hint = f"the cache entry cannot be written: {error.strerror}", "set FINETUNE_CACHE to another disk"
        raise FinetuneError(message, where=str(entry), hint=hint) from error
    return entry


def found(kind: str, facts: object, find: Callable[[], FoundT]) -> FoundT:
    """The result of `find`, as JSON, for these facts (also JSON): computed once and kept. Errors are not kept."""
    key = blake3.blake3(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def build(directory: Path) -> None:
        (directory / FOUND).write_text(json.dumps(find()))

    return cast(FoundT, json.loads((built(kind, key, build) / FOUND).read_bytes()))


def part(directory: Path, name: str, build: Callable[[Path], None]) -> Path:
    """The sealed directory `name` of an entry under construction; makes it unless an earlier build left it intact."""
    made = directory / name
    if is_sound(made):
        return made
    shutil.rmtree(made, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=UNFINISHED, dir=directory))
    build(unfinished)
    _seal(unfinished)
    try:
        return unfinished.rename(made)
    except OSError:
        if not is_sound(made):
            raise
        shutil.rmtree(unfinished)  # another task was faster; the content is the same
        return made


def is_sound(entry: Path) -> bool:
    """Whether the directory still holds every byte of its seal."""
    try:
        digests = json.loads((entry / SEAL).read_bytes())
        return all(_digest(entry / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _is_verified(entry: Path) -> bool:
    """Whether the entry is intact. Hashes every byte, of a large entry only once a boot: while its files keep their inodes, sizes and
    times, no process has written to them. So it notices later bit rot only after the next boot."""
    try:
        files = {file.name: file.stat() for file in sorted(entry.iterdir())}
    except OSError:
        return False
    if sum(facts.st_size for facts in files.values()) <= STAMPED_BYTES or boot_id() is None:
        return is_sound(entry)
    facts = {name: [file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns] for name, file in files.items()}
    seen = json.dumps({"boot_id": boot_id(), "device": entry.stat().st_dev, "files": facts})
    stamp = entry.with_name(f"{entry.name}.verified")
    with suppress(OSError, ValueError):
        if stamp.read_text() == seen:
            return True
    if not is_sound(entry):
        return False
    with suppress(OSError):  # in a cache of another user: every use hashes
        unfinished = stamp.with_name(f"{stamp.name}.new")
        unfinished.write_text(seen)
        unfinished.replace(stamp)
    return True


@contextmanager
def _alone(entry: Path) -> Iterator[Path]:
    """A directory for this build alone; waits for another process of this user that builds the same entry.

    The kernel's lock on the directory ends with its process. Over a network it may hold on one host only, so each host has its own
    directory. Without locks in the file system, each build has its own.
    """
    unfinished = entry.with_name(f"{entry.name}.{os.getuid()}-{platform.node()}{UNFINISHED}")
    while True:
        unfinished.mkdir(mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(unfinished, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # finished by another process
            continue
        try:
            if not _lock(descriptor, unfinished):
                unfinished = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=UNFINISHED, dir=entry.parent))
            elif not _is_same(descriptor, unfinished):  # finished by another process while this one waited
                continue
            yield unfinished
            return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, directory: Path) -> bool:
    """Waits for the lock, with a message after some seconds: ranks meet here for a moment. False if the file system has none."""
    begin = time.monotonic()
    while time.monotonic() - begin < QUIET_SECONDS:
        try:
            return lock.take(descriptor)
        except BlockingIOError:
            time.sleep(BETWEEN_LOOKS_SECONDS)
    print(f"waiting for another process that makes {directory.stem}", file=sys.stderr, flush=True)
    return lock.take(descriptor, is_waiting=True)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _make(unfinished: Path, build: Callable[[Path], None]) -> None:
    """Builds and seals the entry, and removes everything else; keeps the parts of a failed build."""
    if not is_sound(unfinished):
        _clear(unfinished)
        try:
            build(unfinished)
            _seal(unfinished)
        except BaseException:
            _clear(unfinished)
            with suppress(OSError):  # it has parts
                unfinished.rmdir()
            raise
    for item in list(unfinished.iterdir()):
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)


def _clear(unfinished: Path) -> None:
    """Removes all but sealed parts."""
    for item in list(unfinished.iterdir()):
        if item.is_symlink() or not item.is_dir():
            item.unlink()
        elif not (item / SEAL).exists():
            shutil.rmtree(item)


def _put(unfinished: Path, entry: Path) -> None:
    try:
        unfinished.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise
        shutil.rmtree(unfinished)  # another user or another host was faster; the content is the same
    sync_directory(entry.parent)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def _sweep(kind: Path) -> None:
    """Removes old leftovers of killed builds; a running build holds its lock."""
    for unfinished in kind.glob(f"*{UNFINISHED}"):
        with suppress(FileNotFoundError, PermissionError, BlockingIOError):
            if time.time() - unfinished.stat().st_mtime > KEPT_SECONDS:
                descriptor = os.open(unfinished, os.O_RDONLY)
                try:
                    lock.take(descriptor)  # where there are no locks its age decides
                    shutil.rmtree(unfinished)
                finally:
                    os.close(descriptor)


def _seal(directory: Path) -> None:
    """Records the content of the entry, without what its links lead to, and makes it durable, and readable for all users of the cache."""
    files = [file for file in sorted(directory.iterdir()) if file.is_file() and not file.is_symlink()]
    # of an entry that another one was made of, and copied with its small files
    files = [file for file in files if file.name != SEAL]
    (directory / SEAL).write_text(json.dumps({file.name: _digest(file) for file in files}))
    for file in [*files, directory / SEAL]:
        file.chmod(0o644)
        sync_file(file)
    directory.chmod(0o755)
    sync_directory(directory)


def _digest(file: Path) -> str:
    """Reads, and does not map: a disk error in mapped memory would kill the process."""
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(PIECE_BYTES):
            hasher.update(piece)
    return hasher.hexdigest()
