"""Floor 0. Bases whose files hold quantized weights: trained as they are read, most would be garbage or fail at the first step.

`base.quantization` quantizes a base of plain weights while it is opened; that is another thing.
"""

from collections.abc import Mapping

from finetune.checkpoints.tensors import Place
from finetune.errors import BaseError

READ = ("mxfp4",)  # transformers makes bf16 of it, as gpt-oss is published
HINT = "name the base that it was made from; `base.quantization: nf4` quantizes that for training"


def refuse(config: Mapping[str, object], where: str) -> None:
    """BaseError where the config says so."""
    said = config.get("quantization_config")
    if not said:
        return
    method = said.get("quant_method") if isinstance(said, dict) else None
    if method not in READ:
        message = f"has quantized weights (`{method or 'unknown'}`), which cannot be trained"
        raise BaseError(message, where=where, hint=HINT)


def refuse_types(tensors: Mapping[str, Place], where: str) -> None:
    """BaseError where weights are of 8-bit floats: without their scales, which models have no place for, they are other numbers."""
    if name := next((name for name, place in tensors.items() if place.dtype.startswith("F8_E4M3")), None):
        message = f"has quantized weights (`{name}` in {tensors[name].dtype}), which cannot be trained"
        raise BaseError(message, where=where, hint=HINT)
