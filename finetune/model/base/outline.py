"""The model that transformers makes from a checkpoint's files, without reading a weight: names, types, and unused tensors.

Routers, their biases and state-space parameters are too sensitive for bf16. transformers keeps some in fp32 for its class; the
authors of a base keep others, in its files.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from finetune.model.base import quantized
from finetune.model.base.damaged import Json
from finetune.model.base.quiet import quiet
from finetune.model.base.text_side import beside_text
from finetune.store.tensors import Place, read_header

TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
HALVES = ("BF16", "F16")


class Outline(NamedTuple):
    """The result of `from_pretrained` on some tensors: the model on the meta device, unused names, and missing ones."""

    model: PreTrainedModel
    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: frozenset[str]

    @property
    def filled(self) -> frozenset[str]:
        return frozenset(self.model.state_dict()) - self.missing - self.mismatched


def outline(
    model_class: type[PreTrainedModel], config: PretrainedConfig, tensors: Mapping[str, torch.Tensor]
) -> Outline:
    """A model from these tensors, loaded in bf16. It is on the meta device; the tensors may be."""
    with quiet():
        # with `output_loading_info` it is a pair, which its signature does not say
        loaded: Any = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=torch.bfloat16,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, info = loaded
    missing, unexpected, mismatched = (
        frozenset(str(key[0] if isinstance(key, tuple) else key) for key in info[f"{kind}_keys"])
        for kind in ("missing", "unexpected", "mismatched")
    )
    return Outline(model, missing, unexpected, mismatched)


def kept(model: PreTrainedModel) -> frozenset[str]:
    """The names transformers keeps in fp32 when it loads a model of this class and config in bf16."""
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    made = outline(type(model), model.config, shapes).model.state_dict()
    return frozenset(name for name, tensor in made.items() if tensor.dtype == torch.float32)


def stored_in_fp32(model: PreTrainedModel, path: Path) -> frozenset[str]:
    """The names, in the model, of the fp32 tensors in the files at `path`, beside weights in half precision."""
    places = headers(path)
    single = {name: place for name, place in places.items() if place.dtype == "F32"}
    if not single or not any(place.dtype in HALVES for place in places.values()):
        return frozenset()
    return outline(type(model), model.config, on_meta(single)).filled


def rounded_beside(model: PreTrainedModel, dtype: torch.dtype) -> frozenset[str]:
    """What is beside the text side, and would be rounded: where the base is gone, only a checkpoint has it."""
    tensors, beside = model.state_dict(), beside_text(model)
    held = {name: tensor for name, tensor in tensors.items() if name in beside and tensor.is_floating_point()}
    return frozenset(
        name for name, tensor in held.items() if not torch.equal(tensor, tensor.to(dtype).to(tensor.dtype))
    )


def has_halves(path: Path) -> bool:
    """Whether the files at `path` store weights in half precision."""
    return any(place.dtype in HALVES for place in headers(path).values())


def in_file_names(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], path: Path | None
) -> dict[str, torch.Tensor]:
    """Tensors of a model by the names, and in the pieces, of the base at `path`; without a base, as transformers writes them."""
    places = headers(path) if path else {}
    made = outline(type(model), model.config, on_meta(places)).model if places else model
    if not places:
        setattr(made, "_weight_conversions", None)  # noqa: B010 # not those of the checkpoint that it was loaded from
    found = revert_weight_conversion(made, dict(tensors))
    return {_spelled(name, model.base_model_prefix, places): tensor for name, tensor in found.items()}


def _spelled(name: str, prefix: str, places: Mapping[str, Place]) -> str:
    """Adds or removes a prefix, as the files have it: in Llama 4's, names begin with `language_model.`."""
    spellings = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((each for each in spellings if each in places), name)


def not_of(model: PreTrainedModel, path: Path, written: Iterable[str]) -> list[str]:
    """Names in the files at `path` that are not `written` and fill nothing of this model's text side under another name."""
    places, beside = headers(path), beside_text(model)
    left = {name: place for name, place in places.items() if name not in set(written)}
    config = AutoConfig.from_pretrained(path)  # that of a model no longer says that the files are quantized
    is_quantized = quantized.to_numbers(config)
    found = outline(type(model), config if is_quantized else model.config, on_meta(left)) if left else None
    if found is None or not found.filled - beside:
        return sorted(left)
    if is_quantized:  # blocks and scales are a weight together, and nothing alone
        alone = {name: outline(type(model), config, on_meta({name: left[name]})).filled for name in left if beside}
        return sorted(found.unexpected | {name for name, filled in alone.items() if filled and not filled - beside})
    # tied weights that are stored twice, or older names
    return sorted(_filling(model, on_meta(left), beside))


def _filling(model: PreTrainedModel, tensors: dict[str, torch.Tensor], beside: frozenset[str]) -> Iterator[str]:
    """Those of the tensors that fill nothing of this model but what is `beside`; by halves, as most do not, or none does."""
    if not outline(type(model), model.config, tensors).filled - beside:
        yield from tensors
    elif len(tensors) > 1:
        names = sorted(tensors)
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            yield from _filling(model, {name: tensors[name] for name in half}, beside)


def headers(path: Path) -> dict[str, Place]:
    """Every tensor of a model's files; none if its weights are missing."""
    return {name: place for places in headers_by_file(path).values() for name, place in places.items()}


def headers_by_file(path: Path) -> dict[str, dict[str, Place]]:
    index = path / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        files = set(json.loads(index.read_bytes())["weight_map"].values())
    return {name: read_header(path / name) for name in sorted(files) if (path / name).is_file()}


def on_meta(places: Mapping[str, Place]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(place.shape, dtype=TYPES.get(place.dtype, torch.uint8), device="meta")
        for name, place in places.items()
    }


@contextmanager
def keeping(model_class: type[PreTrainedModel], names: frozenset[str]) -> Iterator[None]:
    """Within it, models of this class load these tensors in fp32, straight from their files, without a detour through bf16."""
    before = model_class._keep_in_fp32_modules_strict
    patterns = [f"^{re.escape(name)}$" for name in sorted(names)]
    model_class._keep_in_fp32_modules_strict = [*(before or []), *patterns]
    try:
        yield
    finally:
        model_class._keep_in_fp32_modules_strict = before


def with_dtype(config: Json, dtype: torch.dtype) -> Json:
    """A config as JSON with this type, also in its sections, and without a mark of quantization."""
    name = str(dtype).removeprefix("torch.")
    parts = {
        key: with_dtype(value, dtype)
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, dict) and value.keys() & {"dtype", "torch_dtype"}
    }
    kept = {key: value for key, value in config.items() if key not in ("torch_dtype", quantized.KEY)}
    return kept | parts | {"dtype": name}
