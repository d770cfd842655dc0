"""Ends a training whose held-out figure no longer improves, by the results of rows: a few rows' luck neither ends nor prolongs it.

A function of the evaluations at `evaluate.every` so far, so a resumed run ends where an uninterrupted one does. Rank 0 decides.
"""

import math
from collections.abc import Sequence

from finetune.plan.plan import Plan
from finetune.store.checkpoints import best
from finetune.store.evaluations import Evaluation
from finetune.training import collectives
from finetune.training.recorder import Recorder
from finetune.training.state import TrainState


class Patience:
    """Without `train.early_stopping` in the recipe it has no end."""

    def __init__(self, plan: Plan, recorder: Recorder):
        """With the evaluations of a run so far, as its record has them."""
        self._asked, self._every, self._recorder = (
            plan.recipe.train.early_stopping,
            plan.recipe.evaluate.every,
            recorder,
        )
        self._found: dict[int, Evaluation] = {}
        if self._asked and recorder.is_writer:
            for step, metrics in recorder.evaluations.items():
                figure = metrics.get(self._asked.metric)
                if self._counts(step) and isinstance(figure, int | float):
                    self._take(step, best.rows_of(recorder.path, step, figure, self._asked))

    def add(self, step: int, made: Sequence[Evaluation]) -> None:
        """Those of a step; none where a signal stopped it. Later ones are of updates that a rollback took back."""
        self._found = {at: each for at, each in self._found.items() if at < step}
        for each in made if self._counts(step) else ():
            self._take(step, each)

    def is_over(self, state: TrainState) -> bool:
        """Whether the run ends with the state's step; the same on every rank."""
        if self._asked is None:
            return False
        last = self._last_improvement(state.step) if self._recorder.is_writer else None
        if not collectives.of_rank_0(state.accelerator, int(last is not None)):
            return False
        why = f"none of the last {self._asked.patience} evaluations is better than that of step {last}"
        self._recorder.event("stopped_early", step=state.step, message=f"{why}, by held-out {self._asked.metric}")
        self._recorder.progress.say(f"stopped early at step {state.step}: {why}, by held-out {self._asked.metric}")
        return True

    def _last_improvement(self, step: int) -> int | None:
        """The step of the best evaluation before the last ones, if none of these is better; None while there is hope."""
        if self._asked is None or step not in self._found:
            return None
        data, patience = self._found[step].about["data"], self._asked.patience
        found = {at: each for at, each in sorted(self._found.items()) if each.about["data"] == data}
        before, last = [*found][:-patience], [*found][-patience:]
        if not before:
            return None
        sign, figure = (1 if self._asked.is_lower else -1), self._asked.parts[1]
        best_step = min(before, key=lambda at: (sign * found[at].about["metrics"][figure], -at))
        # with as many tries, one of them is lower by luck more often
        tries = patience + 1
        improved = (best.is_worse(found[best_step], found[at], self._asked, tries) for at in last)
        return None if any(improved) else best_step

    def _counts(self, step: int) -> bool:
        return bool(self._asked and self._every and self._every.steps and step % self._every.steps == 0)

    def _take(self, step: int, evaluation: Evaluation | None) -> None:
        if evaluation is None or self._asked is None or evaluation.about["set"] != self._asked.parts[0]:
            return
        if math.isfinite(evaluation.about["metrics"].get(self._asked.parts[1], math.nan)):
            self._found[step] = evaluation
