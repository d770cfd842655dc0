"""The section `optimizer`."""

from typing import Literal

from pydantic import Field

from finetune.recipe.schema.values import Betas, CountOrShare, Section


class Optimizer(Section):
    """How gradients become updates."""

    name: Literal["adamw", "sgd", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """`adamw` (Loshchilov & Hutter 2019, arXiv 1711.05101) or `sgd`. `adamw_8bit` (Dettmers et al. 2021, arXiv 2110.02861) holds the moments of matrices in a quarter of the memory, with other losses than `adamw`; `paged_adamw_8bit` lets a GPU move them to the host when it is full, which is slow when it happens. Both need bitsandbytes."""
    learning_rate: float = Field(gt=0, lt=10)
    """The peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """The learning rate's course after warm-up; `linear` and `cosine` end at zero."""
    warmup: CountOrShare = "3%"
    """Steps, or the share of all steps, in which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay, on matrices only (not on biases and norms); decoupled from the gradient for `adamw`."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's term against division by zero."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum of `sgd`."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
