"""A full fine-tune with some frozen tensors."""

import fnmatch

from transformers import PreTrainedModel

from finetune.errors import AdapterError
from finetune.model.adapters.member import Member, quoted
from finetune.recipe.schema import FrozenAdapter


def put_on(model: PreTrainedModel, settings: FrozenAdapter) -> PreTrainedModel:
    """The model itself; freezes parameters whose names match a pattern of `freeze`."""
    names = [name for name, _ in model.named_parameters()]
    missed = [pattern for pattern in settings.freeze if not fnmatch.filter(names, pattern)]
    if missed:
        raise AdapterError(
            f"no parameter is called {quoted(missed)}",
            where="adapter.freeze",
            hint=f"parameters are called like {quoted(names[:3])}",
        )
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.freeze):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise AdapterError(
            "every parameter is frozen, so there is nothing to train", where="adapter.freeze", hint="freeze fewer"
        )
    return model


MEMBER = Member(put_on)
