"""RoPE scaling of a base: what to say of it, and whether the base's own code does it, tried on a small model of its kind."""

from pathlib import Path

import torch

from finetune import version
from finetune.errors import BaseError, explained
from finetune.model import base, rotary, tiny
from finetune.recipe.schema import Recipe
from finetune.store import cache

TOKENS = 40  # beyond `tiny.EDGE`
ANY_LENGTH = 2**40  # so that the small model's row is beyond its original context


def refuse_without_effect(recipe: Recipe, directory: Path) -> None:
    """BaseError where a long row gives the same with and without `base.rope`: some families read other settings, or none."""
    if recipe.base.rope is None:
        return
    directories = (directory, base.unscaled(directory))
    code = [Path(module.__file__ or "").read_text() for module in (rotary, tiny)]
    versions = [version(package) for package in ("finetune", "torch", "transformers")]
    facts = [*((each / "config.json").read_text() for each in directories), code, versions]
    if not cache.found("scalings", facts, lambda: not torch.equal(*map(_logits, directories))):
        message, hint = "computes the same with and without base.rope", "remove base.rope"
        raise BaseError(message, where=recipe.base.checkpoint, hint=hint)


def notes(recipe: Recipe, directory: Path) -> list[str]:
    """What to say of a scaling: the base's own, or the recipe's."""
    config, told = base.load_config(directory), []
    if recipe.base.rope:
        before, after = base.positions_of(base.load_config(base.unscaled(directory))), base.positions_of(config)
        told.append(
            f"its rotary positions are scaled by {recipe.base.rope.rope_type}: {after:,} in place of {before:,}"
        )
    if rotary.is_by_length(config):
        told.append("its rotary frequencies depend on the length: each row has those of its own, as it would alone")
    return told


def _logits(directory: Path) -> torch.Tensor:
    """Of a long row, in a small model with the same weights whatever its positions are."""
    config = base.load_config(directory)
    model = tiny.model_like(config, ANY_LENGTH)
    tokens = 3 + torch.arange(TOKENS) * 7 % 200
    with torch.inference_mode(), explained("transformers cannot run it", config.model_type):
        return model(input_ids=tokens[None], use_cache=False).logits
