"""The names of a checkpoint's safetensors files. A large one is divided, so that several processes can read and hash it at once.

Which tensors are in which file follows from their names, types and shapes alone: any number of ranks writes the same files.
"""

import re
from collections.abc import Collection, Sequence

from finetune.store.tensors import Tensor, in_order

# Weights that are trained, and those that cannot change, when there are both; the index names them for `from_pretrained`.
WHOLE, TRAINED, FROZEN = "model.safetensors", "model-trained.safetensors", "model-frozen.safetensors"
INDEX = f"{WHOLE}.index.json"
ADAPTER, OPTIMIZER, EMA = "adapter_model.safetensors", "optimizer.safetensors", "ema.safetensors"
FILE_BYTES = 5_000_000_000
"""Bytes of a file at most; a larger tensor has its own file. transformers divided models at this size for years."""
_OF_SEVERAL = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")


def kind_of(name: str) -> str:
    """The name that a file would have if it were not divided: `model-00002-of-00007.safetensors` gives `model.safetensors`."""
    return _OF_SEVERAL.sub("", name)


def of_kind(names: Collection[str], kind: str) -> list[str]:
    """The files of a kind, in their order; empty if there are none."""
    return sorted(name for name in names if kind_of(name) == kind)


def is_for_resume(name: str) -> bool:
    """Whether only a resume reads the file: a demotion drops it."""
    return name == "state.json" or kind_of(name) == OPTIMIZER


def divided(kind: str, tensors: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The files of a kind for these tensors."""
    found: list[list[Tensor]] = [[]]
    size = 0
    for tensor in in_order(tensors):
        if found[-1] and size + tensor.bytes > FILE_BYTES:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += tensor.bytes
    if len(found) == 1:
        return {kind: list(tensors)}
    stem = kind.removesuffix(".safetensors")
    return {f"{stem}-{number:05}-of-{len(found):05}.safetensors": each for number, each in enumerate(found, 1)}
