"""A base in a GGUF file of an installed Python package: finds it without importing the package, and converts it."""

import importlib.util
import sys
from pathlib import Path

import torch

from finetune.errors import BaseError
from finetune.model.base.files import file_digest
from finetune.model.base.quiet import quiet
from finetune.store import cache
from finetune.store.checkpoints.refs import PackageRef

CONVERSION = 1  # of `convert`; part of the cache key


def find(ref: PackageRef) -> Path:
    """The file of a ref."""
    spec = importlib.util.find_spec(ref.repo.partition(".")[0])
    if spec is None or not spec.submodule_search_locations:
        raise BaseError(f"no installed package is called `{ref.repo}`", where=ref.text, hint="install it with pip")
    directory = Path(next(iter(spec.submodule_search_locations)), *ref.repo.split(".")[1:])
    if not (directory / ref.path).is_file():
        there = ", ".join(sorted(path.name for path in directory.glob("*.gguf"))) or "no GGUF file"
        raise BaseError(f"the package has no file {ref.path}", where=ref.text, hint=f"it has {there}")
    return directory / ref.path


def converted(file: Path) -> Path:
    """A GGUF file as safetensors: converted once, kept in the cache by the file's digest."""

    def build(target: Path) -> None:
        print(f"converting {file.name} to safetensors, once (about 20 seconds)", file=sys.stderr, flush=True)
        with quiet():
            convert(file, target)

    return cache.built("converted", f"{file_digest(file)[:32]}-{CONVERSION}", build)


def convert(file: Path, target: Path) -> None:
    """Writes the model as safetensors, dequantised to fp32, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),  # else the model stays quantised and refuses to be saved
        dtype=torch.float32,
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
