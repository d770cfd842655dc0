"""What `base.quantization` leaves as it is: bitsandbytes quantizes linear layers, and experts in one tensor are none."""

from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from finetune.errors import BaseError
from finetune.model.base.damaged import name_of
from finetune.model.base.load import empty_model
from finetune.model.base.text_side import beside_text
from finetune.model.decoder_layers import kind_of

MOST = 0.1  # of a base's weights; its embeddings and its head stay in any case, so they do not count


def refuse_unquantized(path: Path, quantization: str) -> None:
    """BaseError where more than a tenth of the text side would stay in 16 or 32 bits, with the list by kind of module."""
    model = empty_model(path)
    beside = beside_text(model)
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    modules += [each for each in model.modules() if isinstance(each, torch.nn.Linear | Conv1D | torch.nn.Embedding)]
    known = {id(each) for module in modules if module is not None for each in module.parameters()}
    total, left = 0, dict[str, int]()
    for name, each in model.named_parameters():
        if name in beside:
            continue
        total += each.numel()
        if id(each) not in known:
            left[kind_of(name)] = left.get(kind_of(name), 0) + each.numel()
    if sum(left.values()) <= MOST * total:
        return
    parts = ", ".join(f"{kind} {count / total:.0%}" for kind, count in sorted(left.items(), key=lambda one: -one[1]))
    message = f"`{quantization}` would leave {sum(left.values()) / total:.0%} of {name_of(path)} as it is: {parts} of its weights"
    hint = "remove base.quantization: these matrices are no linear layers, and bitsandbytes quantizes no others"
    raise BaseError(message, where="base.quantization", hint=hint)
