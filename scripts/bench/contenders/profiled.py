"""One update of ours under torch's profiler, as `finetune train` makes it: `profiled.py RECIPE RUN ANSWER`; it is the last one of the recipe."""

import sys
from pathlib import Path

import torch
from job import Answer, operators

from finetune.model import base
from finetune.recipe.load import load
from finetune.training import loop
from finetune.training.build import build
from finetune.training.evaluation import batches
from finetune.training.resume import open_plan
from finetune.training.strategy.start import start_accelerator


def main() -> None:
    recipe, run, answer = Path(sys.argv[1]), Path(sys.argv[2]), Answer(Path(sys.argv[3]))
    loaded = load(recipe)
    accelerator = start_accelerator(loaded.recipe.train)
    resolved, _, _ = open_plan(loaded, run, accelerator)
    plan = resolved.plan
    state = build(plan, base.directory(plan.recipe.base, plan.base), accelerator)
    made = batches(resolved, resolved.train, accelerator)
    for number in range(1, plan.steps + 1):
        if number == plan.steps:
            with torch.profiler.profile() as profile:
                report = loop.train_step(state, plan, made)
            answer.operators = operators(profile)
        else:
            report = loop.train_step(state, plan, made)
        answer.step(report.loss, report.tokens)
    answer.write()


if __name__ == "__main__":
    main()
