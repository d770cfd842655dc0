"""Chosen files of a Hub data set at a pinned revision: fetched into the Hub's cache, and read like local ones."""

import glob
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePath

import numpy as np

from finetune.data.sources.files import ENDINGS, Reader, reader_of
from finetune.data.sources.hub import hub_error
from finetune.data.sources.kept import Chosen
from finetune.data.sources.many import Joined
from finetune.data.sources.opened import Reading
from finetune.data.sources.paths import of_one_kind, rule_of
from finetune.errors import DataError
from finetune.recipe.schema import Source
from finetune.store import cache, downloads, hub


def hub_files(source: Source, revision: str, reading: Reading, key: str) -> Reader:
    """The rows of the files that the recipe chooses; of a slice of them if `split` has one."""
    dataset = source.dataset or ""
    try:
        facts = [dataset, revision, source.files]
        with hub.waiting(f"the names of files in the data set {dataset}"):
            names = cache.found("hub-files", facts, partial(_names, source, revision))
        chosen = of_one_kind(dataset, names, ENDINGS).names
        with hub.waiting(f"files of the data set {dataset}"):
            paths = _fetched(source, revision, chosen)
        downloads.refuse_damaged(map(Path, paths), DataError, f"{dataset}@{revision}")
        said = {path: f"{dataset}@{revision[:8]} {name}" for path, name in zip(paths, chosen, strict=True)}
        rows = Joined(paths, lambda path, most: reader_of(path, most, reading, said[path]), key)
        return _sliced(rows, source.split)
    except (hub.http().HTTPError, OSError, ValueError) as error:
        raise hub_error(source, error) from error


def _names(source: Source, revision: str) -> list[str]:
    """The files of the commit that the recipe's globs match, in the order of their bytes."""
    from huggingface_hub import HfApi

    rules = [rule_of(PurePath(name).parts) for name in source.files]
    there = HfApi().list_repo_files(source.place, repo_type="dataset", revision=revision)
    for name, rule in zip(source.files, rules, strict=True):
        if not any(rule.fullmatch(each) for each in there):
            hint = "correct `files` in the recipe: a `*` matches within a folder, `**` through folders"
            raise DataError(f"no file matches `{name}`", where=f"{source.dataset}@{revision[:8]}", hint=hint)
    return sorted((each for each in there if any(rule.fullmatch(each) for rule in rules)), key=str.encode)


def _fetched(source: Source, revision: str, names: Sequence[str]) -> list[str]:
    """The files in the Hub's cache; without a request where all are there."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    def cached() -> list[str]:
        found = (try_to_load_from_cache(source.place, name, repo_type="dataset", revision=revision) for name in names)
        return [each for each in found if isinstance(each, str)]

    if len(found := cached()) < len(names):
        patterns = [glob.escape(name) for name in names]
        snapshot_download(source.place, repo_type="dataset", revision=revision, allow_patterns=patterns)
        found = cached()
    if len(found) < len(names):
        raise ConnectionError("without the Hub, only some of the files are here")
    return found


def _sliced(rows: Reader, split: str | None) -> Reader:
    """The rows that a slice like `train[:100]` names."""
    if split is None or split == "train":
        return rows
    from datasets import ReadInstruction

    parts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    numbers = np.concatenate([np.arange(part.from_ or 0, len(rows) if part.to is None else part.to) for part in parts])
    return Chosen(rows, numbers, f"`{split}`")
