"""Floor 7. A package goes to a folder: copied beside it, synced, compared, and put in its place by one exchange of names; `publish` calls it.

At every moment the folder is the old package or the new one. What a killed call left beside it, the next one removes.
"""

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from finetune.checkpoints.store import failures, make_directory, sync_directory
from finetune.errors import PublishError
from finetune.package import provenance
from finetune.package.card import with_notes_of
from finetune.package.contents import files_of
from finetune.package.repository import Files, digest, size_of

PREFIX = "folder:"
CARD = "README.md"
RENAME_EXCHANGE = 2  # of renameat2(2)


def publish(files: Mapping[str, Path], target: Path, is_dry_run: bool) -> dict:
    """{target, revision, uploaded_bytes, commits, files, is_dry_run}. PublishError where something else is there, or the disk fails."""
    there = files_of(target) if target.is_dir() else {}
    wanted: Files = files | {CARD: with_notes_of(there[CARD].read_bytes(), files[CARD])} if CARD in there else files
    revision, total = digest(wanted), sum(map(size_of, wanted.values()))
    facts = {"target": f"{PREFIX}{target}", "revision": revision, "is_dry_run": is_dry_run}
    facts |= {"files": [{"name": name, "bytes": size_of(content)} for name, content in wanted.items()]}
    if not is_dry_run and target.parent.is_dir():
        _sweep(target)
    if there and digest(there) == revision:
        return facts | {"uploaded_bytes": 0, "commits": 0}
    if target.exists() and not (target.is_dir() and (not there or _is_package(target))):
        raise PublishError("has something else", where=str(target), hint="name a new folder, or remove this one")
    if not is_dry_run:
        with failures(target, PublishError), _staged(target) as staging:
            _copy(wanted, staging)
            if digest(files_of(staging)) != revision:
                raise PublishError("the copy is not what was copied", where=str(target), hint="look at this disk")
            _take_place(staging, target)
            sync_directory(target.parent)
    return facts | {"uploaded_bytes": total, "commits": 1}


def _is_package(directory: Path) -> bool:
    """Whether all that is in a folder came with a package, so that nothing is lost with it."""
    return (directory / provenance.FILE).is_file() and not list(provenance.findings(directory))


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A directory beside the target, gone in the end; locked as long as its maker lives."""
    make_directory(target.parent)
    staging = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    staging.mkdir()
    held = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(held)


def _sweep(target: Path) -> None:
    """Removes staged directories that nobody holds: they were left by a kill."""
    for path in target.parent.iterdir():
        if not re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}", path.name) or not path.is_dir():
            continue
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(held)


def _copy(files: Files, directory: Path) -> None:
    for name, content in files.items():
        copy = directory / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            copy.write_bytes(content)
        else:
            shutil.copyfile(content, copy)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
    for folder in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        sync_directory(folder)


def _take_place(staging: Path, target: Path) -> None:
    """The staged folder under the target's name, and what was there under the other's, by one call."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(staging, target)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    here = -100  # AT_FDCWD
    if libc.renameat2(here, os.fsencode(staging), here, os.fsencode(target), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        if number in (errno.EINVAL, errno.ENOSYS):
            hint = "name a new folder, and move it there yourself"
            raise PublishError("this file system cannot exchange two folders", where=str(target), hint=hint)
        raise OSError(number, os.strerror(number), str(target))
