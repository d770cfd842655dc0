"""The class of transformers whose weights, or whose adapter, is in files, where a base can be loaded as two."""

import re
from collections.abc import Collection
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from finetune.model.base import outline
from finetune.model.base.loading_class import LoadingClass, causal_names, class_of, made
from finetune.model.base.text_side import beside_text

LAYER = re.compile(r"\.lora_\w+(\..*)?$")


def class_in(path: Path, config: PretrainedConfig) -> LoadingClass:
    """The class whose weights are in the files at `path`: the declared one, or the causal LM if nothing beside text is in them.

    Runs of older code trained the causal LM of such a base, and their checkpoints declare what the base does.
    """
    declared, names = class_of(config), causal_names(config.model_type)
    if not issubclass(declared, PreTrainedModel) or not names or declared.__name__ in names:
        return declared
    causal: type[PreTrainedModel] = getattr(transformers, names[0])
    if not (places := outline.headers(path)):
        return declared
    tensors = outline.on_meta(places)
    whole = outline.outline(declared, config, tensors)
    if not whole.missing or whole.filled & beside_text(whole.model):
        return declared
    text, own = config.get_text_config(), causal.config_class
    alone = outline.outline(causal, text if own and type(text) is own else config, tensors)
    return declared if alone.missing or alone.mismatched else AutoModelForCausalLM


def class_under(adapter: Collection[str], path: Path, config: PretrainedConfig) -> LoadingClass:
    """The class that an adapter was trained on, by the names of its tensors, where the model at `path` can be loaded as two."""
    declared = class_in(path, config)
    if declared is AutoModelForCausalLM or not causal_names(config.model_type):
        return declared
    layers = {LAYER.sub("", name.removeprefix("base_model.model.")) for name in adapter if ".lora_" in name}
    for kind in (declared, AutoModelForCausalLM):
        with torch.device("meta"):
            modules = {name for name, _ in made(kind, config).named_modules()}
        if layers <= modules:
            return kind
    return declared
