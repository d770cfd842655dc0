"""Bases whose files hold weights in fewer bits than bf16: reads them as the numbers they stand for, or refuses them."""

from collections.abc import Mapping
from importlib.util import find_spec

from finetune.errors import BaseError
from finetune.model.base.damaged import Json
from finetune.store.tensors import Place

KEY = "quantization_config"
READ = ("mxfp4",)  # transformers makes bf16 of it to the bit: gpt-oss is published in nothing else

HINT = "name the checkpoint that it was made from; base.quantization: nf4 quantizes that while it is read"


def refuse(config: Json, where: str) -> None:
    """BaseError if the files of this config (as JSON) hold weights that cannot be read as numbers."""
    method = _method_of(config)
    if method not in (None, *READ):
        raise BaseError(f"is quantized already ({method}), and such weights cannot be trained", where=where, hint=HINT)


def refuse_types(tensors: Mapping[str, Place], where: str) -> None:
    """BaseError if weights are 8-bit floats: models have no place for their scales, and without these the numbers are wrong."""
    if name := next((name for name, place in tensors.items() if place.dtype.startswith("F8_E4M3")), None):
        message = f"is quantized already (`{name}` is {tensors[name].dtype}), and such weights cannot be trained"
        raise BaseError(message, where=where, hint=HINT)


def to_numbers(config: object) -> bool:
    """Tells transformers, in its config, to read the weights as numbers, whatever kernels are installed. Returns whether they are quantized."""
    said = getattr(config, KEY, None)
    if said:
        setattr(config, KEY, said | {"dequantize": True})
    return bool(said)


def check_quantizable(config: Json, kind: str, is_stored: bool = False) -> None:
    """BaseError where a base cannot be quantized while it is read: it is so already, or what does it is not installed."""
    if method := _method_of(config):
        message, hint = f"`{kind}` cannot be made of a base that is quantized already ({method})", "remove the key"
        raise BaseError(message, where="base.quantization", hint=hint)
    if not find_spec("bitsandbytes"):
        message, hint = f"`{kind}` weights need bitsandbytes", "pip install bitsandbytes"
        if is_stored:
            message = f"the base's files are in `{kind}` and stay so under the adapter, which needs bitsandbytes"
            hint += ", or set base.quantization: dequantized"
        raise BaseError(message, where="base.quantization", hint=hint)


def _method_of(config: Json) -> str | None:
    for part in (config, config.get("text_config")):
        said = part.get(KEY) if isinstance(part, dict) else None
        if said:
            return str(said.get("quant_method", "unknown")) if isinstance(said, dict) else "unknown"
    return None
