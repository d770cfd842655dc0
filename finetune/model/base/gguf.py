"""A base in a GGUF file: on this machine, on the Hub, or in a Python package, which is never imported. Converts it once."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as cache_of_calls
from pathlib import Path
from typing import Any

import torch

from finetune.errors import BaseError, explained
from finetune.model.base.files import file_digest
from finetune.model.base.quiet import quiet
from finetune.store import cache, downloads
from finetune.store.checkpoints.refs import FileRef, PackageRef

KIND = "gguf"  # of a pin
CONVERSION = 1  # of `convert`; part of the cache key
MAGIC = b"GGUF"
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
LICENCE = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}
"""Keys of a model card, and of the file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""


def find(ref: PackageRef | FileRef) -> Path:
    """The file of a ref."""
    if ref.kind == "file":
        return ref.path
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
    _refuse_other(file)

    def build(target: Path) -> None:
        print(f"converting {file.name} to safetensors, once (about 10 seconds)", file=sys.stderr, flush=True)
        hint = "is it whole, and of a type that transformers reads?"
        with quiet(), explained("transformers cannot read it", file.name, hint):
            convert(file, target)

    return cache.built("converted", f"{file_digest(file)[:32]}-{CONVERSION}", build)


def convert(file: Path, target: Path) -> None:
    """Writes the model as safetensors, dequantised to fp32, with its tokenizer, and a card with the licence that it states."""
    with _read_once():
        _convert(file, target)


def _convert(file: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),  # else the model stays quantised and refuses to be saved
        dtype=torch.float32,
        output_loading_info=True,  # makes it a pair, which its signature does not say
    )
    model, found = loaded
    if missing := sorted(map(str, found["missing_keys"])):
        raise BaseError(f"lacks weights of its model: {', '.join(missing[:3])}", where=file.name)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
    if said := licence(file):
        # JSON is YAML: nothing in a value can become another key.
        lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in said.items())
        (target / "README.md").write_text(f"---\n{lines}---\n", encoding="utf-8")


@contextmanager
def _read_once() -> Iterator[None]:
    """Meanwhile a file is parsed once: transformers does it for config, tokenizer and weights, which was half of a conversion's time."""
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        """Slices a plain array of the mapped file: a slice of `numpy.memmap` costs several times as much, and there are a million."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    read, whole = cache_of_calls(Reader), gguf.GGUFReader
    setattr(gguf, "GGUFReader", lambda path: read(str(path)))  # noqa: B010 # its name is a class to mypy
    try:
        yield
    finally:
        setattr(gguf, "GGUFReader", whole)  # noqa: B010


def licence(file: Path) -> dict[str, str]:
    """What a file states of its licence, by the keys of a model card."""
    import gguf

    fields = gguf.GGUFReader(str(file)).fields
    said = {key: fields[name].contents() for key, name in LICENCE.items() if name in fields}
    return {key: value for key, value in said.items() if isinstance(value, str)}


def _refuse_other(file: Path) -> None:
    """Refuses what is no GGUF file, or a part of one: transformers would leave out the weights of the other parts."""
    if downloads.is_pointer(file):
        raise BaseError("is a pointer of Git LFS, not the file", where=file.name, hint=downloads.PULL)
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise BaseError("is not a GGUF file", where=file.name, hint="download or copy it again")
    if PART.search(file.name):
        hint = "merge the parts with `llama-gguf-split --merge`"
        raise BaseError("is one part of a GGUF model in several files", where=file.name, hint=hint)
