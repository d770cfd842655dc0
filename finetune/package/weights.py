"""The weights of a package: merged in fp32, cast once, written as safetensors together with untrained tensors of the base."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from finetune.errors import PackageError
from finetune.model import adapters, base
from finetune.model.base import outline
from finetune.package import bounds, probe
from finetune.package.card.facts import hub_base
from finetune.package.proof import Check, Logits
from finetune.recipe.schema import Recipe
from finetune.store.checkpoints.manifest import Manifest
from finetune.training.opened import Opened, open_model

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Converted:
    """A model in its packaged form."""

    model: PreTrainedModel
    logits: Logits
    checks: list[Check]
    """The distance of the logits from the trained ones after each change."""
    exact: Mapping[str, torch.Tensor]
    """Tensors stored in fp32, like in the base's files, though transformers casts them on loading."""


@dataclass(frozen=True)
class Stored:
    """The tensors of a package's files, by their names there."""

    tensors: dict[str, torch.Tensor]
    carried: dict[str, torch.Tensor]
    """Tensors of the base outside the trained class (a vision tower, layers that predict several tokens), unchanged."""

    @property
    def types(self) -> dict[str, str]:
        """In safetensors' spelling."""
        own = {name: base.STORED_DTYPES[tensor.dtype] for name, tensor in self.tensors.items()}
        return own | {name: spelled(tensor.dtype) for name, tensor in self.carried.items()}


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Type of the packaged weights."""
    return base.DTYPES[recipe.package.dtype or recipe.train.precision]


def spelled(dtype: torch.dtype) -> str:
    return next(name for name, one in outline.TYPES.items() if one == dtype)


def convert(
    model: PreTrainedModel,
    form: str,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    base_directory: Path | None = None,
    is_random: bool = False,
) -> Converted:
    """Works in place. `base_directory` has the base's files, if available: their fp32 tensors are stored in fp32 again."""
    trained = logits = probe.logits(model, tokenizer)
    merge_bound, cast_bound = (math.inf, math.inf) if is_random else (bounds.MERGE_BOUND, bounds.CAST_BOUND)
    checks: list[Check] = []
    exact: dict[str, torch.Tensor] = {}
    if form == "merged" and adapters.is_adapter(model):
        model = cast("PeftModel", model).merge_and_unload()
        logits = probe.logits(model, tokenizer)
        checks.append(bounds.within("merge", "merging the adapter in fp32", trained, logits, merge_bound))
    if dtype != torch.float32:
        if form == "adapter":
            _cast_adapter(model, dtype)
        else:
            names = (
                outline.stored_in_fp32(model, base_directory)
                if base_directory
                else outline.rounded_beside(model, dtype)
            )
            exact = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in names}
            model = as_loaded(model, dtype)
        logits = probe.logits(model, tokenizer)
        checks.append(bounds.within("cast", f"the cast to {dtype}".replace("torch.", ""), trained, logits, cast_bound))
    return Converted(model, logits, checks, exact)


def mean(
    texts: Sequence[str], opened: Opened, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, list[Manifest], list[Check]]:
    """The mean in fp32 of the weights of `opened` and of the refs, adapters merged in first; and the manifests of the refs
    (Izmailov et al. 2018, arXiv 1803.05407; Wortsman et al. 2022, arXiv 2203.05482)."""
    first = convert(opened.model, "merged", torch.float32, tokenizer)
    total, manifests, checks = dict(first.model.named_parameters()), [], first.checks  # tied ones once
    for count, text in enumerate(texts, 2):
        other = open_model(text, is_as_trained=False)
        merged = convert(other.model, "merged", torch.float32, tokenizer)
        with torch.no_grad():
            for name, parameter in merged.model.named_parameters():
                total[name].lerp_(parameter, 1 / count)
        manifests.append(other.run_checkpoint.manifest)
        checks += merged.checks
    steps = ", ".join(str(manifest.step) for manifest in [*manifests, opened.run_checkpoint.manifest])
    return (
        first.model,
        manifests,
        [*checks, Check("average", f"the mean of the weights of steps {steps}, taken in fp32")],
    )


def unquantized(trained: Logits, packaged: Logits, plain: str) -> Check:
    """The distance between the adapter on plain weights and on the quantized ones of the training."""
    what = f"{plain}, in place of the quantized weights under the adapter"
    return bounds.within("quantization", what, trained, packaged, bounds.QUANTIZATION_BOUND)


