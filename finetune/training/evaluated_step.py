"""A step of a training is evaluated on the held-out rows and on the evaluation sets, and recorded.

It must not look at the test set: a figure that is seen at every step is chosen by.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from finetune.plan.facts import Metrics
from finetune.plan.metrics import named
from finetune.store.evaluations import Evaluation
from finetune.training import blame, loop
from finetune.training.evaluation import evaluated
from finetune.training.evaluation_sets import watched_sets
from finetune.training.recorder import Recorder
from finetune.training.resolve import Resolved
from finetune.training.state import TrainState


def evaluate_step(
    resolved: Resolved,
    state: TrainState,
    recorder: Recorder,
    wishes: Callable[[], loop.Wishes],
    is_foreseen: bool,
) -> list[Evaluation]:
    """Evaluates the state and records the figures; nothing where a signal stops it. `is_foreseen`: the forecast of the end includes this evaluation."""
    pace, metrics, made = recorder.progress.pace, Metrics(), list[Evaluation]()
    for rows in watched_sets(resolved):
        tell = recorder.progress.evaluation(state.step, len(rows.examples))
        with pace.aside("evaluation", is_foreseen) if pace else nullcontext():
            figures = partial(evaluated, resolved, state.accelerator, state.objective, rows, wishes, tell=tell)
            found = figures()
            of_average: Metrics | None = {}
            if found and state.average and state.step:  # at step 0 both are the base
                state.await_snapshot()
                of_average = state.average.figures(figures)
        if not found or of_average is None:  # A signal: the resume evaluates this step again.
            return []
        made.append(replace(found, about={**found.about, "step": state.step}))
        metrics |= named(rows.name, found.about["metrics"] | of_average)
    recorder.evaluated(state.step, metrics, made)
    # Nothing was trained yet, so the base itself must be broken.
    if state.step == 0 and not math.isfinite(metrics["loss"]) and (error := blame.broken(state)):
        raise error
    return made
