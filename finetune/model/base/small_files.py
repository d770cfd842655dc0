"""Config and tokenizer of a checkpoint without its weights, in the cache."""

import shutil
from pathlib import Path

import blake3

from finetune.model.base import files, native
from finetune.store import cache


def tokenizer_directory(adapter: Path, base_directory: Path) -> Path:
    """Where to open the tokenizer of an adapter on a base. Without a config beside it, it gets the base's, in the cache: transformers
    chooses the class by it, as in training."""
    adapter = native.readable(adapter, base_directory)
    if not files.has_tokenizer(adapter) and not (adapter / files.TEMPLATE).is_file():
        return base_directory
    if files.has_tokenizer(adapter) and (adapter / files.CONFIG).is_file():
        return adapter
    key = blake3.blake3("".join(map(files.small_digest, (base_directory, adapter))).encode()).hexdigest()[:32]

    def build(target: Path) -> None:
        files.copy_small_files(base_directory, adapter, target)
        shutil.copyfile(base_directory / files.CONFIG, target / files.CONFIG)

    return cache.built("tokenizers", key, build)


def small_files_of(checkpoint: Path) -> Path:
    """Config and tokenizer of a checkpoint with all weights, in the cache: keep rules may remove the checkpoint later."""
    key = blake3.blake3(files.small_digest(checkpoint).encode()).hexdigest()[:32]

    def build(target: Path) -> None:
        files.copy_small_files(checkpoint, checkpoint, target)
        shutil.copyfile(checkpoint / files.CONFIG, target / files.CONFIG)

    return cache.built("tokenizers", key, build)
