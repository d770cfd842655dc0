"""Floor 0. `trainer_state.json`: the history of a run in the form that transformers' Trainer writes, for the tools that read that.

Nothing of ours reads it. `saver` writes one into every checkpoint.
"""

from collections.abc import Iterable
from math import ceil

from finetune.checkpoints.retention import Saved, best
from finetune.plan import Plan
from finetune.recipe.schema import Every

ENTRIES = 1000  # of the loss, at most about so many: it is in every checkpoint, and the journal has all
DEFAULT_CADENCE = 500  # Trainer's own, where the recipe has no cadence of steps


def trainer_state(plan: Plan, step: int, records: Iterable[dict], evaluated: dict[int, dict]) -> dict:
    """The state at a step, of the journal's records of steps and evaluations; later ones are left out."""
    by_step = {record["step"]: record for record in records if record["step"] <= step}
    per_epoch, logged = plan.order.steps_per_epoch, ceil(plan.steps / ENTRIES)
    history: list[dict] = []
    for at in sorted(by_step.keys() | {at for at in evaluated if at <= step}):
        place = {"epoch": at / per_epoch, "step": at}
        if at in by_step and (at % logged == 0 or at == step):
            history.append(place | {name: by_step[at][name] for name in ("loss", "grad_norm", "learning_rate")})
        if at in evaluated:
            figures = {name: value for name, value in evaluated[at].items() if name in ("loss", "perplexity")}
            history.append(place | {f"eval_{name}": value for name, value in figures.items()})
    best_steps = best([Saved(at, figures) for at, figures in evaluated.items() if at <= step], 1)
    best_step = best_steps.pop() if best_steps else None
    recipe = plan.recipe
    return {
        "epoch": step / per_epoch,
        "global_step": step,
        "max_steps": plan.steps,
        "num_train_epochs": ceil(plan.steps / per_epoch),
        "train_batch_size": recipe.train.batch_size,
        "logging_steps": logged,
        "eval_steps": _steps_of([recipe.evaluate.every]),
        "save_steps": _steps_of(recipe.checkpoint.every),
        "num_input_tokens_seen": sum(record["tokens"] for record in by_step.values()),
        "total_flos": 0.0,
        "best_metric": evaluated[best_step]["loss"] if best_step is not None else None,
        "best_global_step": best_step,
        "log_history": history,
    }


def _steps_of(cadences: Iterable[Every | None]) -> int:
    return next((cadence.steps for cadence in cadences if cadence and cadence.steps), DEFAULT_CADENCE)
