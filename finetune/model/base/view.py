"""A base with some of its small files changed: a directory of the cache that has these files, and links to all others.

Everything that opens the base, writes a checkpoint or makes a package reads the changed files without knowing of it.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import blake3

from finetune.model.base.files import NOT_THE_MODEL
from finetune.store import cache
from finetune.store.checkpoints.tensor_files import kind_of

ORIGIN = ".origin"
NATIVE, SCALED = "native", "scaled"
DRAWN = ("random", "random-configs")
NUMBERS = ("dequantized", "dequantized-configs")
STORED = "stored"
KINDS = (NATIVE, SCALED, STORED, *DRAWN, *NUMBERS)
"""Directories in the cache that are made of a base's small files: without code, with scaled rotary positions, with new weights,
with the numbers that quantized ones stand for, or without the mark of quantized ones that stay as they are."""
MORE_TEMPLATES = "additional_chat_templates"
CODE = (".py", ".pyc")


class Origin(TypedDict):
    """What a view was made of, in its file `ORIGIN`."""

    name: str
    """Of the base in errors."""
    source: str
    """The directory that it stands for, which may be a view itself."""
    ignored: list[str]
    """The files without their mapping to code."""
    type: str
    tokenizer: str | None
    """The class of a tokenizer that only the base's own code has."""


def view(
    kind: str,
    directory: Path,
    texts: Mapping[str, str],
    origin: Origin,
    *,
    made: Sequence[Path] = (),
    without: Collection[str] = (),
) -> Path:
    """The view of a directory with these texts and `made` files in place of its own.

    Links no code, nothing that belongs to a checkpoint alone, and none of the names in `without`.
    """
    gone = {*texts, *without, *(file.name for file in made)}
    links = [*made, *(file for file in sorted(directory.iterdir()) if file.name not in gone and _is_linked(file))]

    def build(target: Path) -> None:
        for name, text in texts.items():
            (target / name).write_text(text, encoding="utf-8")
        for file in links:
            (target / file.name).symlink_to(file.resolve())
        (target / ORIGIN).write_text(json.dumps(origin))

    facts = [str(directory.resolve()), origin, dict(texts), [file.name for file in links], *map(str, made)]
    return cache.built(kind, blake3.blake3(json.dumps(facts).encode()).hexdigest()[:32], build)


def origin(directory: Path, name: str) -> Origin:
    """For a view of a directory, which may be a view itself."""
    plain: Origin = {"name": "", "source": "", "ignored": [], "type": "", "tokenizer": None}
    return {**(origin_of(directory) or plain), "name": name, "source": str(directory)}


def origin_of(directory: Path) -> Origin | None:
    """What a view was made of; None for other directories."""
    # A base could bring a file of this name: only that of a view counts.
    is_view = directory.parent in [cache.root() / kind for kind in KINDS] and (directory / ORIGIN).is_file()
    return json.loads((directory / ORIGIN).read_bytes()) if is_view else None


def source_of(directory: Path) -> Path:
    """The directory that a view stands for in the end; any other one itself."""
    while (origin := origin_of(directory)) is not None:
        directory = Path(origin["source"])
    return directory


def _is_linked(file: Path) -> bool:
    if file.is_dir():
        return file.name == MORE_TEMPLATES
    return file.is_file() and file.suffix not in CODE and kind_of(file.name) not in (ORIGIN, cache.SEAL, *NOT_THE_MODEL)
