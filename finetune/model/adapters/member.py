"""The two functions of an adapter. Its section in the schema has its keys, and its facts without torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Member:
    put_on: Callable[[PreTrainedModel, Any], PreTrainedModel]
    """(the loaded model, also on the meta device for counting; the section) -> the model to train. AdapterError if they do not fit."""
    skipped: Callable[[PreTrainedModel, Any], str | None] | None = None
    """(the bare model, the section) -> which layers it skips and why, for a user; None if it skips none."""


def quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
