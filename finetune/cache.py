"""Floor 0. Things made once and shared between runs (converted bases, encoded rows), keyed by their content.

An entry is built in a temporary directory, synced, and renamed into place, so a half-made one is never seen. Its files are
compared with their digests before every use: a damaged entry is made anew.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import blake3

from finetune.checkpoints.durable import sync_directory, sync_file
from finetune.errors import FinetuneError

SEAL = "digests.json"
PIECE_BYTES = 2**20


def root() -> Path:
    """`$FINETUNE_CACHE`, else `finetune` in the user's cache directory."""
    if named := os.environ.get("FINETUNE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"


def built(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The directory `root()/kind/key`, made by `build(directory)` unless it is there and sound."""
    entry = root() / kind / key
    if entry.is_dir():
        if _is_sound(entry):
            return entry
        shutil.rmtree(entry)
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
        _seal(unfinished)
        unfinished.rename(entry)
        sync_directory(entry.parent)
    except OSError as error:
        if entry.is_dir():  # another process was faster; its entry has the same content
            return entry
        raise FinetuneError(f"the cache entry cannot be written: {error.strerror}", where=str(entry)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return entry


def _seal(directory: Path) -> None:
    """Writes down what the entry holds, and makes it durable and readable for whoever shares the cache."""
    digests = {file.name: _digest(file) for file in sorted(directory.iterdir())}
    (directory / SEAL).write_text(json.dumps(digests))
    for file in directory.iterdir():
        file.chmod(0o644)
        sync_file(file)
    directory.chmod(0o755)
    sync_directory(directory)


def _is_sound(entry: Path) -> bool:
    try:
        digests = json.loads((entry / SEAL).read_bytes())
        return all(_digest(entry / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _digest(file: Path) -> str:
    hasher = blake3.blake3()
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(PIECE_BYTES):
            hasher.update(piece)
    return hasher.hexdigest()
