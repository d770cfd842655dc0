"""LoRA: peft's low-rank matrices beside frozen linear layers, and beside experts whose matrices are one tensor."""

import warnings
from functools import partial
from typing import Any, cast

from transformers import PreTrainedModel

from finetune.errors import AdapterError, explained
from finetune.model.adapters.member import Member, quoted
from finetune.model.adapters.reach import ALL, Reach, reach_of
from finetune.model.adapters.unfit import unfit_layers
from finetune.recipe.schema import LoraAdapter

TARGETS_HINT = "name its layers in adapter.targets, or train without an adapter"


def put_on(model: PreTrainedModel, settings: LoraAdapter, is_whole: bool = True, **options: Any) -> PreTrainedModel:
    """The model with peft's LoRA matrices, fp32; only they are trained. `is_whole` is of `reach_of`; options go to peft's config."""
    import peft

    reach = reach_of(model, settings, is_whole)
    _refuse_dropout(reach, settings)
    _refuse_quantized(model, reach)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),  # whatever its type says, peft takes fractions
        lora_dropout=settings.dropout,
        target_modules=reach.modules,
        target_parameters=reach.parameters or None,
        exclude_modules=reach.excluded or None,
        task_type="CAUSAL_LM",
        **_patterns(reach, settings),
        **options,
    )
    # peft still asks transformers by an old name
    with (
        warnings.catch_warnings(action="ignore", category=FutureWarning),
        explained("peft cannot put an adapter on this base", "adapter", TARGETS_HINT, AdapterError),
    ):
        # of ranks it speaks for experts that it has just found itself
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        # what peft's model has not itself, it has from the one in it
        return cast(PreTrainedModel, peft.get_peft_model(model, config))


def _patterns(reach: Reach, settings: LoraAdapter) -> dict[str, Any]:
    """peft's factors of rank and alpha for experts, times the recipe's."""
    factors = {"rank_pattern": settings.rank, "alpha_pattern": settings.alpha}
    return {
        name: {key: factor * factors[name] for key, factor in found.items()} for name, found in reach.patterns.items()
    }


def _refuse_quantized(model: PreTrainedModel, reach: Reach) -> None:
    """peft adds to these weights before the product, which takes numbers."""
    if packed := next((name for name in reach.parameters if not model.get_parameter(name).is_floating_point()), None):
        hint = "name linear layers in adapter.targets alone, or remove base.quantization"
        raise AdapterError(f"`{packed}` is quantized, and LoRA would add to it", where="adapter", hint=hint)


def _refuse_dropout(reach: Reach, settings: LoraAdapter) -> None:
    if reach.has_fused and settings.dropout:
        message = "LoRA has no dropout on experts whose matrices are one tensor"
        hint = "set adapter.dropout: 0, or name only other layers in adapter.targets"
        raise AdapterError(message, where="adapter.dropout", hint=hint)


def skipped(model: PreTrainedModel, settings: LoraAdapter) -> str | None:
    """Which layers of the bare model `all-linear` skips beside the head, and why; None if it takes all of them."""
    if settings.targets != ALL:
        return None
    head = model.get_output_embeddings()
    reasons: dict[str, set[str]] = {}
    for name, reason in unfit_layers(model).items():
        if model.get_submodule(name) is not head:
            reasons.setdefault(reason, set()).add(name.rpartition(".")[2])
    told = [f"{quoted(sorted(names))} ({reason})" for reason, names in reasons.items()]
    return f"all-linear skips {', '.join(told)}" if told else None


def is_changed(model: PreTrainedModel, settings: LoraAdapter) -> bool:
    """Whether older code reached something else of the bare model."""
    try:
        return reach_of(model, settings, is_whole=False) != reach_of(model, settings)
    except AdapterError:  # older code refused it
        return True


MEMBER = Member(put_on, skipped, partial(put_on, is_whole=False), is_changed)
