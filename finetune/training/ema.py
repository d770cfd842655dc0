"""An exponential moving average of the trained weights (Polyak & Juditsky 1992), in fp32 beside them. It must not change the training."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from finetune.model import shards
from finetune.plan.facts import Metrics
from finetune.recipe.schema import Ema as Settings
from finetune.store.evaluations import Evaluation

COUNTS = ("rows", "tokens")  # figures that are about the rows alone


class Average:
    """It begins with the weights of the first step, and is the same on every rank."""

    def __init__(self, settings: Settings, live: Mapping[str, torch.Tensor]):
        """`live` are the trained weights by the names that a checkpoint gives them: updates write to them in place."""
        self.settings = settings
        self._live = live
        self.tensors = {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in live.items()}

    def update(self, step: int) -> None:
        """Takes in the weights after a step."""
        if step % self.settings.every == 0:
            for name, average in self.tensors.items():
                average.lerp_(self._live[name].detach().float(), 1.0 - self.settings.decay)

    def restore(self, stored: Mapping[str, torch.Tensor] | None) -> None:
        """To what a checkpoint holds, or to the weights as they are: a branch may begin an average."""
        for name, average in self.tensors.items():
            if stored is None:
                average.copy_(self._live[name].detach())
            else:
                shards.local(average).copy_(stored[name])

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The model has the average as its weights meanwhile. Await the snapshot first."""
        kept = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        self._write(self.tensors)
        try:
            yield
        finally:
            self._write(kept)

    def figures(self, evaluate: Callable[[], Evaluation | None]) -> Metrics | None:
        """Its held-out figures as `ema_loss` and so on; None if a signal stopped the evaluation. Await the snapshot first."""
        with self.in_place_of_weights():
            found = evaluate()
        if found is None:
            return None
        return {f"ema_{name}": value for name, value in found.about["metrics"].items() if name not in COUNTS}

    def _write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._live.items():
                tensor.copy_(tensors[name])
