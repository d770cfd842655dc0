"""Floor 7. The weights of a package: merged in fp32, cast once, written as safetensors. `export` calls both halves."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase

from finetune.checkpoints.loading import Opened, open_model
from finetune.checkpoints.manifest import Manifest
from finetune.model import adapter
from finetune.package import probe, proof
from finetune.package.card import hub_base
from finetune.package.proof import Check, Logits


def convert(
    model: torch.nn.Module, form: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.nn.Module, Logits, list[Check]]:
    """The model as it will be packaged, its logits, and how far each change moved them from the trained ones. Works in place."""
    trained = logits = probe.logits(model, tokenizer)
    checks = []
    if form == "merged" and adapter.is_adapter(model):
        model = model.merge_and_unload()
        logits = probe.logits(model, tokenizer)
        checks.append(proof.within("merge", "merging the adapter in fp32", trained, logits, proof.MERGE_BOUND))
    if dtype != torch.float32:
        with torch.no_grad():
            _cast(model, form, dtype)
        logits = probe.logits(model, tokenizer)
        checks.append(
            proof.within("cast", f"the cast to {dtype}".replace("torch.", ""), trained, logits, proof.CAST_BOUND)
        )
    return model, logits, checks


def mean(
    texts: Sequence[str], opened: Opened, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.nn.Module, list[Manifest], list[Check]]:
    """The mean in fp32 of the weights of `opened` and of what the refs name, adapters merged in first; and the manifests of these
    (Izmailov et al. 2018, arXiv 1803.05407; Wortsman et al. 2022, arXiv 2203.05482)."""
    model, _, checks = convert(opened.model, "merged", torch.float32, tokenizer)
    total, manifests = dict(model.named_parameters()), []  # tied ones once
    for count, text in enumerate(texts, 2):
        other = open_model(text, is_as_trained=False)
        merged, _, more = convert(other.model, "merged", torch.float32, tokenizer)
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                total[name].lerp_(parameter, 1 / count)
        manifests.append(other.checkpoint.manifest)
        checks += more
    steps = ", ".join(str(manifest.step) for manifest in [*manifests, opened.checkpoint.manifest])
    return model, manifests, [*checks, Check("average", f"the mean of the weights of steps {steps}, taken in fp32")]


def unquantized(trained: Logits, packaged: Logits) -> Check:
    """How far the adapter on the base itself is from the adapter on the quantized base, with which it was trained."""
    what = "the base itself, in place of the quantized one under the adapter"
    return proof.within("quantization", what, trained, packaged, proof.QUANTIZATION_BOUND)


def _cast(model: torch.nn.Module, form: str, dtype: torch.dtype) -> None:
    if form == "adapter":  # peft computes in fp32 with what the file holds
        for tensor in adapter.weights(model).values():
            tensor.copy_(tensor.to(dtype))
        return
    # Not model.to(dtype): that would also cast what is computed and not saved, like rotary frequencies, and from_pretrained does not.
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def write(model: torch.nn.Module, opened: Opened, form: str, dtype: torch.dtype, directory: Path) -> None:
    """Weights and config: whole and in shards, or an adapter that names its base on the Hub."""
    if form == "adapter":
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in adapter.weights(model).items()}
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        repo, revision = hub_base(opened.plan)
        config = json.loads((opened.checkpoint.path / "adapter_config.json").read_bytes())
        _write_json(directory / "adapter_config.json", config | {"base_model_name_or_path": repo, "revision": revision})
        return
    # The base's own config, as it is on the Hub: other programs read it, and not all know what a newer transformers would write.
    config = json.loads((opened.base_directory / "config.json").read_bytes())
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "_name_or_path")}
    model.config.use_cache = config.get("use_cache", True)  # `base.load_model` had turned it off
    # The base's own may be one that refuses to be saved; its file is copied over this one.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar would break up our own lines
        model.save_pretrained(directory, max_shard_size=opened.plan.recipe.package.max_shard_bytes)
    _write_json(directory / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
