"""AdamW with moments of 8 bits; a full GPU moves them to the host."""

import torch

from finetune.model.optimizer.adamw_8bit import AdamW8bit, kernels
from finetune.model.optimizer.member import Member, Trained
from finetune.recipe.schema import Optimizer


def build(trained: Trained, settings: Optimizer) -> torch.optim.Optimizer:
    return AdamW8bit(trained.groups, trained.embeddings, betas=settings.betas, eps=settings.eps, is_paged=True)


MEMBER = Member(build, kernels)
