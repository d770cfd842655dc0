"""By which classes a model is loaded: the one that its config declares, as users do, and the causal LM that was trained."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import AutoConfig

from finetune.errors import PackageError
from finetune.model.base import outline
from finetune.package.probe import declared_class
from finetune.package.verify.contents import Finding


def surplus(model: torch.nn.Module, directory: Path, carried: Mapping[str, torch.Tensor]) -> dict[str, frozenset[str]]:
    """Of each class that the folder is loaded by, the names of carried tensors that it finds there and does not want."""
    if not carried:
        return {}
    found = {type(model).__name__: outline.outline(type(model), model.config, carried).unexpected}
    declared = declared_class(directory)
    if declared not in (None, type(model)):
        config = AutoConfig.from_pretrained(directory)
        found[declared.__name__] = outline.outline(declared, config, carried).unexpected
    return found


def findings(directory: Path) -> Iterator[Finding]:
    """Weights that the class of the config wants and that the files do not have. PackageError where the installed transformers makes no
    model of the config."""
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
