"""Stochastic gradient descent, with or without momentum."""

import torch

from finetune.model.optimizer.member import Member, Trained
from finetune.recipe.schema import Optimizer


def build(trained: Trained, settings: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained.groups, lr=0.0, momentum=settings.momentum, fused=True)


MEMBER = Member(build)
