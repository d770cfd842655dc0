"""Rotary frequencies by the length of each row, for the scalings whose frequencies depend on it: `dynamic` and `longrope`.

transformers takes the longest position of a batch, and `dynamic` also remembers that of earlier batches. Here a row has the
frequencies that it has alone in a fresh model, whatever it is packed with and whatever came before: else a resume would differ.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

BY_LENGTH = ("dynamic", "longrope")


def entries(config: PretrainedConfig) -> dict[str | None, dict[str, Any]]:
    """The rotary settings by type of layer, or under None those of all layers; empty for a model without rotary positions."""
    found: dict[str, Any] = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested: dict[str | None, dict[str, Any]] = {key: value for key, value in found.items() if isinstance(value, dict)}
    return nested or ({None: found} if found else {})


def is_by_length(config: PretrainedConfig) -> bool:
    """Whether the frequencies of a row depend on its length."""
    return any(entry.get("rope_type") in BY_LENGTH for entry in entries(config).values())


def separate(model: PreTrainedModel) -> PreTrainedModel:
    """The model, whose rows from now on have their own frequencies where `row_bounds` comes with the inputs.

    Without bounds a sequence is one row, so rows of several lengths must not be padded to one.
    """
    for name, module in list(model.named_modules()):
        kinds = getattr(module, "rope_type", None)
        found = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(kind in BY_LENGTH for kind in found):
            _Rows(module).listen(model.get_submodule(name.rpartition(".")[0]))
    return model


class _Rows:
    """A rotary module in place of its own forward, and the bounds of the rows of the present batch."""

    def __init__(self, module: torch.nn.Module):
        self._module = module
        self._whole: Callable[..., Any] = module.forward
        self._bounds: list[int] | None = None
        module.forward = self._forward

    def listen(self, parent: torch.nn.Module) -> None:
        """Takes the bounds from what the module above is called with: a rotary module is given positions alone."""

        def take(_: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._bounds = named.get("row_bounds")

        parent.register_forward_pre_hook(take, with_kwargs=True)

    def _forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        kind = self._module.rope_type if layer_type is None else self._module.rope_type[layer_type]  # type: ignore[index]
        parts = []
        for start, end in self._groups(str(kind), layer_type, position_ids):
            self._forget(str(kind), layer_type)
            of_type = () if layer_type is None else (layer_type,)
            parts.append(self._whole(x, position_ids[..., start:end], *of_type))
        if len(parts) == 1:
            return parts[0]
        if isinstance(parts[0], Tensor):
            return torch.cat(parts, dim=1)
        return tuple(torch.cat(column, dim=1) for column in zip(*parts, strict=True))

    def _groups(self, kind: str, layer_type: str | None, position_ids: Tensor) -> Iterator[tuple[int, int]]:
        """The places of neighbouring rows that share frequencies: of one length, or all on one side of the original context."""
        bounds = self._bounds
        if kind not in BY_LENGTH or bounds is None or bounds[-1] != position_ids.shape[-1]:
            yield 0, position_ids.shape[-1]
            return
        original = self._original(kind, layer_type)
        rows = zip(bounds[:-1], bounds[1:], strict=True)

        def shared(row: tuple[int, int]) -> int:
            length = row[1] - row[0]
            return 0 if length <= original else 1 if kind == "longrope" else length

        for _, same in groupby(rows, key=shared):
            first, *others = same
            yield first[0], (others or [first])[-1][1]

    def _original(self, kind: str, layer_type: str | None) -> int:
        """The longest row with the frequencies of the pretraining."""
        if kind == "dynamic":
            return int(self._module.original_max_seq_len)  # type: ignore[arg-type]
        settings = self._module.config.rope_parameters  # type: ignore[union-attr]
        entry: Any = settings if layer_type is None else settings[layer_type]  # type: ignore[index]
        return int(entry["original_max_position_embeddings"])

    def _forget(self, kind: str, layer_type: str | None) -> None:
        """Makes `dynamic` as it was before any batch."""
        if kind != "dynamic":
            return
        prefix = "" if layer_type is None else f"{layer_type}_"
        setattr(self._module, f"{prefix}inv_freq", getattr(self._module, f"{prefix}original_inv_freq"))
        setattr(self._module, f"{prefix}max_seq_len_cached", self._module.original_max_seq_len)
