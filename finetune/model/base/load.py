"""From a checkpoint's directory to its config, tokenizer and model: the one place that loads weights.

It must run no code from a checkpoint and read no pickle: it refuses `auto_map`, and weights are safetensors only.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.base import get_keys_to_not_convert

from finetune.errors import BaseError, explained, of_libraries
from finetune.model import rotary
from finetune.model.base import quantized
from finetune.model.base.class_in_files import class_in
from finetune.model.base.damaged import damaged, name_of, read_json
from finetune.model.base.dequantized import stored
from finetune.model.base.loading_class import LoadingClass, class_of, made, other_than_text
from finetune.model.base.quiet import quiet
from finetune.model.base.text_side import parts_beside
from finetune.model.base.tokenizer import refuse_remote_code
from finetune.model.base.weight_files import check_weight_files, refuse_lacking

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # as recipes spell them
STORED_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}  # as safetensors spells them


def load_config(path: Path) -> PretrainedConfig:
    """The config of a language model. Reads it as JSON first and refuses names of code to run."""
    from transformers import AutoConfig

    if not (path / "config.json").exists():
        message, hint = "has no config.json, so it is not a checkpoint", "name a transformers checkpoint"
        raise BaseError(message, where=name_of(path), hint=hint)
    raw = read_json(path / "config.json")
    refuse_remote_code(path)
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise damaged(path / "config.json", "`architectures` is not a list of names")
    if what := other_than_text(str(raw.get("model_type")), architectures):
        hint = "choose a base that generates text"
        raise BaseError(f"is not a language model: it is {what}", where=name_of(path), hint=hint)
    quantized.refuse(raw, name_of(path))
    try:
        config = AutoConfig.from_pretrained(path)
        class_of(config)
        config.get_text_config().vocab_size  # noqa: B018 some have several, none of which is the language model's
        quantized.to_numbers(config)
        return config
    except of_libraries() as error:
        raise damaged(path / "config.json", " ".join(str(error).split())) from None


class Place(NamedTuple):
    """The device of a new model, and which tensors to read in another type.

    Reading a base on the host in fp32 takes more host memory than a GPU needs to train an adapter on it.
    """

    device: torch.device
    names: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.bfloat16

    @contextmanager
    def reading(self, model_class: type[PreTrainedModel]) -> Iterator[None]:
        """Models of this class are read so meanwhile. Buffers that a model computes for itself stay as they would be."""
        if not self.names:
            yield
            return
        names, before = "|".join(map(re.escape, sorted(self.names))), model_class._get_dtype_plan

        def planned(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
            for name, parameter in model.named_parameters():  # on the meta device; by their types memory is set aside
                if name in self.names:
                    parameter.data = parameter.data.to(self.dtype)
            return {**before(model, dtype), f"^(?:{names})$": self.dtype}

        model_class._get_dtype_plan = planned  # type: ignore[method-assign,assignment] # given back below
        try:
            yield
        finally:
            model_class._get_dtype_plan = before  # type: ignore[method-assign]


def load_model(
    path: Path,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    quantization: str | None = None,
    products: torch.dtype = torch.float32,
    place: Place | None = None,
    *,
    kind: LoadingClass | None = None,
) -> PreTrainedModel:
    """The model with all its weights, at `place` or on the CPU, in eval mode. A missing weight or a wrong shape is an error.

    Without `attention` it is the model's own: sdpa, or eager if sdpa would be wrong, as for Gemma 2. `products` is the type in
    which quantized layers compute; they are quantized on the model's device, or are so in the files. Skips weights without a place in the model:
    checkpoints often carry the heads of other tasks. `kind` is the class, by default the one whose weights the files hold.
    """
    config = load_config(path)
    if quantization:
        check_quantization(path, quantization)
    check_weight_files(path)
    kind = kind or class_in(path, config)
    placed = place if place is not None and place.device.type != "cpu" else None
    options: dict[str, Any] = {"device_map": {"": placed.device if placed else "cpu"}} if placed or quantization else {}
    own = stored.settings(path, products) if quantization else None
    reading = place.reading(type(empty_model(path, kind))) if place and place.names else contextlib.nullcontext()
    with quiet(), explained("transformers cannot open it", name_of(path)), reading:
        if own:
            setattr(config, quantized.KEY, own)
        elif quantization:
            options["quantization_config"] = _bits(quantization, products, empty_model(path, kind))
        loaded: Any = kind.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are listed below, not thrown as a table
            output_loading_info=True,  # makes it a pair, which its signature does not say
            **options,
        )
    model: PreTrainedModel = loaded[0]
    refuse_lacking(path, {kind: names_of(loaded[1][kind]) for kind in ("missing_keys", "mismatched_keys")})
    if own:
        stored.refuse_undeclared(model, name_of(path))
        stored.cast_others(model, dtype)
    for module in model.modules():
        # else some CPUs repack quantized weights in the first evaluation, for good, and no gradient passes from then on
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 a plain attribute of bitsandbytes
    model.config.use_cache = False  # with a cache, packed rows would silently see one another
    return rotary.separate(model)


def names_of(keys: Iterable[object]) -> list[str]:
    """Sorted names in what transformers tells about its loading, which is names, or names with shapes."""
    return sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)


def check_quantization(path: Path, kind: str, is_stored: bool = False) -> None:
    """BaseError if the base at `path` cannot be quantized in this way during loading, or if nothing here can read it as it is stored."""
    quantized.check_quantizable(read_json(path / "config.json"), kind, is_stored)


def _bits(quantization: str, products: torch.dtype, model: PreTrainedModel) -> BitsAndBytesConfig:
    """Linear layers in 4 bits with quantized scales (QLoRA, arXiv 2305.14314), or in 8 (LLM.int8(), arXiv 2208.07339), whose
    products have the type of their input. Not the embeddings, norms and head, and nothing beside the text side."""
    beside = parts_beside(model)
    # a list takes the place of transformers' own, which has the head
    skipped = [*get_keys_to_not_convert(model), *beside] if beside else None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        llm_int8_skip_modules=skipped,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=products,
    )


def empty_model(path: Path, kind: LoadingClass | None = None) -> PreTrainedModel:
    """The model on the meta device: names and shapes, no memory, for counting and for checking an adapter."""
    config = load_config(path)
    kind = kind or class_in(path, config)
    with torch.device("meta"), quiet(), explained("transformers cannot make its model", name_of(path)):
        model = made(kind, config)
        model.tie_weights()
    return model
