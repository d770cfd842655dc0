"""What `base.quantization` leaves as it is: bitsandbytes quantizes linear layers, and experts in one tensor are none.

Its `replace_parameter_4bit` saves no memory in a backward pass, and breaks under peft: docs/experts.md has the figures.
"""

from pathlib import Path

from finetune.errors import BaseError
from finetune.model import kinds
from finetune.model.base.damaged import name_of
from finetune.model.base.load import empty_model
from finetune.model.base.text_side import beside_text
from finetune.plan.kinds import BESIDE_TEXT

MOST = 0.1  # of a base's weights; its embeddings and its head stay in any case, so they do not count


def refuse_unquantized(path: Path, quantization: str) -> None:
    """BaseError where more than a tenth of the text side would stay in 16 or 32 bits, with the list by kind of module."""
    model = empty_model(path)
    beside = beside_text(model)
    of_kind = kinds.by_kind(model, {id(each) for name, each in model.named_parameters() if name in beside})
    left = kinds.unquantized(of_kind)
    total = sum(one["parameters"] for kind, one in of_kind.items() if kind != BESIDE_TEXT)
    if sum(left.values()) <= MOST * total:
        return
    parts = ", ".join(f"{kind} {count / total:.0%}" for kind, count in left.items())
    message = f"`{quantization}` would leave {sum(left.values()) / total:.0%} of {name_of(path)} as it is: {parts} of its weights"
    hint = "remove base.quantization: these matrices are no linear layers, and bitsandbytes quantizes no others"
    raise BaseError(message, where="base.quantization", hint=hint)
