"""Micro-batches by the plan, and held-out figures from them. An evaluation leaves no trace in training."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator

from finetune.data import pack
from finetune.data.batches import Batch, Batches, Examples
from finetune.data.example import Example
from finetune.data.row_set import RowSet
from finetune.store import evaluated as digests
from finetune.store.evaluations import SCHEMA, About, Evaluation
from finetune.store.run.journal import now
from finetune.tasks import TASKS, causal
from finetune.tasks.task import RowResults
from finetune.training.loop import Wishes, agree
from finetune.training.resolve import Resolved

# Examples arranged together: enough to fill micro-batches well, few enough that a signal is heard soon.
EVALUATED_AT_ONCE = 64


def batches(resolved: Resolved, examples: Examples, accelerator: Accelerator) -> Batches:
    """The micro-batches of this rank, arranged and collated as the plan says."""
    plan = resolved.plan
    task = TASKS[plan.recipe.task.name]
    collate = task.collate_packed if plan.arrangement == "packed" else task.collate_padded
    is_older = plan.arrangement == "padded" and not plan.pads_least
    return Batches(
        examples,
        arrange=pack.ARRANGEMENTS["filled" if is_older else plan.arrangement],
        collate=partial(_of_fixed_length, collate) if plan.recipe.train.has_fixed_lengths else collate,
        budget=resolved.micro_batch_tokens,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def _of_fixed_length(collate: Callable[[Sequence[Example]], Batch], examples: Sequence[Example]) -> Batch:
    return causal.filled(collate(examples), pack.fixed_length(sum(len(example.tokens) for example in examples)))


def evaluate(
    resolved: Resolved,
    accelerator: Accelerator,
    objective: torch.nn.Module,
    wishes: Callable[[], Wishes] = Wishes,
    tell: Callable[[int], None] | None = None,
) -> dict[str, float] | None:
    """Held-out figures of a prepared objective: the results of its rows, reduced by the task. None if a signal stopped it."""
    results = row_results(accelerator, objective, batches(resolved, resolved.holdout, accelerator), wishes, tell=tell)
    return TASKS[resolved.plan.recipe.task.name].score(results) if results else None


def evaluated(
    resolved: Resolved,
    accelerator: Accelerator,
    objective: torch.nn.Module,
    rows: RowSet,
    wishes: Callable[[], Wishes] = Wishes,
    *,
    tell: Callable[[int], None] | None = None,
) -> Evaluation | None:
    """The record of an evaluation, without what stands for the model. None if a signal stopped it."""
    began = time.monotonic()
    results = row_results(accelerator, objective, batches(resolved, rows.examples, accelerator), wishes, tell=tell)
    if results is None:
        return None
    plan = resolved.plan
    about: About = {
        "schema": SCHEMA,
        "ref": "",
        "model": "",
        "data": digests.rows(plan, rows.contents),
        "set": rows.name,
        "task": plan.recipe.task.name,
        "settings": digests.settings(plan, plan),
        "measures": dict(TASKS[plan.recipe.task.name].measures),
        "metrics": TASKS[plan.recipe.task.name].score(results),
        "created": now(),
        "seconds": round(time.monotonic() - began, 3),
    }
    numbers, place = np.unique(results.rows, return_inverse=True)
    by_row = partial(np.bincount, place, minlength=len(numbers))
    # a task gives one number an example, or a column for each measure
    sums = results.sums.reshape(len(results.rows), -1)
    return Evaluation(
        about,
        rows.says[np.searchsorted(rows.rows, numbers)],
        numbers.astype(np.int64),
        by_row(results.tokens).astype(np.int64),
        {name: by_row(sums[:, column]) for column, name in enumerate(about["measures"])},
    )


def row_results(
    accelerator: Accelerator,
    objective: torch.nn.Module,
    batches: Batches,
    wishes: Callable[[], Wishes] = Wishes,
    *,
    tell: Callable[[int], None] | None = None,
) -> RowResults | None:
    """What an objective gives for each example, on every rank. None when a rank wishes to stop. `tell` hears how many examples are done.

    Dropout is off, and every training forward seeds itself.
    """
    examples = batches.examples
    parts: list[np.ndarray] = []
    # Without dropout. `finally` turns it on again, also after a signal.
    objective.eval()
    try:
        for first in range(0, len(examples), EVALUATED_AT_ONCE):
            ids = np.arange(first, min(first + EVALUATED_AT_ONCE, len(examples)))
            sums: torch.Tensor | None = None
            micro_batches = batches.of(ids)
            for turn, micro_batch in enumerate(micro_batches.on(accelerator.device)):
                # A part takes a CPU minutes. A GPU is through in no time, and gets its work in advance.
                is_asked = turn == 0 or accelerator.device.type == "cpu"
                if is_asked and agree(accelerator, wishes()).stop:
                    return None
                # Not inference mode: FSDP keeps the buffers of its first forward, and training has to write to them.
                with torch.no_grad():
                    _, rows = objective(micro_batch.inputs)
                if sums is None:  # a task may give several numbers a row
                    sums = rows.new_zeros((len(ids), *rows.shape[1:]), dtype=torch.float64)
                if not micro_batch.is_idle:
                    sums.index_copy_(0, micro_batch.places, rows.double())
                if tell:
                    tell(first + len(ids) * (turn + 1) // len(micro_batches))
            # Each row is on one rank and zero on the others, so their sum is that row.
            parts.append(np.asarray(accelerator.reduce(sums, "sum").tolist(), dtype=np.float64))
    finally:
        objective.train()
    found = np.concatenate(parts) if parts else np.zeros(0)
    return RowResults(np.asarray(examples.rows), found, np.asarray(examples.targets, dtype=np.int64))
