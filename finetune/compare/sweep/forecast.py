"""How long a sweep will take, measured: the first steps of its first trial, in a scratch directory that is removed."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from finetune.compare.sweep import directory, trainings
from finetune.compare.sweep.directory import Sweep, Trial
from finetune.compare.sweep.queue import Task
from finetune.compare.sweep.space import corners
from finetune.compare.sweep.spec import Spec
from finetune.compare.sweep.trainings import Training
from finetune.errors import FinetuneError
from finetune.recipe.load import LoadedRecipe
from finetune.store.run import journal

STEPS = 4
"""The first makes buffers, and does not count."""


def seconds(spec: Spec, loaded: LoadedRecipe, beside: Path, workers: int) -> float:
    """Seconds of the whole sweep with so many workers here, by the pace of one that has the machine for itself."""
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".forecast.", dir=beside) as scratch:
        sweep = directory.create(Path(scratch) / "sweep", replace(spec, halving=None, rungs=()), loaded)
        began = time.monotonic()
        with _trained(sweep, Trial(0, next(corners(spec.space)), {})) as training:
            code = training.process.wait()
        if code:
            message = f"the first trial cannot be trained here: {training.last_words()}"
            raise FinetuneError(message, where="--dry-run", hint="see what `finetune train` says about this recipe")
        started = time.monotonic() - began
        steps = [*journal.steps(journal.read(sweep.run(0))).values()]
    counted = steps[1:] or steps
    per_token = sum(step["seconds"] for step in counted) / sum(step["tokens"] for step in counted)
    starts = sum(spec.kept(place) for place in range(len(spec.rungs))) if spec.rungs else spec.trials
    # What a start takes beside its steps: imports, loading, the evaluation at its end.
    around = started - sum(step["seconds"] for step in steps)
    return (spec.tokens * per_token + starts * around) / min(workers, spec.trials)


@contextmanager
def _trained(sweep: Sweep, trial: Trial) -> Iterator[Training]:
    claim = sweep.claim(trial.number)
    if claim is None:
        raise ValueError("the scratch directory is our own")
    with claim:
        training = trainings.start(sweep, trial, Task(trial.number, STEPS), claim, slot=0)
        try:
            yield training
        finally:
            training.process.kill()
            training.process.wait()
