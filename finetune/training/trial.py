"""Whether a base trains as a recipe asks, tried on a small model of its kind before a weight is read.

`resolve` asks once for each base and keeps the answer. Rows of different lengths go through the small model packed, padded
and alone, past every window, chunk and original context that the base's rows reach; then a loss goes back through it.
"""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from finetune import version
from finetune.errors import AdapterError, BaseError, explained
from finetune.model import adapters, attention, base, losses, packing, rotary, row_by_row, tiny
from finetune.model.base import loading_class, text_side
from finetune.model.packing import OURS, Packing
from finetune.plan.plan import Plan
from finetune.recipe.schema import Recipe
from finetune.store import cache
from finetune.training import arrangements, scaling
from finetune.training.counted import text_of_code

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


def packing_of(directory: Path, max_length: int) -> Packing:
    """How rows are packed on a base. What was not found to be exact is packed by our attention alone: `check_packing` decides there."""
    attention, by_row = _reasons(directory, max_length)["packing"] or OURS
    return Packing(attention, tuple(by_row))


def unpacked(directory: Path, max_length: int) -> str:
    """How rows come together exactly on a base without packing: `padded` if the trial found it right, else `alone`."""
    reasons = _reasons(directory, max_length)
    return "alone" if reasons["small"] or reasons["padded"] else "padded"


def _reasons(directory: Path, max_length: int) -> arrangements.Compared:
    def compare() -> arrangements.Compared:
        return arrangements.compared(base.load_config(directory), max_length)

    return cache.found("arrangements", _facts(directory, max_length), compare)


def _facts(directory: Path, max_length: int) -> list[object]:
    """What a trial depends on: also our code, so that a fix in it leaves no older results in the cache."""
    ours = text_of_code(
        *(adapters, arrangements, attention, text_side, loading_class, losses, packing, row_by_row, rotary, tiny)
    )
    code = [Path(__file__).read_text(), *ours, *map(version, ("finetune", "torch", "transformers", "peft"))]
    return [json.loads((directory / "config.json").read_text()), max_length, code]


def trial(recipe: Recipe, directory: Path) -> Trial:
    """How the rows of a recipe are arranged on its base: as it says, or the first way that is right where it says nothing.

    BaseError where the base cannot be trained, or not in the way that the recipe names.
    """
    scaling.refuse_without_effect(recipe, directory)
    task, reasons = recipe.task, _reasons(directory, recipe.task.max_length)

    def train() -> str | None:
        return _train_once(tiny.model_like(base.load_config(directory), task.max_length), recipe)

    # Without a small model nothing can be tried, so the recipe decides.
    if reasons["small"]:
        taken = "packed" if _must_pack(recipe) else "padded"
        return Trial(taken, (f"rows are {taken}, untried: {reasons['small']}",))
    if reasons["packed"] and _must_pack(recipe):
        raise BaseError(reasons["packed"], where="task.packing", hint=OFF)
    wanted = ARRANGEMENTS if task.packing else ARRANGEMENTS[1:]
    against = {"packed": reasons["packed"], "padded": reasons["padded"], "alone": None}
    found = next(way for way in wanted if not against[way])
    notes = [f"rows are {TOLD[found]}: {against[wanted[wanted.index(found) - 1]]}"] if found != wanted[0] else []
    notes += scaling.notes(recipe, directory)
    settings = recipe.adapter and recipe.adapter.model_dump(mode="json")
    facts = [*_facts(directory, task.max_length), settings, recipe.train.precision]
    if told := cache.found("trials", facts, train):
        notes.append(told)
    return Trial(found, tuple(notes))


def _train_once(model: PreTrainedModel, recipe: Recipe) -> str | None:
    """A loss of the first row, forward and backward, in the recipe's precision and with its adapter; what to say of that loss.
    BaseError where that fails."""
    model = base.freeze_beside_text(model)
    try:
        model = adapters.apply(model, recipe.adapter)
    except AdapterError:  # it names layers that the small model does not have
        model.requires_grad_(True)
    row = arrangements.rows_for(model)[0]
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
