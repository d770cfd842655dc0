"""The class of transformers that loads a checkpoint: a causal LM, or a model that reads images or sound beside its text.

A type may have both. Then its config says which one its authors, and users of a package, load.
"""

from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from finetune.errors import BaseError

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
LoadingClass = type[PreTrainedModel] | type[AutoModelForCausalLM]


def wide_class(config: PretrainedConfig) -> str | None:
    """The name of the class that reads images or sound beside text; None if the config declares a causal LM alone."""
    causal, wide = causal_names(config.model_type), wide_names(config.model_type)
    if getattr(config, "is_encoder_decoder", False):  # an encoder's tokens see those after them
        return None
    declared = [*(config.architectures or []), *causal, *([] if causal else wide[:1])]
    return declared[0] if declared and declared[0] in wide else next((name for name in causal if name in wide), None)


def other_than_text(model_type: str, architectures: list[str]) -> str | None:
    """What a config declares, if no class of its type generates text; None if one does."""
    causal, wide = causal_names(model_type), wide_names(model_type)
    if not causal and not wide:
        return f"of type `{model_type}`, which has no causal LM in transformers"
    is_text = any(name.endswith(LANGUAGE_MODELS) or name in wide for name in architectures)
    return None if is_text or not architectures else architectures[0]


def causal_names(model_type: str) -> tuple[str, ...]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, model_type)


def wide_names(model_type: str) -> tuple[str, ...]:
    from transformers.models.auto import modeling_auto as auto

    mappings = (auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    return tuple(name for mapping in mappings for name in _names(mapping, model_type))


def _names(mapping: dict[str, Any], model_type: str) -> tuple[str, ...]:
    found = mapping.get(model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)


def class_named(name: str | None) -> LoadingClass:
    """The class of a plan's `text_of`; None stands for the causal LM that transformers chooses."""
    found: LoadingClass = getattr(transformers, name) if name else AutoModelForCausalLM
    return found


def class_of(config: PretrainedConfig) -> LoadingClass:
    """The class that a config declares. BaseError if none of its type generates text from text alone."""
    wide = wide_class(config)
    if wide is None and not causal_names(config.model_type):
        message, hint = "is not a language model: it is an encoder with a decoder", "choose a base that generates text"
        raise BaseError(message, where=config.model_type, hint=hint)
    return class_named(wide)


def made(kind: LoadingClass, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """A new model of a class, with the weights that transformers draws."""
    if issubclass(kind, PreTrainedModel):
        return kind._from_config(config, **options)
    return kind.from_config(config, **options)
