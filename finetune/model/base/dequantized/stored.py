"""Weights that stay in the bits of their files under an adapter: what transformers is told to load them so.

They are in a view of the base whose config says nothing of them. So everything but the loading of weights takes it for any other base.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from finetune.errors import BaseError
from finetune.model.base import view
from finetune.model.base.damaged import Json, read_json

SKIPPED = "llm_int8_skip_modules"
THRESHOLD = "llm_int8_threshold"


def settings(path: Path, products: torch.dtype) -> dict[str, Any] | None:
    """`quantization_config` of the files behind `path`, whose products have the type `products`; None where nothing is stored so.

    Of the files' own config only settings about their bits count.
    """
    said = _said_behind(path)
    if said is None:
        return None
    own: dict[str, Any] = {"quant_method": "bitsandbytes", SKIPPED: _names(said.get(SKIPPED))}
    if said.get("load_in_8bit"):
        threshold = said.get(THRESHOLD, 6.0)
        return own | {"load_in_8bit": True, THRESHOLD: float(threshold) if isinstance(threshold, int | float) else 6.0}
    return own | {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": said["bnb_4bit_quant_type"],
        "bnb_4bit_use_double_quant": bool(said.get("bnb_4bit_use_double_quant")),
        "bnb_4bit_compute_dtype": str(products).removeprefix("torch."),
    }


def cast_others(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives the weights that are not quantized this type: transformers leaves them in that of their files. To bf16, fp32 ones stay."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and (dtype == torch.float32 or parameter.dtype != torch.float32):
            parameter.data = parameter.data.to(dtype)


def refuse_undeclared(model: PreTrainedModel, where: str) -> None:
    """BaseError where a layer should be quantized by the files' config and is not in the files."""
    for name, module in model.named_modules():
        if getattr(getattr(module, "weight", None), "quant_state", module) is None:
            message = f"does not say in its config that `{name}` is not quantized"
            raise BaseError(message, where=where, hint="set base.quantization: dequantized")


def _said_behind(path: Path) -> Json | None:
    while (origin := view.origin_of(path)) is not None:
        source = Path(origin["source"])
        if path.parent.name == view.STORED:
            config = read_json(source / "config.json")
            parts = (config, config.get("text_config"))
            return next(
                one["quantization_config"] for one in parts if isinstance(one, dict) and one.get("quantization_config")
            )
        path = source
    return None


def _names(value: object) -> list[str] | None:
    return [str(one) for one in value] if isinstance(value, list) else None
