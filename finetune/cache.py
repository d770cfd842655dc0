"""Floor 0. Things made once and shared between runs (converted bases, encoded rows), keyed by their content.

An entry is built in a temporary directory and renamed into place, so a half-made one is never seen.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from finetune.errors import FinetuneError


def root() -> Path:
    """`$FINETUNE_CACHE`, else `finetune` in the user's cache directory."""
    if named := os.environ.get("FINETUNE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"


def built(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The directory `root()/kind/key`, made by `build(directory)` unless it is there."""
    entry = root() / kind / key
    if entry.is_dir():
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=entry.parent))
    except OSError as error:
        raise FinetuneError(
            f"the cache cannot be written: {error.strerror}",
            where=str(entry.parent),
            hint="set FINETUNE_CACHE to a directory of yours",
        ) from error
    try:
        build(unfinished)
        unfinished.rename(entry)
    except OSError as error:
        if entry.is_dir():  # another process was faster; its entry has the same content
            return entry
        raise FinetuneError(f"the cache entry cannot be written: {error.strerror}", where=str(entry)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return entry
