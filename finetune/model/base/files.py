"""Floor 1. Which files make a checkpoint: what is downloaded, digested, and handed on to a base made from others; `base` calls it."""

import os
import re
import shutil
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Thread

import blake3

AHEAD_BYTES = 1 << 20  # Linux reads no more than its read-ahead window at one request
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")  # config, tokenizer, template
LICENCES = ("README.md", "LICENSE*", "NOTICE*")  # what a package passes on
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# Of our checkpoints: how training went on, not what the model is. Retention may take them away.
NOT_THE_MODEL = ("manifest.json", "optimizer.safetensors", "state.json", "trainer_state.json")
_LICENCE_LINE = re.compile(r"^license:", re.MULTILINE)


def digest(directory: Path) -> str:
    """Over names and contents of the files that make the checkpoint."""
    total = blake3.blake3()
    for file in _matching(directory, SMALL_FILES + WEIGHTS):
        total.update(f"{file.name}\0{file_digest(file)}\0".encode())
    return "blake3:" + total.hexdigest()


def file_digest(file: Path) -> str:
    status = file.stat()
    return _digest_of(file, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))


@lru_cache(maxsize=1024)
def _digest_of(file: Path, as_it_is: tuple[int, ...]) -> str:
    """Read once in a process, as long as nothing is written to the file: a base is looked at several times until it is trained."""
    return blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(file).hexdigest()


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has a tokenizer of its own: without a vocabulary the other files are only remarks on one."""
    return any((directory / name).is_file() for name in VOCABULARIES)


def read_ahead(directory: Path) -> None:
    """Has the system read the weights into memory while rows are encoded; on a thread, for asking takes as long as the disk does."""

    def read() -> None:
        with suppress(OSError):  # whoever reads them in earnest says what is wrong
            for file in _matching(directory, WEIGHTS):
                with file.open("rb") as opened:
                    for start in range(0, file.stat().st_size, AHEAD_BYTES):
                        os.posix_fadvise(opened.fileno(), start, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)

    if hasattr(os, "posix_fadvise"):
        Thread(target=read, daemon=True).start()


def copy_small_files(below: Path, adapter: Path, target: Path) -> None:
    """What a merged model has beside config and weights: the base's small files, under the tokenizer that came with the adapter."""
    leave = ("config.json", "adapter_config.json", *(file.name for file in _matching(below, WEIGHTS)))
    tokenizer = (*TOKENIZER_FILES, "chat_template.jinja")
    for file in _matching(below, SMALL_FILES + LICENCES):
        if file.name not in leave and not (has_tokenizer(adapter) and file.name in tokenizer):
            shutil.copyfile(file, target / file.name)
    own = tokenizer if has_tokenizer(adapter) else ("chat_template.jinja",)
    for name in (*own, "generation_config.json"):
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, target / name)
    card = adapter / "README.md"  # its licence counts, if it states one
    if card.is_file() and _LICENCE_LINE.search(card.read_text(encoding="utf-8", errors="replace")):
        shutil.copyfile(card, target / card.name)


def _matching(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Sorted. What two patterns match is there twice (the index of sharded weights): digests in plans were made so."""
    found = [file for pattern in patterns for file in directory.glob(pattern) if file.is_file()]
    return sorted(file for file in found if file.name not in NOT_THE_MODEL)
