"""Weights, config and small files of a package: written, loaded back and compared with the model in memory."""

import json
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.errors import PackageError, explained
from finetune.model import base
from finetune.package import classes, probe, proof, reference, small_files, weights
from finetune.package.proof import Check, Loader, Look
from finetune.package.reference import FromBase, Recorded
from finetune.training.opened import Opened


class Assembled(NamedTuple):
    model: PreTrainedModel
    """In its packaged form."""
    checks: list[Check]
    record: Recorded
    """Its logits, as kept by `reference`."""


def assemble(
    opened: Opened,
    tokenizer: PreTrainedTokenizerBase,
    base_directory: Path | None,
    directory: Path,
    load: Loader,
    is_random: bool = False,
) -> Assembled:
    """Writes the files of `opened` into `directory`, in the form and type of its plan. Raises PackageError if they are not that model.

    `base_directory` has the files of the base's authors, with the weights if available. For random weights, the effect of merge and
    cast on the logits is not judged.
    """
    recipe = opened.run_plan.recipe
    form, dtype = recipe.package.form, weights.dtype_of(recipe)
    told, hint = f"transformers cannot run it in {dtype}".replace("torch.", ""), "set package.dtype: fp32"
    with explained(told, "package", hint, PackageError):
        converted = weights.convert(opened.model, form, dtype, tokenizer, base_directory, is_random)
    model = converted.model
    trained = Look(converted.logits, json.loads(json.dumps(probe.facts(model, tokenizer))))
    text_of = opened.run_plan.text_of
    beside = base.beside_text(model) if text_of and form == "merged" and base_directory else frozenset()
    found = weights.stored(converted, form, dtype, base_directory, beside)
    weights.write(found, opened, form, dtype, directory)
    small_files.write(directory, opened.directory, tokenizer, base_directory, is_adapter=form == "adapter")
    loaded = load(directory, opened.base_directory if form == "adapter" else None, *filter(None, [text_of]))
    surplus = classes.surplus(model, directory, found.carried)
    checks = [*proof.equal(trained, loaded, surplus, beside), *converted.checks]
    checks.append(proof.stored_as(directory, found.types, base.STORED_DTYPES[dtype]))
    processors = [file.name for file in small_files.processors(directory)]
    if base_directory and (found.carried or processors):
        checks.append(proof.carried(directory, base_directory, found.carried, processors))
    from_base: FromBase = {
        "types": {name: kind for name, kind in sorted(found.types.items()) if kind != base.STORED_DTYPES[dtype]},
        "zeros": weights.zeros(found, base_directory),
        "processors": processors,
    }
    record = reference.recorded(loaded.logits, base.STORED_DTYPES[dtype], text_of)
    return Assembled(model, checks, {**record, "from_base": from_base})
