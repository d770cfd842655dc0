"""The kernels of the steps that run again: each step has those that it was trained with, or is refused."""

from collections.abc import Iterable
from pathlib import Path

from finetune.errors import RunError
from finetune.model import fused
from finetune.plan.facts import World
from finetune.plan.plan import Plan
from finetune.recipe.resume_rules import COMPILED, PLAIN, recorded
from finetune.training.kernels import INSTALL, Kernels, available
from finetune.training.state import TrainState


def kernels(plan: Plan, directory: Path, worlds: Iterable[World]) -> Kernels:
    """Fused ones if a step was trained with them and they can run here, or what the run compiles; else plain."""
    if plan.recipe.train.has_fixed_lengths:
        return Kernels(COMPILED)
    fused_ones = {recorded(world)["kernels"] for world in worlds} - {PLAIN, COMPILED}
    return available(plan.recipe, directory, is_asked=True) if fused_ones else Kernels()


def name_here(facts: World, found: Kernels) -> str:
    """The fact `kernels` of this machine, beside that of a run."""
    return PLAIN if recorded(facts)["kernels"] == PLAIN and found.name != COMPILED else found.name


def switch(state: TrainState, step: int, world: World, found: Kernels) -> None:
    """As in the attempt that trained a step. RunError if its kernels cannot run here: the step would not be the same."""
    name, where = recorded(world)["kernels"], f"step {step}"
    if name != found.name and COMPILED in (name, found.name):
        message = f"was trained with {name} kernels, and the run has {found.name} ones since, which round otherwise"
        raise RunError(message, where=where, hint=f"name steps that were trained with {found.name} ones")
    if name not in (PLAIN, COMPILED) and found.parts is None:
        message = f"was trained with {name}, and plain kernels round otherwise; fused ones cannot run here: {found.why}"
        raise RunError(message, where=where, hint=f"run it again on a CUDA device, after {INSTALL}")
    if here := fused.switch_of(state.model):
        here.is_on = name != PLAIN
