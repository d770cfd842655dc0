"""Floor 1. How decoder layers run: what they keep for the backward pass, and whether they are compiled; `state` asks once."""

import os
import shutil

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.errors import BaseError, FinetuneError

PEFT_PARTS = ("base_layer", "default", "modules_to_save")  # what it wraps modules in
COMPILERS = ("g++", "clang++")  # what inductor looks for, unless CXX names another


def checkpoint_activations(model: torch.nn.Module) -> None:
    """Each decoder layer keeps its input alone, and runs again in the backward pass with the random numbers that it had."""
    inner = _transformers_model(model)
    # transformers 5.17 has the second name alone
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        hint = "set train.activation_checkpointing: false"
        raise BaseError(str(error), where="train.activation_checkpointing", hint=hint) from None
    # What that adds for re-entrant checkpoints is not wanted: with it the gradient of frozen embeddings' output is computed.
    inner.disable_input_require_grads()


def compile_layers(model: torch.nn.Module) -> None:
    """Compiles what decoder layers do beside attention: norms and feed-forward; layers share graphs, and so do lengths of more than one token.

    Attention depends on where rows begin: compiled with it, a layer would be compiled anew for every number of rows.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), *COMPILERS) if name):
        hint = "install g++, or set train.compile: false"
        raise FinetuneError("there is no C++ compiler", where="train.compile", hint=hint)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts = [part for layer in layers for part in layer.children() if "Attention" not in type(part).__name__]
    if not parts:
        hint = "set train.compile: false"
        raise BaseError("the layers of this base are not known", where="train.compile", hint=hint)
    for part in parts:
        # random numbers as they are without, so that dropout is the same
        part.compile(dynamic=True, options={"fallback_random": True})


def module_of(parameter: str) -> str:
    """The group of modules that a parameter's figures are recorded under: `layers.3`, or `embed_tokens` beside the layers."""
    parts = [part for part in parameter.split(".")[:-1] if not part.startswith("lora_") and part not in PEFT_PARTS]
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbered[0] - 1 : numbered[0] + 1]) if numbered else parts[-1]


def _transformers_model(model: torch.nn.Module) -> torch.nn.Module:
    return model.get_base_model() if hasattr(model, "peft_config") else model
