"""Writes what training's own evaluations found for each row, on the thread of a save: training never waits for it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from finetune.plan.plan import Plan
from finetune.store import evaluated, evaluations
from finetune.store.checkpoints.manifest import FileRecord, Manifest
from finetune.store.evaluations import About, Evaluation


def write(
    made: Sequence[Evaluation], run: Path, plan: Plan, manifest: Manifest, files: Mapping[str, FileRecord]
) -> None:
    """Those since the last save; `manifest` and `files` are of the checkpoint that is about to be committed.

    Weights that no save has are known by their step alone, so that nothing else is taken for them.
    """
    base = evaluated.base(plan.recipe.base, plan.base)
    for each in made:
        step = each.about["step"]
        unsaved = base if step == 0 else evaluated.unsaved(manifest.run, manifest.attempt, step)
        model = evaluated.weights(files, base) if step == manifest.step else unsaved
        about = {**each.about, "ref": f"{run.absolute().name}@{step}", "model": model, "run": manifest.run}
        evaluations.write(evaluations.of_step(run, step), replace(each, about=cast(About, about)))
