"""Finds the quantized weights in a checkpoint's files, and writes the checkpoint again with the numbers that they stand for.

One weight after the other, so a large base needs little memory. Everything else is copied as it is.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from finetune.errors import BaseError
from finetune.model.base import files
from finetune.model.base.damaged import Json, name_of, read_json
from finetune.model.base.dequantized.layouts import Layout, Parts, Unreadable
from finetune.model.base.dequantized.methods import Method
from finetune.model.base.weight_files import written
from finetune.store.tensors import Place, read_header

SHARD_BYTES = 2 << 30
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CODES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "U8", "I8", "I16", "I32")  # of no model that is not quantized
INDEX = "model.safetensors.index.json"
DAMAGED = "download it again; if it stays so, name the checkpoint that it was made from"


class Quantized(NamedTuple):
    """A weight in the files."""

    weight: str
    parts: Mapping[str, str]
    """The names of its tensors by their ends in the layout."""
    layouts: tuple[Layout, ...]
    """Those that fit by names and types."""


class Found(NamedTuple):
    quantized: list[Quantized]
    plain: list[str]
    """Tensors to copy."""
    file_of: Mapping[str, Path]


def find(path: Path, method: Method) -> Found:
    """What the headers of the files at `path` hold. BaseError where codes lack their scales, or nothing is quantized at all."""
    places, file_of = _headers(path)
    quantized, taken = [], set()
    for name, place in places.items():
        if found := _quantized(name, place, places, method, path):
            quantized.append(found)
            taken |= {*found.parts.values()}
    if not quantized:
        message = f"says in its config that it is quantized ({method.name}), and no tensor of its files is"
        raise BaseError(message, where=name_of(path), hint="remove quantization_config from its config.json")
    plain = [name for name in places if name not in taken and not name.endswith(method.ignored or ("\0",))]
    if surprise := next((name for name in plain if places[name].dtype in CODES), None):
        message = f"has a tensor that is not part of a weight in {method.name}: `{surprise}` ({places[surprise].dtype})"
        raise BaseError(message, where=name_of(path), hint=DAMAGED)
    if twice := {one.weight for one in quantized} & set(plain):
        raise BaseError(f"has `{min(twice)}` both quantized and not", where=name_of(path), hint=DAMAGED)
    return Found(quantized, plain, file_of)


def check(path: Path, method: Method, *, reads_weights: bool = False) -> None:
    """As `find`, and BaseError where shapes do not fit; where codes and scales do not, if they are to be read."""
    found, (places, _) = find(path, method), _headers(path)
    for one in found.quantized:
        if reads_weights:
            _decoded(one, _parts(one, found), path)
        elif all(layout.has_shape for layout in one.layouts):
            parts = {end: _on_meta(places[name]) for end, name in one.parts.items()}
            _decoded(one, parts, path)


def write(path: Path, method: Method, target: Path) -> None:
    """The weights of the checkpoint at `path` in `target`, none of them quantized."""
    found, dtype = find(path, method), dtype_of(read_json(path / "config.json"))
    index, shard, size = {}, {}, 0
    for name, tensor in _tensors(found, dtype, path):
        shard[name] = tensor
        size += tensor.nbytes
        if size >= SHARD_BYTES:
            index.update(_save(shard, target))
            shard, size = {}, 0
    index.update(_save(shard, target))
    total = sum((target / name).stat().st_size for name in set(index.values()))
    (target / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))


def write_small_files(path: Path, target: Path) -> None:
    """The config without its quantization, tokenizer and licence."""
    files.copy_small_files(path, path, target)
    (target / "hf_quant_config.json").unlink(missing_ok=True)
    config = plain_config(path)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def plain_config(path: Path) -> Json:
    """The config of the files at `path`, which says nothing of their quantization."""
    return _plain(read_json(path / "config.json"))


def dtype_of(config: Json) -> torch.dtype:
    """The type that a config names for weights; bf16 if it names none of ours."""
    text = config.get("text_config")
    parts = (config, text if isinstance(text, dict) else {})
    named = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    return next((TYPES[one] for one in named if isinstance(one, str) and one in TYPES), torch.bfloat16)


def _plain(config: Json) -> Json:
    parts = {key: _plain(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in parts.items() if key != "quantization_config"}


def _quantized(name: str, place: Place, places: Mapping[str, Place], method: Method, path: Path) -> Quantized | None:
    """The weight whose codes are in this tensor, if any. BaseError if tensors of its layouts are missing."""
    fitting = [one for one in method.layouts if name.endswith(one.main) and place.dtype in one.types]
    if not fitting or name.endswith(method.ignored or ("\0",)):
        return None
    stems = {layout: name.removesuffix(layout.main) for layout in fitting}
    whole = [one for one in fitting if all(stems[one] + end in places for end in one.needed)]
    if not whole:
        # of a part of another weight: its own codes are met elsewhere
        if any(_is_part(name, layout, places) for layout in method.layouts):
            return None
        lacks = next(stems[fitting[0]] + end for end in fitting[0].needed if stems[fitting[0]] + end not in places)
        raise BaseError(f"lacks `{lacks}`, without which `{name}` is not a number", where=name_of(path), hint=DAMAGED)
    first, stem = whole[0], stems[whole[0]]
    ends = (first.main, *first.needed, *(end for end in first.optional if stem + end in places))
    same = tuple(one for one in whole if (one.main, one.needed) == (first.main, first.needed))
    return Quantized(stem + first.weight, {end: stem + end for end in ends}, same)


def _is_part(name: str, layout: Layout, places: Mapping[str, Place]) -> bool:
    ends = [end for end in (*layout.needed, *layout.optional) if name.endswith(end)]
    return any(name.removesuffix(end) + layout.main in places for end in ends)


def _tensors(found: Found, dtype: torch.dtype, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for name in found.plain:
        yield name, _read(found.file_of[name], name)
    for one in found.quantized:
        yield one.weight, _decoded(one, _parts(one, found), path).to(dtype).contiguous()


def _parts(one: Quantized, found: Found) -> Parts:
    return {end: _read(found.file_of[name], name) for end, name in one.parts.items()}


def _decoded(one: Quantized, parts: Parts, path: Path) -> torch.Tensor:
    """The weight by the one layout under which its tensors fit together."""
    weights, reason = [], ""
    for layout in one.layouts:
        try:
            weights.append(layout.decode(parts))
        except (Unreadable, RuntimeError) as error:  # torch's own, for shapes that do not go together
            reason = " ".join(str(error).split())[:300]
    if len(weights) != 1:
        why = reason if not weights else "its tensors fit several ways to read them"
        raise BaseError(f"has a weight that cannot be read, `{one.weight}`: {why}", where=name_of(path), hint=DAMAGED)
    return weights[0]


def _headers(path: Path) -> tuple[dict[str, Place], dict[str, Path]]:
    index = path / INDEX
    names = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else {"model.safetensors"}
    headers = {path / str(name): read_header(path / str(name)) for name in sorted(names)}
    places = {name: place for found in headers.values() for name, place in found.items()}
    return places, {name: file for file, found in headers.items() for name in found}


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor


def _save(shard: dict[str, torch.Tensor], target: Path) -> dict[str, str]:
    """Writes a shard, and returns its part of the index."""
    if not shard:
        return {}
    name = f"model-{len(list(target.glob('model-*.safetensors'))) + 1:05}.safetensors"
    with written():
        save_file(shard, target / name, {"format": "pt"})
    return dict.fromkeys(shard, name)


def _on_meta(place: Place) -> torch.Tensor:
    from finetune.model.base.outline import TYPES as STORED

    return torch.empty(place.shape, dtype=STORED.get(place.dtype, torch.uint8), device="meta")
