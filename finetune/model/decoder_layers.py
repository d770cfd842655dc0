"""Settings of decoder layers: activation checkpointing and compilation."""

import os
import shutil

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.errors import BaseError, FinetuneError
from finetune.model.losses import unwrapped
from finetune.model.row_by_row import MARK

PEFT_PARTS = ("base_layer", "default", "modules_to_save")  # what it wraps modules in
MOST_FORMS = 1024  # of a layer's code: eight lengths an octave, with gradients and without
COMPILERS = ("g++", "clang++")  # what inductor looks for, unless CXX names another


def checkpoint_activations(model: PreTrainedModel, is_offloaded: bool = False) -> None:
    """Each decoder layer keeps only its input, and runs again in the backward pass with the same random numbers.

    `is_offloaded`: in the host's memory. A CPU's inputs are there already, and transformers would lock pages that no GPU reads.
    """
    inner = unwrapped(model)
    # transformers 5.17 has the second name alone
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    moved = {"offload": True} if is_offloaded and model.device.type != "cpu" else {}
    try:
        enable({"use_reentrant": False}, **moved)
    except ValueError as error:
        hint = "set train.activation_checkpointing: false"
        raise BaseError(str(error), where="train.activation_checkpointing", hint=hint) from None
    # What that adds for re-entrant checkpoints is not wanted: with it the gradient of frozen embeddings' output is computed.
    inner.disable_input_require_grads()


def check_compiler() -> None:
    """FinetuneError if there is no C++ compiler."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), *COMPILERS) if name):
        hint = "install g++, or set train.compile: false"
        raise FinetuneError("there is no C++ compiler", where="train.compile", hint=hint)


def compile_layers(model: PreTrainedModel, is_fixed: bool = False) -> None:
    """Compiles norms and feed-forward of decoder layers. Layers share graphs, and so do lengths of more than one token.

    `is_fixed`: each length is compiled for itself, so that its code, and with it every bit, depends on nothing that came before.
    Without it, code depends on the first lengths. Nothing is timed to choose code. A length too many is an error.

    It skips attention, and what runs by row: both depend on the bounds of rows, and would be compiled again for every number of rows.
    """
    check_compiler()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts = [part for layer in layers for part in layer.children() if not _depends_on_rows(part)]
    if not parts:
        hint = "set train.compile: false"
        raise BaseError("the layers of this base are not known", where="train.compile", hint=hint)
    if is_fixed:
        from torch import _dynamo as dynamo  # here: it takes a second

        # Else the ninth length would silently run by the model's own code, whichever that is.
        dynamo.config.recompile_limit = dynamo.config.accumulated_recompile_limit = MOST_FORMS
        dynamo.config.fail_on_recompile_limit_hit = True
    for part in parts:
        # random numbers as they are without, so that dropout is the same
        part.compile(dynamic=not is_fixed, options={"fallback_random": True, "deterministic": is_fixed})


def _depends_on_rows(part: torch.nn.Module) -> bool:
    return "Attention" in type(part).__name__ or any(hasattr(each, MARK) for each in part.modules())


def module_of(parameter: str) -> str:
    """The group of modules of a parameter's figures: `layers.3`, or `embed_tokens` beside the layers."""
    parts = [part for part in parameter.split(".")[:-1] if not part.startswith("lora_") and part not in PEFT_PARTS]
    # By the first number: experts within a layer have numbers, too.
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbered[0] - 1 : numbered[0] + 1]) if numbered else parts[-1]
