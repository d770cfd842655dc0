"""What a sweep will do, before it begins: the questions that `train` asks, asked once, and the steps, tokens, memory and disk of all.

The rows are encoded here, so that no two trials do it.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from pathlib import Path

from finetune.compare.sweep.asked import Question
from finetune.compare.sweep.space import Settings, told
from finetune.compare.sweep.spec import Spec
from finetune.errors import DataError, Problem, RecipeError, RunError, counted
from finetune.hosts.world import cores, devices_here
from finetune.plan import disk, memory, pace
from finetune.plan.memory import Work
from finetune.plan.plan import Plan, are_same_rows, order_of, steps_of
from finetune.training.device import device
from finetune.training.readiness import refuse_gated, refuse_unready
from finetune.training.resolve import Resolved, resolve

FIRST = 0.2
"""The first rung's part of the length. Earlier losses favour learning rates that turn out too high: see docs/sweeps.md."""
SPARED = {"adapter": {"alpha", "dropout"}}
"""Keys that change neither tensors nor rows: trials that differ in these alone are resolved once."""


@dataclass(frozen=True)
class _Planned:
    """The trials, with what was found out about all of them."""

    plans: list[Plan]
    """Of each trial, in order; of the same base and rows they differ in their recipe and length alone."""
    memory_bytes: int
    run_bytes: int


def spec_of(question: Question, path: Path, workers: int, ask: Callable[[Resolved], None]) -> Spec:
    """The sweep that a question becomes. Raises what `train` would raise for the first trial of each kind; `ask` may refuse too."""
    planned = _planned(question, path, ask)
    asked, plans = question.asked, planned.plans
    lengths = {plan.steps for plan in plans}
    if asked.halving and len(lengths) > 1:
        lengths_told = f"{min(lengths):,} to {max(lengths):,} steps"
        message = f"compares trials of one length, and these have {lengths_told}"
        raise RecipeError([Problem("--halving", "", message, "set train.steps in place of train.epochs")])
    rungs = rungs_of(asked.halving, asked.rungs, plans[0].steps, question.trials) if asked.halving else ()
    needed, free = question.trials * planned.run_bytes, disk.free_bytes(path)
    if needed > free:
        message = f"{counted(question.trials, 'run')} need {disk.readable(needed)}, and the disk has {disk.readable(free)} left"
        raise RunError(message, where=str(path), hint="free some space, or use --sweep on another disk")
    asked_for = question.space, asked.method, question.trials, asked.seed, asked.halving, asked.rungs, rungs
    spec = Spec(*asked_for, threads=threads_of(workers), steps=0, tokens=0, memory_bytes=planned.memory_bytes)
    return _with_totals(spec, plans)


def rungs_of(factor: int, given: tuple[int, ...], steps: int, trials: int) -> tuple[int, ...]:
    """The steps at which trials are compared, the last one the whole length."""
    if given and given[-1] >= steps:
        message = f"step {given[-1]:,} is not before the end, which is step {steps:,}"
        raise RecipeError([Problem("--rungs", "", message, "name the steps before the end")])
    count = 0
    while trials // factor ** (count + 1):
        count += 1
    found = given or tuple(sorted({ceil(steps * FIRST ** (1 - place / count)) for place in range(count)} - {steps}))
    if not found:
        message = f"{counted(trials, 'trial')} of {counted(steps, 'step')} cannot be halved by {factor}"
        raise RecipeError([Problem("--halving", "", message, "try more settings, a smaller factor, or more steps")])
    return (*found, steps)


