"""Modules that mix the tokens of a sequence, run on each row of a packed one: scans, short convolutions, attention with its own mask.

Such a module sees each row as if it came alone, so nothing passes from row to row, whatever it computes.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from finetune.errors import BaseError
from finetune.model.losses import decoder_of, unwrapped

OFF = "set task.packing: false"
BOUNDS = ("row_bounds", "cu_seq_lens")
"""What says where rows are. A module that gets one row is not given it."""
MARK = "finetune_by_row"
"""An attribute of a module that does."""


class Run(NamedTuple):
    """Neighboring rows of one length, which are one call."""

    length: int
    rows: int


class Apart(NamedTuple):
    """What a module gives for each run and what cannot be one tensor, like the places that a row's tokens look at: as many as it has.

    A module that runs by row, too, takes it.
    """

    parts: list[Any]
    runs: list[Run]


class Sequences:
    """The packed sequence that a model works on, or worked on last: activation checkpoints run modules again after it."""

    def __init__(self, has_mask: bool, is_whole: bool):
        self.has_mask, self.is_whole = has_mask, is_whole
        self.runs: list[Run] = []
        self.tokens = self.longest = 0
        self._depth = 0
        self._masked = ""

    def enter(self, part: PreTrainedModel, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, Any]:
        """Before a forward: what it is given. A forward within another one changes nothing."""
        bounds = inputs.get("row_bounds")
        if self._depth == 0:
            self._begin(bounds or [0], part.config._attn_implementation)
        self._depth += 1
        taken = inspect.signature(part.forward).parameters
        if self.has_mask and bounds is not None:
            inputs = {name: value for name, value in inputs.items() if name not in BOUNDS}
            if "attention_mask" in taken:  # with one, transformers does not look for rows in the positions
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if bounds is not None and not any(each.kind is each.VAR_KEYWORD for each in taken.values()):
            inputs = {name: value for name, value in inputs.items() if name in taken}
        return arguments, inputs

    def _begin(self, bounds: Sequence[int], implementation: str) -> None:
        lengths = [end - start for start, end in pairwise(bounds)]
        self.runs = [Run(length, len(list(rows))) for length, rows in groupby(lengths)]
        self.tokens, self.longest = bounds[-1], max(lengths, default=0)
        if self.has_mask and not self.is_whole and lengths and implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            self._masked = implementation
            mask = partial(_short_mask, ALL_MASK_ATTENTION_FUNCTIONS[implementation], self.longest)
            ALL_MASK_ATTENTION_FUNCTIONS[implementation] = mask

    def leave(self) -> None:
        """After a forward, even one that failed."""
        self._depth -= 1
        if self._depth == 0 and self._masked:
            del ALL_MASK_ATTENTION_FUNCTIONS[self._masked]  # only what `_begin` put over it
            self._masked = ""


def _short_mask(
    make: Callable[..., Any], longest: int, *, q_length: int, kv_length: int, attention_mask: Any = None, **others: Any
) -> Any:
    """The mask of the longest row, and not of the whole sequence, which would take the square of its memory."""
    seen = None if attention_mask is None else attention_mask[:, :longest]
    lengths = {"q_length": min(q_length, longest), "kv_length": min(kv_length, longest)}
    return make(**lengths, attention_mask=seen, **others)


def run_by_row(model: PreTrainedModel, classes: Collection[str], has_mask: bool, is_whole: bool = False) -> None:
    """From now on modules of these classes run row by row if the model gets `row_bounds`.

    With `has_mask` the model makes masks and biases as for one row, and each row gets the beginning of them: as long as the longest
    one, or as the sequence if `is_whole`, which other modules can be run with.
    """
    sequences = Sequences(has_mask, is_whole)
    for module in model.modules():
        if type(module).__name__ in classes:
            module.forward = _by_row(module.forward, sequences)
            setattr(module, MARK, True)
    # Both, because the chunked loss calls the decoder alone.
    for part in dict.fromkeys([unwrapped(model), decoder_of(model)]):
        part.register_forward_pre_hook(sequences.enter, with_kwargs=True)
        part.register_forward_hook(lambda *_: sequences.leave(), always_call=True)


def _by_row(forward: Callable[..., Any], sequences: Sequences) -> Callable[..., Any]:
    def by_row(*arguments: Any, **named: Any) -> Any:
        given = (arguments, {name: value for name, value in named.items() if name not in BOUNDS})
        tensors = list(tensors_of(given))
        tokens, runs = sequences.tokens, sequences.runs
        # Within a module that runs by row, the sequence is a row.
        if sum(run.rows for run in runs) < 2 or not any(is_of_tokens(tensor, tokens) for tensor in tensors):
            return forward(*arguments, **named)
        # Nothing says how a bias of (heads, 1, T) would look for several rows.
        if any(_is_of_places(tensor, sequences) and tensor.shape[0] != 1 for tensor in tensors):
            runs = [Run(run.length, 1) for run in runs for _ in range(run.rows)]
        parts = {id(tensor): _parts(tensor, runs, sequences) for tensor in tensors}
        outputs = []
        for place in range(len(runs)):
            own, own_named = _each(given, partial(_part, place=place, runs=runs, parts=parts))
            outputs.append(forward(*own, **own_named))
        return _joined(outputs, runs)

    return by_row


def _part(value: Tensor | Apart, place: int, runs: list[Run], parts: dict[int, list[Tensor]]) -> Any:
    if isinstance(value, Tensor):
        return parts[id(value)][place]
    if value.runs != runs:
        raise BaseError("two of its modules take rows in different groups", where="task.packing", hint=OFF)
    return value.parts[place]


def is_of_tokens(tensor: Tensor, tokens: int) -> bool:
    """Whether it has something for each token of a sequence: (1, T, ...)."""
    return tensor.dim() > 1 and tensor.shape[0] == 1 and tensor.shape[1] == tokens


def _is_of_places(tensor: Tensor, sequences: Sequences) -> bool:
    """Whether it is about places in a row, like a mask (1, 1, T, T) or a bias (heads, 1, T)."""
    if tensor.dim() < 3 or is_of_tokens(tensor, sequences.tokens):
        return False
    is_mask = tensor.dim() == 4 and tensor.shape[2:] == (sequences.longest, sequences.longest)
    return is_mask or sequences.tokens in tensor.shape[2:]


def _parts(tensor: Tensor, runs: list[Run], sequences: Sequences) -> list[Tensor]:
    """What each run gets of a tensor."""
    if is_of_tokens(tensor, sequences.tokens):
        # split, not slices: the gradient of a slice is a zero tensor of the whole length
        parts = tensor[0].split([run.length * run.rows for run in runs])
        return [part.unflatten(0, (run.rows, run.length)) for part, run in zip(parts, runs, strict=True)]
    if not _is_of_places(tensor, sequences):
        return [tensor] * len(runs)
    sizes = {sequences.tokens} | ({sequences.longest} if tensor.shape[-1] == tensor.shape[-2] else set())
    axes = [axis for axis in range(2, tensor.dim()) if tensor.shape[axis] in sizes]
    return [_beginning(tensor, axes, run) for run in runs]


def _beginning(tensor: Tensor, axes: list[int], run: Run) -> Tensor:
    for axis in axes:
        tensor = tensor.narrow(axis, 0, run.length)
    # as a model makes it for several rows: some put it beside what is of each row
    return tensor if run.rows == 1 else tensor.expand(run.rows, *tensor.shape[1:])


def _joined(outputs: list[Any], runs: list[Run]) -> Any:
    """The outputs of all runs as the output for one sequence."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_joined(list(parts), runs) for parts in zip(*outputs, strict=True))
    if not isinstance(first, Tensor):
        return first
    pairs = list(zip(outputs, runs, strict=True))
    if all(output.shape == (run.rows, run.length, *first.shape[2:]) for output, run in pairs):
        return torch.cat([output.flatten(0, 1) for output in outputs])[None]
    if all(output.shape == (run.rows * run.length, *first.shape[1:]) for output, run in pairs):
        return torch.cat(outputs)
    return Apart(outputs, runs)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict) and not isinstance(value, Apart):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """Applies `change` to these tensors, and to what is apart."""
    if isinstance(value, Tensor | Apart):
        return change(value)
    if type(value) is dict:
        return {name: _each(item, change) for name, item in value.items()}
    return type(value)(_each(item, change) for item in value) if type(value) in (tuple, list) else value
