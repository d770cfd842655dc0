"""Loads adapters, ours and other people's, onto a model, or merges them into it.

Everything except the merge's own proof also works on the meta device, so a plan refuses an impossible merge before training.
"""

import json
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import PreTrainedModel

from finetune.errors import BaseError, CheckpointError
from finetune.model.base.class_in_files import class_under
from finetune.model.base.damaged import Json
from finetune.model.base.load import load_config
from finetune.model.base.loading_class import LoadingClass
from finetune.store.tensors import read_header

if TYPE_CHECKING:
    import peft

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NAME = "default"  # peft's name of the one adapter; it appears in parameter names
TYPES = (
    "LORA",
    "ADALORA",
    "LOHA",
    "LOKR",
    "IA3",
)  # those whose merge is tested; the others have no weights to merge into
# Ways to begin a LoRA that leave the base as it was. After the others (PiSSA, OLoRA, …) an adapter fits only a changed base.
HARMLESS_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
REFUSED_SETTINGS = (
    "megatron_config",
    "layer_replication",
)  # the one names code to import, the other makes a deeper model
MERGE_YOURSELF = "merge it where it was made (merge_and_unload, save_pretrained), and name that directory"
MERGE_BOUND = 1e-5  # mean nats a token; merging in fp32 only changes the order of sums (SmolLM2-135M: 2e-11)
PROBE_TOKENS = 64


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter. If it holds both, it counts as one, as in transformers."""
    return (directory / CONFIG).is_file()


def read_config(directory: Path, where: str) -> Json:
    """The adapter's own config. BaseError if its kind cannot be merged, with the reason."""
    import peft

    try:
        config = json.loads((directory / CONFIG).read_bytes())
        kind = config["peft_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise BaseError(f"its {CONFIG} is damaged: {error}", where=where, hint="copy it again") from None
    if kind not in TYPES:
        raise BaseError(f"is an adapter of the type {kind}, which cannot be merged", where=where, hint=MERGE_YOURSELF)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        message = f"is an adapter for another task: {config['task_type']}"
        raise BaseError(message, where=where, hint="choose one that generates text")
    known = {field.name for field in fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    strange = sorted(
        name for name, value in config.items() if value and (name not in known or name in REFUSED_SETTINGS)
    )
    if strange:
        message = f"is an adapter with settings that cannot be merged here: {', '.join(strange)}"
        raise BaseError(message, where=where, hint=MERGE_YOURSELF)
    if config.get("init_lora_weights") not in HARMLESS_STARTS:
        message = f"was started by `{config['init_lora_weights']}`, which changes the base as well"
        hint = f"save it with path_initial_model_for_weight_conversion, or {MERGE_YOURSELF}"
        raise BaseError(message, where=where, hint=hint)
    return config


def check_weights(directory: Path, where: str) -> None:
    """BaseError if the adapter's weights are missing, torn or a pickle."""
    if not (directory / WEIGHTS).is_file():
        is_pickle = (directory / "adapter_model.bin").exists()
        message = f"has no {WEIGHTS}" + (", only a pickle, which is never read" if is_pickle else "")
        raise BaseError(message, where=where, hint="load it with peft once and call save_pretrained")
    try:
        read_header(directory / WEIGHTS)
    except CheckpointError as error:
        raise BaseError(f"its {WEIGHTS} is damaged: {error.message}", where=where, hint="copy it again") from None


def class_below(directory: Path, below: Path, where: str) -> LoadingClass:
    """The class of the base at `below` that the adapter was trained on."""
    check_weights(directory, where)
    return class_under(read_header(directory / WEIGHTS), below, load_config(below))


class Unfit(Protocol):
    """The names that only the model or only the file has, as torch lists them."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def attach(model: PreTrainedModel, directory: Path, where: str) -> PreTrainedModel:
    """The model with the adapter on it, not trainable, in eval mode. An unknown or a missing tensor is an error."""
    # what peft's model has not itself, it has from the one in it
    return cast(PreTrainedModel, _adapted(model, directory, where))


def _adapted(model: PreTrainedModel, directory: Path, where: str) -> "peft.PeftModel":
    """The same as peft's own class.

    Resizes the vocabulary if the adapter's training did.
    """
    import peft

    read_config(directory, where)
    check_weights(directory, where)
    tensors = load_file(directory / WEIGHTS)
    with warnings.catch_warnings(action="ignore"):
        _resize_vocabulary(model, tensors)
        config = peft.PeftConfig.from_pretrained(str(directory))
        config.inference_mode = True
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # any start will do: all of it is in the file
        try:
            adapted = peft.PeftModel(model, config, adapter_name=NAME)
            result = _load(adapted, tensors)
        except (ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BaseError(f"does not fit its base: {reason}", where=where, hint="check which base it names") from None
    missing = [name for name in result.missing_keys if ".lora_" in name]
    # a vocabulary that was both resized and trained is in the file two times
    unknown = [name for name in result.unexpected_keys if ".modules_to_save." not in name]
    if unknown or missing:
        message = f"does not fit its base: {(unknown + missing)[0]} is in only one of them"
        raise BaseError(message, where=where, hint="check which base it names")
    return adapted.eval()


def _load(adapted: "peft.PeftModel", tensors: dict[str, torch.Tensor]) -> Unfit:
    """Loads tensors by their names; peft loads only files of other versions. It also renames: it takes `shared_experts` of Laguna
    for a family's old name, and then nothing fits."""
    import peft

    named = re.compile(rf"\.{NAME}(?=\.|$)")
    places = {named.sub("", name): name for name in adapted.state_dict() if named.search(name)}
    if tensors.keys() != places.keys():
        return peft.set_peft_model_state_dict(adapted, tensors, NAME)
    return adapted.load_state_dict({places[name]: tensor for name, tensor in tensors.items()}, strict=False)


def merge(model: PreTrainedModel, directory: Path, where: str) -> PreTrainedModel:
    """The model with the adapter merged into its fp32 weights; BaseError if it then computes something else."""
    adapted = _adapted(model, directory, where)
    _untie_adapted(cast(PreTrainedModel, adapted.get_base_model()))
    before = _probe(cast(PreTrainedModel, adapted))
    with warnings.catch_warnings(action="ignore"):
        try:
            merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=before is not None)
        except (ValueError, RuntimeError) as error:
            raise BaseError(f"cannot be merged: {error}", where=where, hint=MERGE_YOURSELF) from None
    if before is not None and (after := _probe(merged)) is not None:
        change = F.kl_div(after, before, log_target=True, reduction="batchmean").item()
        if not change <= MERGE_BOUND:
            message = f"merging changes the model by a mean KL of {change:.3g}; the bound is {MERGE_BOUND:g}"
            raise BaseError(message, where=where, hint=MERGE_YOURSELF)
    head = merged.get_output_embeddings()
    if merged.config.tie_word_embeddings and head is not None:
        merged.config.tie_word_embeddings = head.weight is merged.get_input_embeddings().weight
    return merged


def _resize_vocabulary(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """To the number of rows in the adapter's own copy of the embeddings, if it has one. Its values are loaded with the rest."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    for name in names:
        for part in ("weight", "base_layer.weight"):
            rows = tensors.get(f"base_model.model.{name}.{part}")
            if rows is not None and len(rows) != layers[0].num_embeddings:
                model.resize_token_embeddings(len(rows), mean_resizing=False)
                return


def _untie_adapted(model: PreTrainedModel) -> None:
    """Gives the head its own weights if the adapter changes one end of tied embeddings: a merge would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in ends or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    first, head = (end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends)
    if getattr(head, "weight", None) is first.weight:
        head.weight = torch.nn.Parameter(cast(torch.Tensor, first.weight).detach().clone(), requires_grad=False)


def _probe(model: PreTrainedModel) -> torch.Tensor | None:
    """Log-probabilities (T, V) at tokens from all over the vocabulary; None on the meta device."""
    weight = cast(torch.Tensor, model.get_input_embeddings().weight)
    if weight.is_meta:
        return None
    tokens = torch.linspace(0, len(weight) - 1, PROBE_TOKENS).long()[None]
    with torch.inference_mode():
        return F.log_softmax(model(input_ids=tokens, use_cache=False).logits[0].double(), dim=-1)
