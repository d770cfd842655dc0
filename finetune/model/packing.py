"""How a family packs rows exactly, found on a small model of it: our attention, and modules that run row by row.

Nothing here knows a family: one row is changed, and the first module that shows it in a later row runs by row from then on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finetune.model import attention
from finetune.model.row_by_row import is_of_tokens, run_by_row, tensors_of

MOST = 8  # classes of a family; there are four at most
Call = tuple[torch.nn.Module, list[Tensor], list[Tensor]]
"""Of a module: what it got for the later rows, and what it gave for them."""


class Packing(NamedTuple):
    attention: str | None = attention.PER_ROW
    """What replaces a model's attention. None: it keeps its own, which runs by row."""
    by_row: tuple[str, ...] = ()
    """Classes of modules that run by row."""

    def apply(self, model: PreTrainedModel, is_whole: bool = False) -> None:
        """`is_whole`: see `run_by_row`."""
        if self.by_row or not self.attention:
            run_by_row(model, self.by_row, not self.attention, is_whole)


OURS = Packing()


def without_leaks(make: Callable[[], PreTrainedModel], packing: Packing, inputs: dict[str, Any]) -> Packing | None:
    """With the modules that must run by row as well, if that keeps rows from seeing those before; None if it does not.

    `make` makes a small model each time, and `inputs` are rows packed for it.
    """
    for _ in range(MOST):
        model = make()
        packing.apply(model, is_whole=True)
        leaking = _first_leak(model, inputs)
        if leaking is None:
            return packing
        # A whole model is no module that could run by row, and one that leaks as it does mixes rows in another way.
        if isinstance(leaking, PreTrainedModel) or type(leaking).__name__ in packing.by_row:
            return None
        packing = packing._replace(by_row=(*packing.by_row, type(leaking).__name__))
    return None


def _first_leak(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.nn.Module | None:
    """The first module through which later rows see the first one: it gets the same for them, and gives something else."""
    tokens, end = inputs["input_ids"], inputs["row_bounds"][1]
    changed = torch.cat([tokens[:, :end].flip(1), tokens[:, end:]], dim=1)
    calls, others = (_calls(model, inputs | {"input_ids": each}, end) for each in (tokens, changed))
    for (module, before, after), (_, other_before, other_after) in zip(calls, others, strict=True):
        if _are_same(before, other_before) and not _are_same(after, other_after):
            return module
    return None


def _calls(model: PreTrainedModel, inputs: dict[str, Any], start: int) -> list[Call]:
    """Every call of a module on the sequence, in the order in which they end."""
    calls: list[Call] = []
    count = inputs["input_ids"].shape[1]

    def later(value: Any) -> list[Tensor]:
        value = value.to_tuple() if hasattr(value, "to_tuple") else value
        return [tensor[:, start:].clone() for tensor in tensors_of(value) if is_of_tokens(tensor, count)]

    def note(module: torch.nn.Module, arguments: Any, named: dict[str, Any], output: Any) -> None:
        before, after = later((arguments, named)), _floats(later(output))
        # Places beside hidden states may be arbitrary where a mask hides them; token ids are all that an embedding gets.
        before = _floats(before) or before
        if before and after:
            calls.append((module, before, after))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    try:
        with torch.inference_mode():
            model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _floats(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _are_same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.allclose(left, right, rtol=1e-5, atol=1e-6) for left, right in zip(one, two, strict=True))
