"""What changes while training: model, optimizer and the number of the last finished step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers import PreTrainedModel

from finetune.data.batches import Batch
from finetune.model import decoder_layers
from finetune.model.losses import TokenLosses
from finetune.model.routing import Routers, Work
from finetune.training.ema import Average
from finetune.training.saving.buffers import Copy
from finetune.training.slot_sums import SlotSums

Found = TypeVar("Found")
Loss = Callable[[PreTrainedModel, Batch, TokenLosses], tuple[torch.Tensor, torch.Tensor]]


class Objective(torch.nn.Module):
    """The model with its loss inside, so that the forward that DDP or FSDP wraps is the one that is differentiated."""

    def __init__(self, model: PreTrainedModel, loss: Loss, token_losses: TokenLosses, routers: Routers | None = None):
        super().__init__()
        self.model = model
        self.routers = routers
        self._loss = loss
        self.token_losses = token_losses

    def inside(self, find: Callable[[], Found]) -> Found:
        """The result of `find`, which runs in a forward without gradients: there a layer of the model is whole on every rank that enters it."""
        loss, found = self._loss, list[Found]()

        def run(model: PreTrainedModel, batch: Batch, token_losses: TokenLosses) -> tuple[torch.Tensor, torch.Tensor]:
            found.append(find())
            return torch.zeros(()), torch.zeros(())

        self._loss = run
        try:
            with torch.no_grad():
                self({})
        finally:
            self._loss = loss
        return found[0]

    def forward(self, batch: Batch, work: Work | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A collated micro-batch -> summed loss (nats) and the sum of each row. With `work` its routers count, and the loss has their
        balance; the rows have not."""
        if self.routers is None or work is None:
            return self._loss(self.model, batch, self.token_losses)
        with self.routers.watching():
            loss_sum, rows = self._loss(self.model, batch, self.token_losses)
        balance = self.routers.added(work)
        return (loss_sum if balance is None else loss_sum + balance), rows


@dataclass(frozen=True)
class Strategy:
    """How the devices of a training share its work. `strategy/` has the members."""

    name: str
    prepare: Callable[
        [Accelerator, torch.nn.Module, Callable[[], torch.optim.Optimizer]],
        tuple[torch.nn.Module, AcceleratedOptimizer],
    ]
    """Objective and optimizer, wrapped for all ranks. The optimizer is made after the objective, whose parameters may become others."""
    gradient_norms: Callable[["TrainState"], torch.Tensor]
    """2-norm of the gradient of each of the state's modules over all ranks, fp64 on its device."""
    clip: Callable[["TrainState", float], None]
    """Divides the gradients by a number, now or in the optimizer's step."""
    saved_tensors: Callable[["TrainState"], dict[str, torch.Tensor]]
    """The weights that this rank saves, by name."""
    is_sharded: bool = False
    """Whether each rank holds, and saves, its rows of every tensor, and ranks sum their gradients; else they average them."""


@dataclass
class TrainState:
    accelerator: Accelerator
    objective: torch.nn.Module
    """The prepared (wrapped) objective; the only thing `loop` calls."""
    model: PreTrainedModel
    """The bare model inside it; the only thing snapshots read."""
    optimizer: AcceleratedOptimizer
    strategy: Strategy
    step: int = 0
    copy: Copy | None = None
    """A snapshot under way; whatever writes weights awaits it first."""
    is_begun: bool = False
    """Whether a step was trained in this process."""
    routers: Routers | None = None
    """Of a base with experts."""
    average: Average | None = None
    """The moving average of the trained weights, if the recipe asks for one."""
    slot_sums: SlotSums | None = None
    """Of several ranks whose sums must not depend on their number."""
    notes: tuple[str, ...] = ()
    """What its user should know of how it trains."""

    def __post_init__(self) -> None:
        # By layer and not by tensor: a spike shows in which layer it began, and a large model has thousands of tensors.
        names = [decoder_layers.module_of(name) for name in self.trainable]
        self.modules = list(dict.fromkeys(names))
        """Groups of modules whose gradients are measured, in the order of the model."""
        self.module_places = [self.modules.index(name) for name in names]
        """Of each trainable parameter its group."""
        self._places: tuple[tuple[int, ...], torch.Tensor] = ((), torch.empty(0))

    def places_on_device(self, places: tuple[int, ...]) -> torch.Tensor:
        """The same numbers as int64 where the gradients are; kept, for they are the same at every step."""
        # They change only if other parameters have gradients.
        if self._places[0] != places:
            made, device = torch.tensor(places), self.accelerator.device
            self._places = (
                places,
                # Pinned and without waiting: a plain copy would make the host wait for the device.
                made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device),
            )
        return self._places[1]

    def await_snapshot(self) -> float:
        """Returns when no copy needs the tensors as they are; the seconds it took."""
        if self.copy is None:
            return 0.0
        copy, self.copy = self.copy, None
        copy.awaited_seconds = copy.wait()
        return copy.awaited_seconds

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Trainable parameters by name, tied ones once."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
