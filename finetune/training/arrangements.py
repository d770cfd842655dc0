"""Whether rows that come together give what each gives alone, on a small model of a base's kind, and how they are packed.

Rows of different lengths reach past every window, chunk and original context that the base's own rows reach.
"""

from collections.abc import Callable
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from finetune.errors import BaseError, explained
from finetune.model import attention, base, rotary, tiny
from finetune.model.packing import Packing, without_leaks

LENGTHS = (40, 8, 8, 24)  # of the rows; the first is beyond `tiny.EDGE`, and two of one length are side by side
TOLERANCE = 1e-3  # of the norm of all logits


class Compared(TypedDict):
    """As JSON."""

    small: str | None
    """Why no small model can be made."""
    packed: str | None
    """Why packed rows do not give what each gives alone."""
    padded: str | None
    packing: Packing | None
    """How they do."""


def compared(config: PretrainedConfig, max_length: int) -> Compared:
    """What is known of a base's kind. BaseError where a token's logits depend on what comes after it."""
    try:
        plain = tiny.model_like(config, max_length)
    except BaseError as error:
        return {"small": error.message, "packed": None, "padded": None, "packing": None}
    _refuse_other_way_round(plain)
    base.refuse_mixed(plain)
    rows = rows_for(plain)
    alone = torch.cat([_logits(plain, input_ids=row) for row in rows], dim=1)
    reason, packing = _packed(config, max_length, rows, alone)
    return {"small": None, "packed": reason, "padded": _padded(plain, rows, alone), "packing": packing}


def _packed(
    config: PretrainedConfig, max_length: int, rows: list[Tensor], alone: Tensor
) -> tuple[str | None, Packing | None]:
    """The first reason against packing, or the first way that is exact: our attention as fast as it is, or modules by row."""
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    inputs = {
        "input_ids": torch.cat(rows, dim=1),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "row_bounds": bounds,
        "cu_seq_lens": torch.tensor(bounds, dtype=torch.int32),
    }
    reasons = []
    for own in (attention.PER_ROW, None):
        try:
            found = _exact(Packing(own), lambda own=own: _made(config, max_length, own), inputs, alone)  # type: ignore[misc]
        except BaseError as error:
            reasons.append(error.message)
            continue
        if found:
            return None, found
        reasons.append("packed, this base would mix them")
    return reasons[0], None


def _exact(
    packing: Packing, make: Callable[[], PreTrainedModel], inputs: dict[str, Any], alone: Tensor
) -> Packing | None:
    """That way of packing, or with modules that run by row, whichever gives what each row gives alone."""
    if packing.attention and not differs(alone, _logits(make(), **inputs)):
        return packing
    try:
        with explained("transformers cannot run it", "a module by row"):
            found = without_leaks(make, packing, inputs)
        if found is None:
            return None
        model = _unused(make())
        found.apply(model)
        return None if differs(alone, _logits(model, **inputs)) else found
    except BaseError:  # it cannot run by row: what speaks against packing is known without that
        return None


def _unused(model: PreTrainedModel) -> PreTrainedModel:
    """The same model before its first run, as a base is: BigBird replaces its attention in a run, and what runs by row with it."""
    unused = type(model)(model.config).eval()
    unused.load_state_dict(model.state_dict())
    return rotary.separate(unused)


def _made(config: PretrainedConfig, max_length: int, replaced: str | None) -> PreTrainedModel:
    if replaced is None:
        return rotary.separate(tiny.model_like(config, max_length))
    try:
        return rotary.separate(tiny.model_like(config, max_length, attn_implementation=replaced))
    except BaseError as error:
        message = error.message.replace("cannot be made small", "its attention cannot be replaced")
        raise BaseError(message, where=config.model_type) from None


def _padded(model: PreTrainedModel, rows: list[Tensor], alone: Tensor) -> str | None:
    """Why padded rows do not give what each gives alone; None where they do."""
    filled = torch.zeros(len(rows), max(LENGTHS), dtype=torch.long)
    for place, row in enumerate(rows):
        filled[place, : row.shape[1]] = row[0]
    try:
        logits = _logits(model, input_ids=filled)
    except BaseError as error:
        return error.message
    together = torch.cat([logits[place : place + 1, : row.shape[1]] for place, row in enumerate(rows)], dim=1)
    return "padded, this base would mix them" if differs(alone, together) else None


def rows_for(model: PreTrainedModel) -> list[Tensor]:
    """Rows of (1, T) tokens that all differ and lie all over the vocabulary, but not among its first ids, which are control tokens."""
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    count = min(rows, 256)
    # Knuth's multiplicative hash spreads them; the first ids are control tokens.
    tokens = 3 + torch.arange(sum(LENGTHS)) * 2_654_435_761 % (count - 3)
    return [row[None] for row in tokens.split(LENGTHS)]


def _refuse_other_way_round(model: PreTrainedModel) -> None:
    """BaseError where a token's logits depend on what comes after it."""
    row = rows_for(model)[0]
    before = _logits(model, input_ids=row)
    # Only the last 8 tokens change, so a causal model computes the same logits before them.
    after = _logits(model, input_ids=torch.cat([row[:, :-8], row[:, :8]], dim=1))
    if differs(before[:, :-8], after[:, :-8]):
        hint = "set is_decoder: true in its config.json if it has that key, or choose another base"
        raise BaseError("is not causal: its tokens see those after them", where=type(model).__name__, hint=hint)


def _logits(model: PreTrainedModel, **inputs: object) -> Tensor:
    with torch.inference_mode(), explained("transformers cannot run it", type(model).__name__):
        return model(**inputs, use_cache=False).logits


def differs(one: Tensor, two: Tensor) -> bool:
    # `not <=`, and not `>`: NaN counts as a difference.
    return one.shape != two.shape or not (one - two).norm() <= TOLERANCE * one.norm()
