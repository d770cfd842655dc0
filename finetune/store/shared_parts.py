"""Sealed parts of a cache entry that several hosts make together, on a file system that they share.

Each part is renamed into place as a whole, so hosts need no locks: two that make the same part make the same bytes. Whoever builds the
entry takes the parts that are there. They stay until it is made, or for the week of an unfinished build.
"""

import os
import shutil
from pathlib import Path

from finetune.errors import FinetuneError
from finetune.store import cache


def directory(kind: str, key: str) -> Path:
    """The place of the parts of an entry; it need not be there."""
    return cache.root() / kind / f"{key}.shared{cache.UNFINISHED}"


def opened(kind: str, key: str) -> Path:
    """The same, made where it is not there."""
    place = directory(kind, key)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "set FINETUNE_CACHE to a directory of yours, which all hosts see"
        raise FinetuneError(f"the cache cannot be written: {error.strerror}", where=str(place), hint=hint) from error
    return place


def is_there(kind: str, key: str) -> bool:
    """Whether the entry itself is made."""
    return (cache.root() / kind / key / cache.SEAL).exists()


def found(kind: str, key: str, name: str) -> Path | None:
    """A sound part."""
    part = directory(kind, key) / name
    return part if cache.is_sound(part) else None


def are_there(kind: str, key: str, names: list[str]) -> bool:
    """Whether all parts are made; their bytes are compared when they are used."""
    return all((directory(kind, key) / name / cache.SEAL).exists() for name in names)


def remove(kind: str, key: str) -> None:
    """What was made together is in the entry now."""
    place = directory(kind, key)
    if os.path.isdir(place):
        shutil.rmtree(place, ignore_errors=True)
