"""What Accelerate's launcher or configuration file asks of a training: taken where the recipe agrees, refused with both values where not.

Accelerate would shard the model itself, or make it something else, silently.
"""

import os
from collections.abc import MutableMapping

from finetune.errors import FinetuneError
from finetune.recipe.schema import Train

ASKED = "FINETUNE_STRATEGY"
"""The strategy that the launcher's settings ask for, where the recipe leaves it open."""
OFF = ("", "0", "n", "no", "f", "false", "off", "none")
FSDP = "ACCELERATE_USE_FSDP"
OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", OFF),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron", OFF),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("several kinds of parallelism", OFF),
    "ACCELERATE_DYNAMO_BACKEND": ("a compiler (train.compile is the recipe's)", OFF),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("accumulation (it follows from train.micro_batch_tokens)", ("", "1")),
}
"""What no recipe asks for, and the values that ask for nothing."""
WRAPPED = ("", "transformer_based_wrap")
SHARDED = ("", "true", "1", "full_shard")  # the first version has the last two names


def take(settings: Train, environment: MutableMapping[str, str] = os.environ) -> None:
    """Moves the wish for FSDP out of Accelerate's sight, into `ASKED`. FinetuneError where it does not agree with the recipe."""
    asked = [name for name, (_, off) in OTHER_WAYS.items() if environment.get(name, "").lower() not in off]
    if asked:
        what = " and ".join(OTHER_WAYS[name][0] for name in asked)
        hint = f"unset {', '.join(asked)}, or change the launcher's flags or configuration file that set it"
        raise FinetuneError(f"Accelerate is set to use {what}", where="environment", hint=hint)
    if environment.get(FSDP, "").lower() in OFF:
        return
    if problems := _unlike(settings, environment):
        hint = f"unset {FSDP}, or change the launcher's flags or configuration file, or the recipe"
        message = "Accelerate is set to use FSDP in another way than the recipe:\n  " + "\n  ".join(problems)
        raise FinetuneError(message, where="environment", hint=hint)
    del environment[FSDP]
    environment[ASKED] = "fsdp"


def _unlike(settings: Train, environment: MutableMapping[str, str]) -> list[str]:
    """A line for each value that says something else than the recipe, or than finetune does."""
    checkpoints, offloads = settings.activation_checkpointing, settings.activation_offload
    ours = {
        "FSDP_RESHARD_AFTER_FORWARD": (SHARDED, "finetune shards weights again after each forward"),
        "FSDP_OFFLOAD_PARAMS": (OFF, "finetune keeps its rows on the device"),
        "FSDP_AUTO_WRAP_POLICY": (WRAPPED, "finetune shards by decoder layer"),
        "FSDP_IGNORED_MODULES": (OFF, "finetune shards all modules"),
        "FSDP_ACTIVATION_CHECKPOINTING": _switch("train.activation_checkpointing", checkpoints),
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": _switch("train.activation_offload", offloads),
    }
    given = {name: environment.get(name, "") for name in ours}
    lines = [
        f"{name} is {given[name]}, and {why}" for name, (fit, why) in ours.items() if given[name].lower() not in fit
    ]
    whole = [f"{FSDP} is {environment[FSDP]}, and train.strategy is ddp"] if settings.strategy == "ddp" else []
    return whole + lines


def _switch(key: str, is_on: bool) -> tuple[tuple[str, ...], str]:
    """The values that agree with a key. Accelerate sets the variable to false where its user says nothing."""
    return (*OFF, *(("true", "1") if is_on else ())), f"{key} is {str(is_on).lower()}"
