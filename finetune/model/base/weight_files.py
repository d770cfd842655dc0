"""The weight files of a checkpoint, looked at before transformers meets them: pickles, torn files, missing shards and weights."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from finetune.errors import BaseError, CheckpointError
from finetune.model.base import quantized
from finetune.model.base.damaged import damaged, name_of, read_json
from finetune.store.tensors import read_header

OS_ERROR = re.compile(r"\(os error (\d+)\)")
CONVERT = "convert it: load it in transformers once and call save_pretrained"


@contextmanager
def written() -> Iterator[None]:
    """Use it around writing weights: safetensors has its own error for a full disk, and here it is one of the disk again."""
    try:
        yield
    except SafetensorError as error:
        number = OS_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def check_weight_files(path: Path, *, may_be_quantized: bool = False) -> None:
    """Refuses pickles, torn files and missing shards before transformers meets them."""
    index = path / "model.safetensors.index.json"
    named = weight_files(index) if index.exists() else {"model.safetensors"}
    if not list(path.glob("*.safetensors")):
        raise BaseError("has no safetensors weights", where=name_of(path), hint=CONVERT)
    for name in sorted(named):
        if not (path / name).is_file():
            raise BaseError(f"lacks its weight file {name}", where=name_of(path), hint="download or copy it again")
        try:
            places = read_header(path / name)
        except CheckpointError as error:
            raise damaged(path / name, error.message) from None
        if not may_be_quantized:
            quantized.refuse_types(places, name_of(path))


def weight_files(index: Path) -> set[str]:
    """The names in an index of shards."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise damaged(index, "it has no `weight_map`")
    return {str(name) for name in named.values()}


def refuse_lacking(path: Path, names: dict[str, list[str]]) -> None:
    """BaseError if a weight of the config is in no file, or has another shape there; `names` are by transformers' kinds."""
    for kind, found in names.items():
        if found:
            wrong = f"lacks weights of its own config ({kind.replace('_', ' ')}): {', '.join(found[:3])}"
            raise BaseError(wrong, where=name_of(path))
