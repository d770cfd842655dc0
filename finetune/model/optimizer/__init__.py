"""Optimizers: they turn gradients into updates.

An optimizer `x` of the recipe is the `MEMBER` of the file `x.py` here, and its facts in `recipe/schema/optimizers.py`.
"""

from importlib import import_module
from typing import cast

import torch

from finetune.model.optimizer.member import Group, Member, Trained
from finetune.recipe.schema import Optimizer, optimizers

OPTIMIZERS: dict[str, Member] = {name: import_module(f"{__name__}.{name}").MEMBER for name in optimizers.OPTIMIZERS}


def check(settings: Optimizer) -> None:
    """FinetuneError if a package of an optimizer is not installed."""
    if check_member := OPTIMIZERS[settings.name].check:
        check_member()


def build(model: torch.nn.Module, settings: Optimizer, seed: int) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim > 1]
    others = [parameter for parameter in trainable if parameter.ndim <= 1]
    decays = ((matrices, settings.weight_decay), (others, 0.0))
    groups: list[Group] = [{"params": members, "weight_decay": decay} for members, decay in decays if members]
    tables = (module for module in model.modules() if isinstance(module, torch.nn.Embedding))
    embeddings = frozenset(cast(torch.nn.Parameter, table.weight) for table in tables)
    return OPTIMIZERS[settings.name].build(Trained(groups, embeddings, seed), settings)
