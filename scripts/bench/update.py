"""The update of all weights in fp32, as `finetune.training.loop` makes it, beside the least that it could cost.

That is fused AdamW alone and one read of the gradients, which their norm needs. New gradients are made for every sample, in
the sizes that a step leaves them in, and are gone after it.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cells
import torch
from figures import OURS, Goal, Part, Quantity, rotated

from finetune.recipe.load import load
from finetune.training import loop
from finetune.training.build import build
from finetune.training.resume import open_plan
from finetune.training.state import TrainState
from finetune.training.strategy.start import start_accelerator

FLOOR, USUAL = "AdamW alone + one read (floor)", "clip_grad_norm_, AdamW, zero_grad"
PIECES = ("  fused AdamW alone", "  one read of the gradients")
SAMPLES = 5  # of each contestant in a round


def parts(work: Path, options: argparse.Namespace, measure: Callable) -> Iterator[tuple[str, Part]]:
    state = _state(options.model, work / "update")
    for about, scale in (("gradients are clipped", 1.0), ("gradients are short enough", 1e-6)):
        seconds = Quantity(f"update of {_count(state):,} fp32 parameters; {about}", "ms")
        for turn in range(-1, SAMPLES * options.rounds):
            for name, contestant in rotated(list(_contestants(state).items()), turn):
                taken = _timed(state, contestant, scale)
                if turn >= 0:
                    seconds.add(name, taken)
        pairs = zip(*(seconds.samples[name] for name in PIECES), strict=True)
        seconds.samples[FLOOR] = [sum(pair) for pair in pairs]
        goal = Goal(f"update / its floor; {about}", seconds.median() / seconds.median(FLOOR), 1.2, "x")
        yield f"update, {about}", Part([seconds], [goal])


def _contestants(state: TrainState) -> dict[str, Callable[[], object]]:
    parameters, adamw = list(state.trainable.values()), state.optimizer.optimizer

    def ours() -> None:
        norm = state.strategy.gradient_norms(state).square().sum().sqrt().item()
        loop.update(state, 1e-6, norm, 1.0)

    def usual() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        adamw.zero_grad()

    alone, read = PIECES
    return {
        OURS: ours,
        USUAL: usual,
        alone: adamw.step,
        read: lambda: sum(parameter.grad.sum() for parameter in parameters).item(),
    }


def _timed(state: TrainState, contestant: Callable[[], object], scale: float) -> float:
    for parameter in state.trainable.values():
        parameter.grad = torch.full_like(parameter, scale)
    started = time.perf_counter()
    contestant()
    seconds = time.perf_counter() - started
    state.optimizer.zero_grad()
    return seconds


def _state(model: Path, work: Path) -> TrainState:
    recipe = cells.prepare(cells.parse("full-512-fp32"), 1, model, work).recipe
    loaded = load(recipe)
    accelerator = start_accelerator(loaded.recipe.train)
    resolved, _, _ = open_plan(loaded, work / "run", accelerator)
    return build(resolved.plan, resolved.base_directory, accelerator)


def _count(state: TrainState) -> int:
    return sum(parameter.numel() for parameter in state.trainable.values())
