"""Whether a base trains as a recipe asks, tried on a small model of its kind before a weight is read.

`resolve` asks once for each base and keeps the answer. Rows of different lengths go through the small model packed, padded
and alone, past every window, chunk and original context that the base's rows reach; then a loss goes back through it.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from finetune import version
from finetune.errors import AdapterError, BaseError, explained
from finetune.model import adapters, attention, base, losses, rotary, tiny
from finetune.model.base import loading_class, text_side
from finetune.plan.plan import Plan
from finetune.recipe.schema import Recipe
from finetune.store import cache
from finetune.training import scaling
from finetune.training.counted import text_of_code

LENGTHS = (40, 8, 24)  # of the rows; the first is beyond `tiny.EDGE`, the others are not both
TOLERANCE = 1e-3  # of the norm of all logits
ARRANGEMENTS = ("packed", "padded", "alone")  # from the fastest to the one that is right by itself
TOLD = {"packed": "packed", "padded": "padded", "alone": "trained one by one"}
OFF = "set task.packing: auto"


@dataclass(frozen=True)
class Trial:
    arrangement: str
    """How rows come together; one of `ARRANGEMENTS`."""
    notes: tuple[str, ...]
    """What its user should know."""


def arranged_like(
    recipe: Recipe, directory: Path, like: Plan | None, is_resumed: bool
) -> tuple[str | None, tuple[str, ...]]:
    """`Plan.arranged` of a recipe, and what to say: that of a run which it goes on with, or what a trial finds.

    A branch whose recipe names `packing: true` is tried, too: its parent may be padded.
    """
    if like is not None and like.recipe.task == recipe.task and (is_resumed or not _must_pack(recipe)):
        return like.arranged, ()
    found, told = trial(recipe, directory), "packed" if recipe.task.packing else "padded"
    return None if found.arrangement == told else found.arrangement, found.notes


def _must_pack(recipe: Recipe) -> bool:
    """Whether the recipe itself says so: `auto` is the state without the key."""
    return recipe.task.packing and "packing" in recipe.task.model_fields_set


def trial(recipe: Recipe, directory: Path) -> Trial:
    """How the rows of a recipe are arranged on its base: as it says, or the first way that is right where it says nothing.

    BaseError where the base cannot be trained, or not in the way that the recipe names.
    """
    scaling.refuse_without_effect(recipe, directory)
    task, config = recipe.task, json.loads((directory / "config.json").read_text())
    ours = text_of_code(adapters, attention, text_side, loading_class, losses, rotary, tiny)
    code = [Path(__file__).read_text(), *ours, *map(version, ("finetune", "torch", "transformers", "peft"))]

    def compare() -> dict[str, str | None]:
        return _compared(base.load_config(directory), task.max_length)

    def train() -> str | None:
        return _train_once(tiny.model_like(base.load_config(directory), task.max_length), recipe)

    reasons = cache.found("arrangements", [config, task.max_length, code], compare)
    # Without a small model nothing can be tried, so the recipe decides.
    if reasons["small"]:
        taken = "packed" if _must_pack(recipe) else "padded"
        return Trial(taken, (f"rows are {taken}, untried: {reasons['small']}",))
    if reasons["packed"] and _must_pack(recipe):
        raise BaseError(reasons["packed"], where="task.packing", hint=OFF)
    wanted = ARRANGEMENTS if task.packing else ARRANGEMENTS[1:]
    # There is always one: `alone` never has a reason against it.
    found = next(way for way in wanted if not reasons.get(way))
    notes = [f"rows are {TOLD[found]}: {reasons[wanted[wanted.index(found) - 1]]}"] if found != wanted[0] else []
    notes += scaling.notes(recipe, directory)
    settings = recipe.adapter and recipe.adapter.model_dump(mode="json")
    facts = [config, task.max_length, settings, recipe.train.precision, code]
    if told := cache.found("trials", facts, train):
        notes.append(told)
    return Trial(found, tuple(notes))


def _compared(config: PretrainedConfig, max_length: int) -> dict[str, str | None]:
    """Why rows that come together do not give what each gives alone, by way; and why no small model can be made. BaseError where a
    token's logits depend on what comes after it."""
    try:
        plain = tiny.model_like(config, max_length)
    except BaseError as error:
        return {"small": error.message}
    _refuse_other_way_round(plain)
    base.refuse_mixed(plain)
    return {"small": None, **{way: _mixes(way, plain, config, max_length) for way in ("packed", "padded")}}


