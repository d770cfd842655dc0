"""Quantized checkpoints: found by their config, and written again once, in the cache, as the numbers that their files stand for.

Those of bitsandbytes may also stay as they are under an adapter (`stored`).
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypedDict

import blake3

from finetune.errors import BaseError
from finetune.model.base import view
from finetune.model.base.damaged import Json, name_of, read_json
from finetune.model.base.dequantized import files
from finetune.model.base.dequantized.methods import METHODS, Method, Refused
from finetune.model.base.weight_files import check_weight_files
from finetune.plan.plan import PinnedBase
from finetune.recipe.schema import Base
from finetune.store import cache

KEY = "quantization_config"
MODEL_OPT = "hf_quant_config.json"
CONFIGS = ("config.json", MODEL_OPT)
READ_BY_TRANSFORMERS = ("mxfp4",)  # gpt-oss is published in nothing else
VERSION = 1  # of `write`; part of the cache key
HINT = "name the checkpoint that it was made from; base.quantization quantizes that while it is read"

__all__ = ["CONFIGS", "Pinned", "directory", "pinned_as", "refuse_unstored", "stored_directory"]


class Pinned(TypedDict):
    """The keys of `PinnedBase` about quantized files."""

    dequantized: str | None
    stored: Literal["nf4", "fp4", "int8"] | None


def method_of(path: Path) -> Method | None:
    """How the files at `path` are quantized; None if they are not, or transformers itself makes numbers of them.

    Reads the config alone. BaseError for a method or for settings that are not read.
    """
    said = said_of(read_json(path / "config.json")) if (path / "config.json").is_file() else None
    if said is None and (path / MODEL_OPT).is_file():
        inner = read_json(path / MODEL_OPT).get("quantization")
        said = {"quant_method": "modelopt", **(inner if isinstance(inner, dict) else {})}
    if said is None:
        return None
    name = str(said.get("quant_method", "unknown"))
    if name in READ_BY_TRANSFORMERS:
        return None
    if name not in METHODS:
        message = f"is quantized already ({name[:40]}), and such weights cannot be trained"
        raise BaseError(message, where=name_of(path), hint=HINT)
    try:
        return METHODS[name](said)
    except Refused as error:
        message = f"is quantized already ({name}), and {error}, so it cannot be trained"
        raise BaseError(message, where=name_of(path), hint=HINT) from None


def said_of(config: Json) -> Json | None:
    """What a config says of the quantization of its files."""
    for part in (config, config.get("text_config")):
        said = part.get(KEY) if isinstance(part, dict) else None
        if said:
            return said if isinstance(said, dict) else {"quant_method": "unknown"}
    return None


def pinned_as(path: Path, asked: str | None, is_adapted: bool) -> Pinned:
    """What becomes of the files at `path`, by their config: they stay as they are under an adapter, unless `asked` is something else."""
    method = method_of(path)
    kept = method.stored if method and is_adapted else None
    return {"dequantized": method.name if method else None, "stored": kept if asked in (None, "stored", kept) else None}


def refuse_unstored(base: Base, pinned: PinnedBase) -> None:
    """BaseError where the recipe wants weights as they are stored, and they are not of a kind that may stay so."""
    if base.quantization == "stored" and pinned.stored is None:
        message = f"`stored` keeps the bits of a checkpoint of bitsandbytes, and {base.checkpoint} is not one"
        raise BaseError(message, where="base.quantization", hint="remove the key")


def directory(pinned: PinnedBase, find: Callable[[], Path], with_weights: bool) -> Path:
    """A quantized base as the numbers its files stand for, kept in the cache by its pin; `find` gives the files when they are needed.
    Without weights, a directory with config and tokenizer alone."""
    numbers = pinned.model_copy(update={"stored": None})
    facts = json.dumps(numbers.model_dump(exclude_defaults=True), sort_keys=True)
    key = f"{blake3.blake3(facts.encode()).hexdigest()[:32]}-{VERSION}"
    return cache.built(view.NUMBERS[0 if with_weights else 1], key, lambda target: write(find(), target, with_weights))


def stored_directory(pinned: PinnedBase, path: Path) -> Path:
    """A base whose weights stay in the bits of its files at `path`, for `stored.settings`. Every weight is read once, as `write` reads it."""
    facts = pinned.model_dump(exclude_defaults=True)
    cache.found("stored-checks", [facts, VERSION], lambda: files.check(path, _method(path), reads_weights=True))
    config = json.dumps(files.plain_config(path), indent=2) + "\n"
    return view.view(view.STORED, path, {"config.json": config}, view.origin(path, name_of(path)))


def write(path: Path, target: Path, with_weights: bool) -> None:
    """The checkpoint at `path` as the numbers that it stands for, in the type that its config names; or its small files alone.

    BaseError if codes, scales and shapes do not fit together, or a number is NaN.
    """
    method = _method(path)
    if list(path.glob("*.safetensors")):
        check_weight_files(path, may_be_quantized=True)
        files.check(path, method)
    if with_weights:
        print(f"dequantizing {name_of(path)} ({method.name}), once", file=sys.stderr, flush=True)
        files.write(path, method, target)
    files.write_small_files(path, target)
    (target / view.ORIGIN).write_text(json.dumps(view.origin(path, name_of(path))))


def _method(path: Path) -> Method:
    method = method_of(path)
    if method is None:
        raise BaseError("is not quantized, and was when the run was planned", where=name_of(path))
    return method
