"""Whether this machine and this base can do what a plan says: what `train` would meet later, found before a weight is read.

`plan` and `train` ask the same; `plan --devices` is about other machines and asks nothing here.
"""

import os
from pathlib import Path

from finetune import version
from finetune.data import gates
from finetune.errors import BaseError, RunError
from finetune.model import base, decoder_layers, optimizer, routing
from finetune.plan import disk
from finetune.store import cache
from finetune.tasks import TASKS
from finetune.training.resolve import Resolved


def refuse_unready(resolved: Resolved, run: Path) -> None:
    """RunError, BaseError or FinetuneError with the key to change."""
    refuse_unfit_base(resolved)
    recipe = resolved.plan.recipe
    if quantization := resolved.plan.quantization:
        if not (is_stored := bool(resolved.plan.base.stored)):
            base.refuse_unquantized(resolved.base_directory, quantization)
        base.check_quantization(resolved.base_directory, quantization, is_stored)
    optimizer.check(recipe.optimizer)
    if recipe.train.compile:
        decoder_layers.check_compiler()
        refuse_varied_lengths(resolved)
    if recipe.train.router_loss != "off":
        routing.coefficient_of(base.empty_model(resolved.base_directory), recipe.train.router_loss)
    _refuse_place(run)
    disk.refuse_small_disk(resolved.plan, run)


def refuse_gated(resolved: Resolved, where: str) -> None:
    """DataError for what a new run must not begin with, unless the recipe allows it."""
    task = resolved.plan.recipe.task
    has_answers = TASKS[task.name].template_of is not None
    stops = base.stop_tokens(resolved.base_directory, resolved.tokenizer, task.stop_names) if has_answers else ()
    gates.refuse(gates.Encoded(resolved.plan, resolved.train, stops), where)


def refuse_unfit_base(resolved: Resolved) -> None:
    """BaseError where files of weights are missing or cut, or are not those of the config. Of a Hub base that is not here yet nothing is said."""
    directory = resolved.base_directory
    base.check_generation_config(directory)
    is_here = resolved.plan.base.kind == "directory" and resolved.plan.base.dequantized is None
    if not is_here and not list(directory.glob("*.safetensors")):
        return
    base.check_weight_files(directory)
    kind = base.class_named(resolved.plan.text_of)
    facts = [resolved.plan.base.model_dump(mode="json"), *map(version, ("finetune", "torch", "transformers"))]
    facts += filter(None, [resolved.plan.text_of])
    # Cached: it makes an empty model of the base, which is slow for a large one.
    base.refuse_lacking(directory, cache.found("lacking", facts, lambda: base.lacking(directory, kind)))


def refuse_varied_lengths(resolved: Resolved) -> None:
    """BaseError where compiled code would depend on the order of lengths: the trial found that rows of this base cannot be packed."""
    if resolved.plan.recipe.train.has_fixed_lengths and resolved.plan.arrangement != "packed":
        message = "rows of this base cannot be packed, so lengths are not fixed"
        raise BaseError(message, where="train.compile", hint="set train.reproducibility: fast, or train.compile: false")


def _refuse_place(run: Path) -> None:
    """RunError where the run directory cannot be made, or written in."""
    # A new run is not there yet, so its nearest existing parent decides.
    existing = next(parent for parent in [run.absolute(), *run.absolute().parents] if parent.exists())
    hint = "name another directory with --run"
    if not existing.is_dir():
        raise RunError(f"{existing} is a file, not a directory", where=str(run), hint=hint)
    # Asked now and not by the first commit, after hours of training.
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(f"user {os.geteuid()} may not write in {existing}", where=str(run), hint=hint)
