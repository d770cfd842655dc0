"""The section `optimizer`, and what is known of each optimizer and of each schedule without torch.

How an optimizer updates is in `model/optimizer/`, in the file of its name; the curves of schedules are in `plan/schedules.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from finetune.recipe.schema.values import Betas, CountOrShare, RateOrShare, Section


class Optimizer(Section):
    """The optimizer turns gradients into updates."""

    name: Literal["adamw", "sgd", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """`adamw` (Loshchilov & Hutter 2019, arXiv 1711.05101) or `sgd`. `adamw_8bit` (Dettmers et al. 2021, arXiv 2110.02861) holds the moments of matrices in a quarter of the memory, with other losses than `adamw`; `paged_adamw_8bit` lets a full GPU move them to the host, slowly. Both need bitsandbytes."""
    learning_rate: float = Field(gt=0, lt=10)
    """The peak learning rate."""
    schedule: Literal["constant", "wsd", "inverse_sqrt", "linear", "cosine"] = "cosine"
    """The curve of the learning rate after warm-up. `linear` and `cosine` fall to `min_learning_rate`. `wsd` keeps the peak and falls in the last steps (`decay`). `inverse_sqrt` falls with the square root of the steps (`timescale`), whatever the run's length."""
    min_learning_rate: RateOrShare = 0.0
    """The end of `linear`, `cosine` and `wsd`: a rate, or a share of the peak."""
    decay: CountOrShare = "20%"
    """The last steps in which `wsd` falls, or their share of all steps."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """How `wsd` falls; `sqrt` falls with one minus the square root of the part that is over (Hägele et al. 2024, arXiv 2405.18392)."""
    timescale: CountOrShare | None = None
    """Steps of `inverse_sqrt`: after three times as many the rate is halved. Default: those of `warmup`."""
    warmup: CountOrShare = "3%"
    """Steps, or the share of all steps, for the learning rate to rise from zero."""
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

    @property
    def facts(self) -> "OptimizerFacts":
        return OPTIMIZERS[self.name]

    @property
    def schedule_settings(self) -> dict[str, object]:
        """The keys that decide the schedule's form; its end is not among them."""
        return {key: getattr(self, key) for key in SCHEDULES[self.schedule].keys if key != "min_learning_rate"}


@dataclass(frozen=True)
class OptimizerFacts:
    state_bytes_per_parameter: Callable[[Optimizer], int]
    keys: tuple[str, ...] = ()
    """Those of the section that have a meaning for it, and not for every optimizer."""
    keeps_small_updates: bool = False
    """Whether updates of weights in bf16 are rounded up or down by chance; rounded to nearest, most of a small learning rate's are lost."""
    is_by_row: bool = True
    """Whether its state has the rows of its parameters, and can be spread over devices with them."""


@dataclass(frozen=True)
class ScheduleFacts:
    keys: tuple[str, ...] = ()
    """Those of the section that have a meaning for it, and not for every schedule."""


OPTIMIZERS: dict[str, OptimizerFacts] = {
    "adamw": OptimizerFacts(lambda settings: 8, ("betas", "eps"), keeps_small_updates=True),
    "sgd": OptimizerFacts(lambda settings: 4 if settings.momentum else 0, ("momentum",)),
    "adamw_8bit": OptimizerFacts(lambda settings: 2, ("betas", "eps"), is_by_row=False),
    "paged_adamw_8bit": OptimizerFacts(lambda settings: 2, ("betas", "eps"), is_by_row=False),
}
SCHEDULES: dict[str, ScheduleFacts] = {
    "constant": ScheduleFacts(),
    "wsd": ScheduleFacts(("min_learning_rate", "decay", "decay_shape")),
    "inverse_sqrt": ScheduleFacts(("timescale",)),
    "linear": ScheduleFacts(("min_learning_rate",)),
    "cosine": ScheduleFacts(("min_learning_rate",)),
}
