"""A model as its files store it: which weights they keep in fp32, and which they lack."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from finetune.model.base import outline
from finetune.model.base.load import Place, empty_model, load_model
from finetune.model.base.loading_class import LoadingClass

Settings = tuple[torch.dtype, str | None, str | None, torch.dtype, Place | None]
"""The arguments of `load_model`, in its order."""


def load_as_stored(path: Path, *settings: *Settings, kind: LoadingClass | None = None) -> PreTrainedModel:
    """As `load_model`, but tensors stored in fp32 beside half precision stay in fp32, also in bf16."""
    model = empty_model(path, kind)
    with outline.keeping(type(model), outline.stored_in_fp32(model, path)):
        return load_model(path, *settings, kind=kind)


def lacking(path: Path, kind: LoadingClass | None = None) -> dict[str, list[str]]:
    """For `refuse_lacking`, from headers alone."""
    model = empty_model(path, kind)
    found = outline.outline(type(model), model.config, outline.on_meta(outline.headers(path)))
    return {"missing_keys": sorted(found.missing), "mismatched_keys": sorted(found.mismatched)}
