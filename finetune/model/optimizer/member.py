"""The functions of an optimizer. `recipe/schema/optimizers.py` has its keys, and its facts without torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from finetune.recipe.schema import Optimizer

Group = dict[str, Any]
"""A parameter group, as torch keeps it."""


class Trained(NamedTuple):
    """The parameters an optimizer updates."""

    groups: list[Group]
    """Parameter groups, with and without weight decay."""
    embeddings: frozenset[torch.nn.Parameter]
    """Parameters of the model that embed tokens."""
    seed: int
    """Together with update and parameter, it seeds the random numbers."""


@dataclass(frozen=True)
class Member:
    build: Callable[[Trained, Optimizer], torch.optim.Optimizer]
    """The loop writes the learning rate before every update. `state` must have everything a checkpoint needs, as tensors.

    With `fused` in its defaults, it must divide gradients by its `grad_scale` while it reads them; else the loop clips first.
    """
    check: Callable[[], object] | None = None
    """FinetuneError if a package it needs is not installed."""
