"""Quantized checkpoints that are trained as the numbers their files stand for: found by their config, written again once, in the cache."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import blake3

from finetune.errors import BaseError
from finetune.model.base import view
from finetune.model.base.damaged import Json, name_of, read_json
from finetune.model.base.dequantized import files
from finetune.model.base.dequantized.methods import METHODS, Method, Refused
from finetune.model.base.weight_files import check_weight_files
from finetune.plan.plan import PinnedBase
from finetune.store import cache

KEY = "quantization_config"
MODEL_OPT = "hf_quant_config.json"
CONFIGS = ("config.json", MODEL_OPT)
READ_BY_TRANSFORMERS = ("mxfp4",)  # gpt-oss is published in nothing else
VERSION = 1  # of `write`; part of the cache key
HINT = "name the checkpoint that it was made from; base.quantization quantizes that while it is read"

__all__ = ["CONFIGS", "directory", "kind_of"]


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


def kind_of(path: Path) -> str | None:
    method = method_of(path)
    return method.name if method else None


def directory(pinned: PinnedBase, find: Callable[[], Path], with_weights: bool) -> Path:
    """A quantized base as the numbers its files stand for, kept in the cache by its pin; `find` gives the files when they are needed.
    Without weights, a directory with config and tokenizer alone."""
    facts = json.dumps(pinned.model_dump(exclude_defaults=True), sort_keys=True)
    key = f"{blake3.blake3(facts.encode()).hexdigest()[:32]}-{VERSION}"
    return cache.built(view.NUMBERS[0 if with_weights else 1], key, lambda target: write(find(), target, with_weights))


def write(path: Path, target: Path, with_weights: bool) -> None:
    """The checkpoint at `path` as the numbers that it stands for, in the type that its config names; or its small files alone.

    BaseError if codes, scales and shapes do not fit together, or a number is NaN.
    """
    method = method_of(path)
    if method is None:
        raise BaseError("is not quantized, and was when the run was planned", where=name_of(path))
    if list(path.glob("*.safetensors")):
        check_weight_files(path, may_be_quantized=True)
        files.check(path, method)
    if with_weights:
        print(f"dequantizing {name_of(path)} ({method.name}), once", file=sys.stderr, flush=True)
        files.write(path, method, target)
    files.write_small_files(path, target)
    if origin := view.origin_of(path):
        (target / view.ORIGIN).write_text(json.dumps(origin))
