"""The classes that load a model: the one in its config, as users do, and the trained causal LM."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from finetune.errors import PackageError
from finetune.model.base import outline
from finetune.package.probe import declared_class
from finetune.package.verify.contents import Finding


def surplus(model: PreTrainedModel, directory: Path, carried: Mapping[str, torch.Tensor]) -> dict[str, frozenset[str]]:
    """For each loading class, the names of carried tensors that it finds in the folder and does not want."""
    if not carried:
        return {}
    found = {type(model).__name__: outline.outline(type(model), model.config, carried).unexpected}
    declared = declared_class(directory)
    if declared and declared is not type(model):
        config = AutoConfig.from_pretrained(directory)
        found[declared.__name__] = outline.outline(declared, config, carried).unexpected
    return found


def findings(directory: Path) -> Iterator[Finding]:
    """Weights that the class of the config wants and the files lack. Raises PackageError if the installed transformers cannot make a
    model from the config."""
    try:
        config = AutoConfig.from_pretrained(directory)
        declared = declared_class(directory)
        if declared is None:
            return
        found = outline.outline(declared, config, outline.on_meta(outline.headers(directory)))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PackageError(f"transformers makes no model of its config: {reason}", where=str(directory)) from None
    for name in sorted(found.missing):
        yield Finding("class", "config.json", name, f"is in no file, and {declared.__name__} would fill it by chance")
    for name in sorted(found.mismatched):
        yield Finding("class", "config.json", name, f"has another shape than {declared.__name__} wants")