def _rows(model: PreTrainedModel) -> list[Tensor]:
    """Rows of (1, T) tokens that all differ and lie all over the vocabulary, but not among its first ids, which are control tokens."""
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    count = min(rows, 256)
    # Knuth's multiplicative hash spreads them; the first ids are control tokens.
    tokens = 3 + torch.arange(sum(LENGTHS)) * 2_654_435_761 % (count - 3)
    return [row[None] for row in tokens.split(LENGTHS)]


def _refuse_other_way_round(model: PreTrainedModel) -> None:
    """BaseError where a token's logits depend on what comes after it."""
    row = _rows(model)[0]
    before = _logits(model, input_ids=row)
    # Only the last 8 tokens change, so a causal model computes the same logits before them.
    after = _logits(model, input_ids=torch.cat([row[:, :-8], row[:, :8]], dim=1))
    if _differs(before[:, :-8], after[:, :-8]):
        hint = "set is_decoder: true in its config.json if it has that key, or choose another base"
        raise BaseError("is not causal: its tokens see those after them", where=type(model).__name__, hint=hint)


def _mixes(way: str, plain: PreTrainedModel, config: PretrainedConfig, max_length: int) -> str | None:
    """Why rows that come together in a way do not give what each gives alone; None where they do."""
    rows = _rows(plain)
    alone = torch.cat([_logits(plain, input_ids=row) for row in rows], dim=1)
    try:
        together = _packed(config, max_length, rows) if way == "packed" else _padded(plain, rows)
    except BaseError as error:
        return error.message
    return f"{way}, this base would mix them" if _differs(alone, together) else None


def _packed(config: PretrainedConfig, max_length: int, rows: list[Tensor]) -> Tensor:
    try:
        model = tiny.model_like(config, max_length, attn_implementation=attention.PER_ROW)
    except BaseError as error:
        message = error.message.replace("cannot be made small", "its attention cannot be replaced")
        raise BaseError(message, where=config.model_type) from None
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    return _logits(
        rotary.separate(model),
        input_ids=torch.cat(rows, dim=1),
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
        row_bounds=bounds,
        cu_seq_lens=torch.tensor(bounds, dtype=torch.int32),
    )


def _padded(model: PreTrainedModel, rows: list[Tensor]) -> Tensor:
    filled = torch.zeros(len(rows), max(LENGTHS), dtype=torch.long)
    for place, row in enumerate(rows):
        filled[place, : row.shape[1]] = row[0]
    logits = _logits(model, input_ids=filled)
    return torch.cat([logits[place : place + 1, : row.shape[1]] for place, row in enumerate(rows)], dim=1)


def _logits(model: PreTrainedModel, **inputs: object) -> Tensor:
    with torch.inference_mode(), explained("transformers cannot run it", type(model).__name__):
        return model(**inputs, use_cache=False).logits


def _differs(one: Tensor, two: Tensor) -> bool:
    # `not <=`, and not `>`: NaN counts as a difference.
    return one.shape != two.shape or not (one - two).norm() <= TOLERANCE * one.norm()


def _train_once(model: PreTrainedModel, recipe: Recipe) -> str | None:
    """A loss of the first row, forward and backward, in the recipe's precision and with its adapter; what to say of that loss.
    BaseError where that fails."""
    model = base.freeze_beside_text(model)
    try:
        model = adapters.apply(model, recipe.adapter)
    except AdapterError:  # it names layers that the small model does not have
        model.requires_grad_(True)
    row = _rows(model)[0]
    places = torch.arange(len(row[0]) - 1, device=row.device)
    is_bf16 = recipe.train.precision == "bf16"
    with (
        explained("cannot be trained", type(model).__name__),
        torch.autocast(row.device.type, torch.bfloat16) if is_bf16 else nullcontext(),
    ):
        # In eval mode: with dropout, two forwards of one model differ.
        token_losses, reason = losses.fitting(model.eval())
        model.train()
        loss, _ = token_losses(model, {"input_ids": row}, places, row[0, 1:])
        # Some families have parameters that a forward of text alone does not use.
        torch.autograd.grad(loss, [each for each in model.parameters() if each.requires_grad], allow_unused=True)
    return losses.note(reason)