def threads_of(workers: int) -> int:
    """CPU threads of each training: they share the cores, unless the user has said."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, cores() // max(1, workers)))


def _with_totals(spec: Spec, plans: list[Plan]) -> Spec:
    """With the steps and tokens of all trials; of TPE, whose settings are not known, by their mean."""
    if spec.rungs:
        parts = [(spec.kept(place), *ends) for place, ends in enumerate(pairwise((0, *spec.rungs)))]
        steps = sum(count * (end - start) for count, start, end in parts)
        tokens = sum(count * pace.mean_tokens(plans[0], start, end) for count, start, end in parts)
    else:
        share = spec.trials / len(plans)
        steps = round(share * sum(plan.steps for plan in plans))
        tokens = share * sum(pace.mean_tokens(plan, 0, plan.steps) for plan in plans)
    return replace(spec, steps=steps, tokens=round(tokens))


def _planned(question: Question, path: Path, ask: Callable[[Resolved], None]) -> _Planned:
    """Resolves one trial of each kind, and takes over its counts for the others."""
    kinds: dict[str, tuple[Plan, int, int]] = {}
    plans: list[Plan] = []
    for settings in question.settings:
        loaded = question.recipe_of(settings)
        kind = json.dumps(
            loaded.recipe.model_dump(mode="json", include={"base", "task", "data", "adapter"}, exclude=SPARED)
        )
        if kind not in kinds:
            resolved = resolve(loaded)
            refuse_gated(resolved, loaded.file)
            refuse_unready(resolved, path)
            ask(resolved)
            _refuse_rows(resolved.plan, [plan for plan, *_ in kinds.values()], settings, question)
            kinds[kind] = (resolved.plan, *_bytes_of(resolved))
        first = kinds[kind][0]
        steps = steps_of(loaded.recipe.train, order_of(loaded.recipe, first.sizes))
        plans.append(first.model_copy(update={"recipe": loaded.recipe, "steps": steps}))
    most = [max(sizes) for sizes in zip(*((held, stored) for _, held, stored in kinds.values()), strict=True)]
    return _Planned(plans, *most)


def _bytes_of(resolved: Resolved) -> tuple[int, int]:
    """Memory of the device, and disk of the run."""
    plan, shape = resolved.plan, resolved.shape
    work = Work(resolved.micro_batch_tokens, pace.largest_step(plan, resolved.train.lengths))
    return sum(memory.parts(plan, shape, work, device()).values()), disk.run_bytes(plan, shape.layers)


def _refuse_rows(plan: Plan, others: list[Plan], settings: Settings, question: Question) -> None:
    """DataError if there are no held-out rows to compare trials on, or not the same."""
    if not plan.holdout_counts.examples:
        hint = "set `data.holdout` in the recipe"
        raise DataError(
            "a sweep compares held-out losses, and no row is held out", where=question.loaded.file, hint=hint
        )
    if others and not are_same_rows(others[0], plan):
        tried = [key for key, axis in question.space.items() if len(axis.ends) > 1]
        message = f"these trials would be compared on other held-out tokens than the first: {told(settings, tried)}"
        hint = "sweep keys that leave the held-out rows and their tokens as they are"
        raise DataError(message, where=question.loaded.file, hint=hint)


def lines(spec: Spec, workers: int) -> Iterator[str]:
    """The sweep for a reader."""
    here = device()
    sharing = -(-workers // (devices_here(os.environ) or 1))
    yield f"trials      {spec.trials}, by {_method(spec)}, {counted(workers, 'worker')} of {counted(spec.threads, 'thread')}"
    if spec.rungs:
        kept = ", ".join(f"{spec.kept(place)} to step {rung:,}" for place, rung in enumerate(spec.rungs))
        yield f"rungs       {kept}"
    yield f"steps       {spec.steps:,}, {spec.tokens:,} tokens"
    yield f"memory      about {disk.readable(spec.memory_bytes)} a training; there are {disk.readable(here.bytes)}"
    if not memory.fits(sharing * spec.memory_bytes, here):
        yield f"warning: {counted(sharing, 'training')} at a time need more memory than there is; use fewer --workers"


def _method(spec: Spec) -> str:
    return {"grid": "grid", "random": f"random search with seed {spec.seed}", "tpe": "TPE"}[spec.method]
