"""The files and settings that decide a row's tokens, as digests for the plan and for the cache of encoded rows.

The plan's digest covers files and settings, so it is the same with every version of the libraries. The cache's also covers their results.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import blake3

from finetune import version
from finetune.recipe.schema import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the tokenizer classes of transformers read: a vocabulary, and how to read it. Without the first, the others mean nothing.
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.*.json", "vocab.json", "vocab.txt", "*.model", "tokenizer.model.*", "tekken.json"),
    *("vocab-*.json", "byte_maps.json", "entity_vocab.json", "bpe.codes", "*.tokenizer"),
)
REMARKS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("normalizer.json", "emoji.json", "word_shape.json", "word_pronunciation.json"),
)
TOKENIZER_FILES = VOCABULARIES + REMARKS
LIBRARIES = ("transformers", "tokenizers", "jinja2")
ARRANGEMENT = {"packing"}  # settings of a task for the place of a row's tokens; they do not change the tokens
NOT_TOKENS = ARRANGEMENT | {"template"}  # only the text of a template counts, not its path
# Plans of older code have digests by other rules, over these files.
OLDER = "sha256:"
OLDER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)


def digest(task: Task, files: Sequence[Path], template: str | None, stops: list[int], row_rules: int) -> str:
    """Over the tokenizer's files, the chat template in force, stop tokens, the row rules, and every setting of the task.

    Skips settings at their default, so a setting added later does not change the digest of an older plan.
    """
    settings = task.model_dump(mode="json", exclude_defaults=True, exclude=NOT_TOKENS)
    total = blake3.blake3(json.dumps([settings, template, stops, row_rules], sort_keys=True).encode())
    for file in files:
        total.update(f"\0{file.name}\0{file.stat().st_size}\0".encode()).update(file.read_bytes())
    return f"blake3:{total.hexdigest()}"


def key(encoding: str, task: Task, tokenizer: "PreTrainedTokenizerBase", date: str | None) -> str:
    """Of encoded rows in the cache: the plan's digest, the whole section of the task, the date for templates, and the results
    of the libraries.

    Of the section the digest has no defaults, and that of an older plan only name and length: it must not change, and this may.
    """
    settings = task.model_dump(mode="json", exclude=NOT_TOKENS)
    effect = [tokenizer.special_tokens_map, tokenizer.split_special_tokens, tokenizer.backend_tokenizer.to_str()]
    return json.dumps(
        [encoding, settings, date, *map(version, LIBRARIES), blake3.blake3(json.dumps(effect).encode()).hexdigest()]
    )


def is_older(encoding: str) -> bool:
    return encoding.startswith(OLDER)


def older_texts(template: str | None) -> list[str | None]:
    """A template as older code may have read it: with a byte-order mark, and with other line ends."""
    return [template] if template is None else [template, f"\ufeff{template}", template.replace("\n", "\r\n")]


def older_digest(task: Task, directory: Path, template: str | None, stops: list[int], row_rules: int = 1) -> str:
    facts = [task.name, task.max_length, template or "", stops]
    facts += [row_rules] if row_rules > 1 else []  # the first plans had no number
    total = hashlib.sha256(json.dumps(facts).encode())
    for name in OLDER_FILES:
        if (directory / name).is_file():
            total.update(f"\0{name}\0".encode() + (directory / name).read_bytes())
    return f"{OLDER}{total.hexdigest()}"
