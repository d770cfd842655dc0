"""Packages a small random model of the base's kind and loads it back, before the real one is trained.

It finds faults of the kind of model in a second: classes, names and types of weights, parts beside the text. It must not judge
figures: those of random weights mean nothing.
"""

import tempfile
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from finetune.errors import AdapterError, BaseError, PackageError, explained
from finetune.model import adapters, base, tiny
from finetune.model.base import files, outline
from finetune.model.base.loading_class import made
from finetune.package import classes, proof
from finetune.package.assembly import assemble
from finetune.package.probe import declared_class
from finetune.package.verify.checks import CHECKS
from finetune.package.verify.folder import Folder
from finetune.training.opened import Opened
from finetune.training.resolve import Resolved

OF_WEIGHTS = ("header", "index", "dtype", "finite", "tied")


def problem(resolved: Resolved) -> str | None:
    """The reason why the trained model could not be packaged; None if it could. Raises BaseError if no small model can be made or
    written."""
    untried, problems = [], []
    for way in range(tiny.WAYS):
        try:
            found = _problem(resolved, way)
        except BaseError as error:
            untried.append(error)
            continue
        if found is None:
            return None
        problems.append(found)  # perhaps a fault of these layers together, not of the base
    if not problems:
        raise untried[0]
    return problems[0]


def _problem(resolved: Resolved, way: int) -> str | None:
    """The same for one choice of layers."""
    with tempfile.TemporaryDirectory() as made:
        whole, package = Path(made, "base"), Path(made, "package")
        package.mkdir()
        with explained("cannot be made small", resolved.plan.recipe.base.checkpoint):
            model = _written_base(resolved, way, whole)
        try:
            with outline.quiet(), explained("fails", "package", kind=PackageError):
                opened = Opened(_with_adapter(model, resolved), whole, whole, resolved.plan, None)
                assemble(opened, resolved.tokenizer, whole, package, proof.load_here, is_random=True)
        except PackageError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno:  # a fault of this machine's disk
                raise BaseError(error.message, where=made) from None
            return error.message
        if resolved.plan.recipe.package.form == "adapter":  # the base of an adapter is not written
            return None
        folder = Folder(package)
        found = [*(item for name in OF_WEIGHTS for item in CHECKS[name](folder)), *classes.findings(package)]
    return f"{found[0].check}: {found[0].tensor or found[0].file} {found[0].message}" if found else None


def _written_base(resolved: Resolved, way: int, directory: Path) -> PreTrainedModel:
    """A small base, by the class in its config, with the small files of the real one; loaded again like a real base."""
    config = base.load_config(resolved.base_directory)
    declared = declared_class(resolved.base_directory)
    with torch.random.fork_rng(devices=[]), outline.quiet():
        torch.manual_seed(0)
        small = _with_vocabulary(tiny.shrunk(config, resolved.plan.recipe.task.max_length, way), config)
        model = made(base.class_of(small), small) if declared is None else declared(small)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(directory)
    with tempfile.TemporaryDirectory() as nothing:
        files.copy_small_files(resolved.base_directory, Path(nothing), directory)
    return base.load_model(directory, kind=base.class_named(resolved.plan.text_of))


def _with_vocabulary(small: PretrainedConfig, config: PretrainedConfig) -> PretrainedConfig:
    """Full size: the tokenizer is the real one too."""
    pairs = ((small, config), (small.get_text_config(), config.get_text_config()))
    for one, real in pairs:
        for name in ("vocab_size", "vocab_size_per_layer_input"):
            if isinstance(getattr(real, name, None), int):
                setattr(one, name, getattr(real, name))
    return small


def _with_adapter(model: PreTrainedModel, resolved: Resolved) -> PreTrainedModel:
    if resolved.plan.text_of:
        model = base.freeze_beside_text(model)
    try:
        return adapters.apply(model, resolved.plan.recipe.adapter).eval()
    except AdapterError:  # it names layers missing in the small model
        return model
