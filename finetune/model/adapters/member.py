"""What an adapter of the recipe is made of here; its keys and its facts without torch are its section's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Member:
    put_on: Callable[[PreTrainedModel, Any], PreTrainedModel]
    """(the loaded model, also on the meta device for counting; the section) -> the model to train. AdapterError where they do not fit."""
    skipped: Callable[[PreTrainedModel, Any], str | None] | None = None
    """(the bare model, the section) -> which layers it passes over and why, for a user; None where it passes over none."""


def quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
