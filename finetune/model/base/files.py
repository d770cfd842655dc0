"""The files of a checkpoint: to download, to digest, and to copy into derived bases."""

import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import blake3

from finetune.plan.encodings import TOKENIZER_FILES, VOCABULARIES
from finetune.store.checkpoints.tensor_files import kind_of

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
AHEAD_BYTES = 1 << 20  # Linux reads no more than its read-ahead window at one request
INDEX = "*.safetensors.index.json"
WEIGHTS = ("*.safetensors", INDEX)
CONFIG = "config.json"
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")  # config, tokenizer, template
LICENCES = ("README.md", "LICENSE*", "NOTICE*")  # what a package passes on
TEMPLATE = "chat_template.jinja"
TEMPLATES = (TEMPLATE, "additional_chat_templates/*.jinja")
GENERATION = "generation_config.json"
FROM_HUB = SMALL_FILES + TOKENIZER_FILES + LICENCES
# Of our checkpoints: how training went on, not what the model is. Retention may take them away.
NOT_THE_MODEL = (
    "manifest.json",
    "optimizer.safetensors",
    "state.json",
    "trainer_state.json",
    "ema.safetensors",
    "stages.json",
)
_LICENCE_LINE = re.compile(r"^license:", re.MULTILINE)


AsItIs = tuple[int, ...]
"""What the system says of a file: other bytes in it give other numbers."""


def digest(directory: Path) -> str:
    """The digest over names and contents of the checkpoint's files."""
    total = blake3.blake3()
    for file in _matching(directory, SMALL_FILES + WEIGHTS):
        total.update(f"{file.name}\0{file_digest(file)}\0".encode())
    return "blake3:" + total.hexdigest()


def small_digest(directory: Path, with_index: bool = True) -> str:
    """The digest over names and contents of config, tokenizer and template; by name also that of an index of weights."""
    small = sorted({*_matching(directory, SMALL_FILES), *tokenizer_files(directory)})
    small = [file for file in small if with_index or not file.match(INDEX)]
    return "".join(f"{file.name}\0{file_digest(file)}\0" for file in small)


digests: dict[AsItIs, str] = {}
"""Of files that this process has read, or another one of the host for it: a start looks at a base several times."""


def file_digest(file: Path) -> str:
    status = file.stat()
    as_it_is = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    if as_it_is not in digests:
        digests[as_it_is] = blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(file).hexdigest()
    return digests[as_it_is]


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has its own tokenizer: a vocabulary, in any form."""
    return any(found for pattern in VOCABULARIES for found in directory.glob(pattern))


def tokenizer_files(directory: Path) -> list[Path]:
    """The files that define a tokenizer, without the chat template."""
    return sorted({file for pattern in TOKENIZER_FILES for file in directory.glob(pattern) if file.is_file()})


@dataclass(frozen=True)
class Companions:
    """The small files beside weights: tokenizer, generation config, and the chat template of the training."""

    directory: Path
    """Of the base, or of a checkpoint."""
    template: str | None
    """None keeps the directory's own template."""
    stops: tuple[int, ...] = ()
    """Ids of tokens that end generation as well; the generation config gets them."""

    def contents(self, with_config: bool) -> dict[str, bytes]:
        """The files by name. transformers chooses a tokenizer's class by the model's config. An adapter has none, so
        `with_config` adds the base's."""
        files = [*tokenizer_files(self.directory), self.directory / TEMPLATE, self.directory / GENERATION]
        found = {file.name: file.read_bytes() for file in files if file.is_file()}
        if self.template is not None:
            found[TEMPLATE] = self.template.encode()
        if self.stops:
            found[GENERATION] = self._generation(found.get(GENERATION))
        if with_config:
            config = json.loads((self.directory / CONFIG).read_bytes())
            kept = {key: value for key, value in config.items() if key != "_name_or_path"}  # a place on one machine
            found[CONFIG] = f"{json.dumps(kept, indent=2)}\n".encode()
        return found

    def _generation(self, own: bytes | None) -> bytes:
        """The generation config with `stops`; without one of its own, what transformers would read in the model's config."""
        config = json.loads((self.directory / CONFIG).read_bytes())
        settings = json.loads(own) if own else {key: config[key] for key in SPECIAL_IDS if config.get(key) is not None}
        ends = settings.get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        ends += [stop for stop in self.stops if stop not in ends]
        return f"{json.dumps({**settings, 'eos_token_id': ends}, indent=2)}\n".encode()


def read_ahead(directory: Path) -> None:
    """Asks the system to read the weights into memory while rows are encoded. On a thread: the call may block for the disk."""

    def read() -> None:
        with suppress(OSError):  # the real read reports the error
            for file in _matching(directory, WEIGHTS):
                with file.open("rb") as opened:
                    for start in range(0, file.stat().st_size, AHEAD_BYTES):
                        os.posix_fadvise(opened.fileno(), start, AHEAD_BYTES, os.POSIX_FADV_WILLNEED)

    if hasattr(os, "posix_fadvise"):
        Thread(target=read, daemon=True).start()


def copy_small_files(below: Path, adapter: Path, target: Path) -> None:
    """The small files of a merged model: the base's, with the adapter's tokenizer over them."""
    leave = {CONFIG, "adapter_config.json", *(file.name for file in _matching(below, WEIGHTS))}
    if has_tokenizer(adapter):
        leave |= {TEMPLATE, *(file.name for file in tokenizer_files(below))}
    for file in {*_matching(below, SMALL_FILES + LICENCES), *tokenizer_files(below)}:
        if file.name not in leave:
            shutil.copyfile(file, target / file.name)
    own = tokenizer_files(adapter) if has_tokenizer(adapter) else []
    for file in (*own, adapter / TEMPLATE, adapter / GENERATION):
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    card = adapter / "README.md"  # its licence counts, if it states one
    if card.is_file() and _LICENCE_LINE.search(card.read_text(encoding="utf-8", errors="replace")):
        shutil.copyfile(card, target / card.name)


def _matching(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Sorted. A file that two patterns match (the index of sharded weights) comes twice: digests in plans count it so."""
    found = [file for pattern in patterns for file in directory.glob(pattern) if file.is_file()]
    return sorted(file for file in found if kind_of(file.name) not in NOT_THE_MODEL)