def as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model as transformers would load its weights in `dtype`; takes over the weights.

    Tensors that its class keeps in fp32 stay. Computed buffers (Falcon-H1's multipliers, Gemma's scale of embeddings) are computed
    in that type. Casting the model in place would do neither.
    """
    kept = outline.kept(model)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and name not in kept:
                tensor.data = tensor.data.to(dtype)
    with outline.quiet():
        made: PreTrainedModel = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=model.state_dict(),
            dtype=dtype,
            attn_implementation=_attention_of(model.config),
        )
    made.config.use_cache = model.config.use_cache
    return made.eval()


def _attention_of(config: PretrainedConfig) -> dict[str, str]:
    """By the names of parts, "" for the whole: a model's text part may use another attention than its image part."""
    parts = {"": config} | {name: getattr(config, name, None) for name in config.sub_configs}
    found = {name: getattr(part, "_attn_implementation", None) for name, part in parts.items()}
    return {name: kind for name, kind in found.items() if kind}


def _cast_adapter(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """peft computes in fp32, from the values in the file."""
    with torch.no_grad():
        for tensor in adapters.weights(model).values():
            tensor.copy_(tensor.to(dtype))


def stored(
    converted: Converted,
    form: str,
    dtype: torch.dtype,
    base_directory: Path | None,
    beside: frozenset[str] = frozenset(),
) -> Stored:
    """The tensors of a package's files, under the base's names. Those of the model `beside` its text side are read from the base's files."""
    if form == "adapter":
        return Stored({name: one.to(dtype) for name, one in adapters.weights(converted.model).items()}, {})
    model = converted.model
    own = adapters.weights(model) | dict(converted.exact)
    unsaved = {*(model._keys_to_ignore_on_save or ()), *beside}
    own = {name: tensor for name, tensor in own.items() if name not in unsaved}
    tensors = outline.in_file_names(model, own, base_directory)
    names = outline.not_of(model, base_directory, tensors) if base_directory else []
    return Stored(tensors, _read(base_directory, names) if base_directory and names else {})


def _read(directory: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Tensors of a model's files, mapped."""
    found: dict[str, torch.Tensor] = {}
    for file, places in outline.headers_by_file(directory).items():
        wanted = [name for name in names if name in places]
        if unknown := [name for name in wanted if places[name].dtype not in outline.TYPES]:
            raise PackageError(f"{unknown[0]} is {places[unknown[0]].dtype}, which torch cannot read", where=file)
        with safe_open(directory / file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in wanted}
    return found


def zeros(found: Stored, base_directory: Path | None) -> list[str]:
    """Matrices of zeros that are also zero in the base."""
    empty = [name for name, tensor in (found.tensors | found.carried).items() if tensor.ndim > 1 and not tensor.any()]
    before = _read(base_directory, empty) if empty and base_directory else {}
    return sorted(name for name, tensor in before.items() if not tensor.any())


def write(found: Stored, opened: Opened, form: str, dtype: torch.dtype, directory: Path) -> None:
    """Writes weights and config: whole and in shards, or an adapter that names its base on the Hub."""
    if form == "adapter":
        tensors = {name: tensor.contiguous() for name, tensor in found.tensors.items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        repo, revision = hub_base(opened.run_plan) or (None, None)
        if opened.checkpoint:
            config = json.loads((opened.checkpoint.path / "adapter_config.json").read_bytes())
        else:  # before the training
            config = adapters.config_of(opened.model, opened.run_plan)
        _write_json(directory / "adapter_config.json", config | {"base_model_name_or_path": repo, "revision": revision})
        return
    # The base's own config, as on the Hub: other programs read it, and may not know the output of a newer transformers.
    config = json.loads((opened.base_directory / "config.json").read_bytes())
    config = {key: value for key, value in config.items() if key != "_name_or_path"}
    if _is_untied(opened.model):
        # transformers does not tie stored weights that differ, whatever the config says; others do
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and part.get("tie_word_embeddings"):
                part["tie_word_embeddings"] = False
    _write_json(directory / "config.json", base.with_dtype(config, dtype))
    _write_shards(found.tensors | found.carried, opened.run_plan.recipe.package.max_shard_bytes, directory)


def _is_untied(model: PreTrainedModel) -> bool:
    """Whether the head has weights of its own, and transformers has tied nothing."""
    head = model.get_output_embeddings()
    return (
        not getattr(model, "all_tied_weights_keys", None)
        and head is not None
        and getattr(head, "weight", None) is not model.get_input_embeddings().weight
    )


def _write_shards(tensors: dict[str, torch.Tensor], limit: int, directory: Path) -> None:
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        save_file(shard, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
