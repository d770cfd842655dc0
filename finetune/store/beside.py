"""Temporary folders beside their target. Each is locked while its maker lives, so a sweep knows those of killed processes."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune.store import lock
from finetune.store.durable import make_directory


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A new folder beside the target, removed at the end unless it was renamed. First removes leftovers for this target."""
    make_directory(target.parent)
    sweep(target)
    staging = _beside(target)
    staging.mkdir()
    held = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(BlockingIOError):  # by a sweep that looks at it
            lock.take(held)  # without locks, `sweep` removes nothing
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(held)


def sweep(target: Path) -> None:
    """Removes unlocked folders of `staged` and `remove`: a kill has left them."""
    for path in list(target.parent.iterdir()):
        if re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}", path.name):
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError, BlockingIOError):  # gone, or not ours
                _remove_unheld(path)


def remove(directory: Path) -> None:
    """Renames a folder away in one call, then deletes it: a kill in between leaves no half of it in place."""
    doomed = _beside(directory)
    os.rename(directory, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _remove_unheld(path: Path) -> None:
    held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if lock.take(held):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(held)


def _beside(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}"
