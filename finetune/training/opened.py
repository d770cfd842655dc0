"""A ref to a live model: whatever a user can name, ready to evaluate, to generate with or to package.

A checkpoint of a run is verified first, every byte. Nothing here trains; `state` and `snapshot` do that.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.model import adapters, base
from finetune.model.base import templates
from finetune.plan.plan import Plan
from finetune.recipe.schema import Base
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.refs import find, parse
from finetune.store.run.directory import RunDirectory
from finetune.training.encoding import in_force


class _Settings(TypedDict, total=False):
    """Arguments of `base.load_model`."""

    dtype: torch.dtype
    attention: str | None
    quantization: str | None
    products: torch.dtype
    place: base.Place | None
    kind: base.LoadingClass


@dataclass(frozen=True)
class Opened:
    model: PreTrainedModel
    """In eval mode, an adapter on its base, not merged; fp32, but of a run with bf16 weights these, if it is as trained."""
    directory: Path
    """Where tokenizer and generation config are."""
    base_directory: Path
    plan: Plan | None
    """The plan of the run it comes from, if it comes from one."""
    checkpoint: Checkpoint | None
    """None for a base or a plain model."""

    @property
    def run_plan(self) -> Plan:
        """The plan of what is known to come from a run."""
        if self.plan is None:
            raise ValueError("it comes from no run")
        return self.plan

    @property
    def run_checkpoint(self) -> Checkpoint:
        """The checkpoint that it is known to be."""
        if self.checkpoint is None:
            raise ValueError("it is no checkpoint")
        return self.checkpoint


def open_model(
    text: str,
    attention: str | None = None,
    is_as_trained: bool = True,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Opened:
    """The model that a ref names: as it was trained, on a quantized base and with bf16 weights perhaps, or in fp32 on the base itself.

    It is made on the device, or on the CPU. A `dtype` is that of its weights whatever they were trained in.
    """
    asked: _Settings = {"attention": attention, "place": base.Place(device) if device else None}
    if dtype:
        asked["dtype"] = dtype
    base.refuse_foreign(text)
    ref = parse(text)
    # RUN@0 is not stored: it is the base that the plan pins.
    if ref.kind == "base":
        plan, _ = RunDirectory(ref.run).plan()
        directory = base.directory(plan.recipe.base, plan.base, as_trained=is_as_trained)
        asked["kind"] = base.class_named(plan.text_of)
        model = _loaded(directory, plan if is_as_trained else None, asked)
        return Opened(model, directory, directory, plan, None)
    if ref.kind == "run" or ref.kind == "checkpoint":
        return _open_checkpoint(find(ref), asked, is_as_trained)
    if ref.kind == "model" and (ref.path / "adapter_config.json").exists():
        return _open_adapter(ref.path, asked, None)
    # Pinned like the base of a recipe, so that config and weights come from one commit of the Hub.
    named = Base(checkpoint=text)
    directory = base.directory(named, base.pin(named))
    return Opened(base.load_model(directory, **asked), directory, directory, None, None)


def open_tokenizer(opened: Opened) -> PreTrainedTokenizerBase:
    """The tokenizer of an opened model as its rows were encoded, with the chat template that it was trained with."""
    tokenizer = base.load_tokenizer(opened.directory)
    own = templates.default(tokenizer.chat_template)
    if template := in_force(opened.plan, opened.directory, tokenizer) if opened.plan else own:
        tokenizer.chat_template = template
    return tokenizer


def _open_checkpoint(checkpoint: Checkpoint, asked: _Settings, is_as_trained: bool) -> Opened:
    # Before loading: a flipped bit gives numbers that look right.
    base.refuse_damaged(checkpoint.path)
    # A checkpoint copied out of its run has no plan beside it.
    run = base.run_around(checkpoint.path)
    plan = RunDirectory(run).plan()[0] if run else None
    trained = plan if is_as_trained else None
    is_adapter = (checkpoint.path / "adapter_config.json").exists()
    if checkpoint.manifest.kind == "average" and not is_adapter:
        trained = None  # its weights are in fp32, whatever those of training were in
    if is_adapter:
        return replace(_open_adapter(checkpoint.path, asked, trained), plan=plan, checkpoint=checkpoint)
    if plan:
        asked["kind"] = base.class_named(plan.text_of)
    model = _loaded(checkpoint.path, trained, asked)
    directory = checkpoint.path
    if plan and not base.has_tokenizer(directory):  # older code saved only some kinds
        directory = base.directory(plan.recipe.base, plan.base, with_weights=False)
    return Opened(model, directory, checkpoint.path, plan, checkpoint)


def _open_adapter(path: Path, asked: _Settings, plan: Plan | None) -> Opened:
    """An adapter on its base: that of its run, or the one that a plain peft directory names. As `plan` trained it, or in fp32."""
    below, pinned = base.beneath(path, str(path))
    base_directory = base.directory(below, pinned, as_trained=plan is not None)
    kind = base.class_below(path, base_directory, str(path))
    model = _loaded(base_directory, plan, {**asked, "kind": kind})
    # Not merged: merging rounds, so the figures would not be those of training.
    model = base.attach(model, path, str(path))
    if plan and plan.gpu_sums:
        adapters.sum_as_a_gpu(model)
    return Opened(model, base.tokenizer_directory(path, base_directory), base_directory, None, None)


def _loaded(directory: Path, plan: Plan | None, asked: _Settings) -> PreTrainedModel:
    """The model in a directory, with the weights as `plan` trains them, or in fp32; what is asked for comes first."""
    settings: _Settings = _as_trained(plan) if plan else {}
    settings.update(asked)
    return base.load_model(directory, **settings)


def _as_trained(plan: Plan) -> _Settings:
    """The arguments of `base.load_model` for the weights of training."""
    return {
        "dtype": base.DTYPES[plan.recipe.train.weights],
        "products": base.DTYPES[plan.recipe.train.precision],
        "quantization": plan.quantization,
    }
