"""Optimizers by their names in the recipe, over two parameter groups: with and without weight decay.

An optimizer with `fused` among its defaults divides gradients by its `grad_scale` while it reads them; for the others
`loop` clips in a pass of its own. All that a checkpoint needs is in `state`, as tensors.
"""

from collections.abc import Callable

import torch

from finetune.model.optimizer.eight_bit import AdamW8bit, kernels
from finetune.model.optimizer.rounded import RoundedAdamW
from finetune.recipe.schema import Optimizer


def adamw(groups: list[dict], settings: Optimizer, *, seed: int, **_: object) -> torch.optim.Optimizer:
    if any(parameter.dtype == torch.bfloat16 for group in groups for parameter in group["params"]):
        return RoundedAdamW(groups, seed, betas=settings.betas, eps=settings.eps)
    # fused: 3.5 times faster than the loop and 5.6 times than foreach for 134.5 M parameters on two CPU cores
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=True)


def sgd(groups: list[dict], settings: Optimizer, **_: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, fused=True)


def adamw_8bit(
    groups: list[dict], settings: Optimizer, *, embeddings: set[torch.nn.Parameter], **_: object
) -> torch.optim.Optimizer:
    return AdamW8bit(groups, embeddings, betas=settings.betas, eps=settings.eps)


def paged_adamw_8bit(
    groups: list[dict], settings: Optimizer, *, embeddings: set[torch.nn.Parameter], **_: object
) -> torch.optim.Optimizer:
    return AdamW8bit(groups, embeddings, betas=settings.betas, eps=settings.eps, is_paged=True)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adamw,
    "sgd": sgd,
    "adamw_8bit": adamw_8bit,
    "paged_adamw_8bit": paged_adamw_8bit,
}
EIGHT_BIT = ("adamw_8bit", "paged_adamw_8bit")


def check(settings: Optimizer) -> None:
    """FinetuneError where what an optimizer needs is not installed."""
    if settings.name in EIGHT_BIT:
        kernels()


def build(model: torch.nn.Module, settings: Optimizer, seed: int) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters; `loop` writes the learning rate before every update."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim > 1]
    others = [parameter for parameter in trainable if parameter.ndim <= 1]
    decays = ((matrices, settings.weight_decay), (others, 0.0))
    groups = [{"params": members, "weight_decay": decay} for members, decay in decays if members]
    embeddings = {module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    return OPTIMIZERS[settings.name](groups, settings, seed=seed, embeddings=embeddings)
