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
    put_on_older: Callable[[PreTrainedModel, Any], PreTrainedModel] | None = None
    """`put_on` as older code did it, for runs that began so."""
    is_changed: Callable[[PreTrainedModel, Any], bool] | None = None
    """(the bare model, the section) -> whether `put_on_older` would train something else."""


def quoted(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
