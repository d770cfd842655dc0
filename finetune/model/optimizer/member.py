"""What an optimizer of the recipe is made of here; its keys and its facts without torch are in `recipe/schema/optimizers.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from finetune.recipe.schema import Optimizer

Group = dict[str, Any]
"""A parameter group, as torch keeps it."""


class Trained(NamedTuple):
    """What an optimizer updates."""

    groups: list[Group]
    """Parameter groups, with and without weight decay."""
    embeddings: frozenset[torch.nn.Parameter]
    """Parameters of the model that embed tokens."""
    seed: int
    """Of random numbers, with the update and the parameter."""


@dataclass(frozen=True)
class Member:
    build: Callable[[Trained, Optimizer], torch.optim.Optimizer]
    """The loop writes the learning rate before every update; all that a checkpoint needs has to be in `state`, as tensors.

    One with `fused` among its defaults divides gradients by its `grad_scale` while it reads them; for the others the loop clips first.
    """
    check: Callable[[], object] | None = None
    """FinetuneError where what it needs is not installed."""
