"""`trainer_state.json`: the history of a run in the form that transformers' Trainer writes, for tools that read it.

A resumed run reads the facts about its first steps from it. A second file of our own would repeat the same figures in every checkpoint,
and older checkpoints have only this one.
"""

from collections.abc import Iterable
from math import ceil
from typing import TypedDict

from finetune.plan.cadence import history_every
from finetune.plan.facts import Metrics
from finetune.plan.plan import Plan
from finetune.plan.retention import Saved, best
from finetune.recipe.schema import Every
from finetune.store.run.records import StepRecord

HISTORY = "trainer_state.json"
DEFAULT_CADENCE = 500  # Trainer's own, where the recipe has no cadence of steps


Entry = dict[str, float]
"""The history's entry of a step: `epoch`, `step` and its figures; held-out ones are called `eval_…`."""


class History(TypedDict):
    """The content of `trainer_state.json`."""

    epoch: float
    global_step: int
    max_steps: int
    num_train_epochs: int
    train_batch_size: int
    logging_steps: int
    eval_steps: int
    save_steps: int
    num_input_tokens_seen: int
    total_flos: float
    best_metric: float | None
    best_global_step: int | None
    log_history: list[Entry]


def loss_entry(plan: Plan, record: StepRecord) -> Entry:
    """The entry of a journal's record of a step."""
    figures = {"loss": record["loss"], "grad_norm": record["grad_norm"], "learning_rate": record["learning_rate"]}
    return {"epoch": plan.order.epochs_after(record["step"]), "step": record["step"], **figures}


def trainer_state(
    plan: Plan, step: int, losses: Iterable[Entry], evaluated: dict[int, Metrics], tokens: int
) -> History:
    """The state at a step, from the entries of losses, the held-out figures by step, and the tokens of all steps so far."""
    order, entries = plan.order, [*losses]
    for at, metrics in evaluated.items():
        figures = {f"eval_{name}": value for name, value in metrics.items()}
        entries.append({"epoch": order.epochs_after(at), "step": at, **figures})
    by = plan.recipe.checkpoint.keep.chosen_by
    best_steps = best([Saved(at, figures, by=by) for at, figures in evaluated.items() if at <= step], 1)
    best_step = best_steps.pop() if best_steps else None
    recipe = plan.recipe
    return {
        "epoch": order.epochs_after(step),
        "global_step": step,
        "max_steps": plan.steps,
        "num_train_epochs": ceil(order.epochs_after(plan.steps)),
        "train_batch_size": recipe.train.batch_size,
        "logging_steps": history_every(plan),
        "eval_steps": _steps_of([recipe.evaluate.every]),
        "save_steps": _steps_of(recipe.checkpoint.every),
        "num_input_tokens_seen": tokens,
        "total_flos": 0.0,
        "best_metric": evaluated[best_step][by.metric] if best_step is not None else None,
        "best_global_step": best_step,
        # sorted is stable: of one step the loss comes first
        "log_history": sorted((entry for entry in entries if entry["step"] <= step), key=lambda entry: entry["step"]),
    }


def losses_of(state: History) -> list[Entry]:
    """The entries of losses."""
    return [entry for entry in state["log_history"] if "loss" in entry]


def evaluations_of(state: History) -> dict[int, Metrics]:
    """The held-out figures, by their steps."""
    return {
        int(entry["step"]): {name[5:]: value for name, value in entry.items() if name.startswith("eval_")}
        for entry in state["log_history"]
        if "eval_loss" in entry
    }


def without_evaluations(state: History) -> History:
    """A state without held-out figures."""
    kept = [entry for entry in state["log_history"] if "eval_loss" not in entry]
    return state | {"log_history": kept, "best_metric": None, "best_global_step": None}


def _steps_of(cadences: Iterable[Every | None]) -> int:
    return next((cadence.steps for cadence in cadences if cadence and cadence.steps), DEFAULT_CADENCE)
