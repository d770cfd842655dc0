"""Floor 5. The everyday consumer of the loop: iterates it, evaluates, commits, and stops when asked.

`cli` calls `train`; `execute` is what happens between an opened state and the last commit. What all ranks do (evaluate,
save, stop) is a function of the step, or was agreed by all of them.
"""

import os
import platform
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

from finetune import estimate, guard, loop
from finetune import plan as plans
from finetune.checkpoints import lease, snapshot
from finetune.checkpoints.manifest import Checkpoint, Damage
from finetune.data import pack
from finetune.data.batches import Batches, Examples
from finetune.errors import FinetuneError, NotFiniteError, RunError, Stopped
from finetune.model import base
from finetune.plan import Plan
from finetune.progress import Progress
from finetune.recipe.load import LoadedRecipe
from finetune.recipe.schema import Every
from finetune.recorder import WORLD, Recorder
from finetune.resolve import Resolved, differences, is_free, micro_batch_tokens, resolve
from finetune.state import TrainState, build, start_accelerator
from finetune.tasks import TASKS

PACKAGES = ("finetune", "torch", "transformers", "accelerate", "peft", "safetensors", "datasets")


class Signals:
    """SIGTERM and SIGINT as a wish: before training they end the process, in training the loop asks; a second one ends at once."""

    def __init__(self):
        self.received: int | None = None
        self.is_training = False

    def __enter__(self) -> "Signals":
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        if not self.is_training:
            os._exit(128 + number)  # not an exception: thrown into a library's import it would become another one
        self.received = number


def train(loaded: LoadedRecipe, path: Path, is_quiet: bool = False) -> None:
    """Starts the run at `path`, or resumes it, and returns when it is finished.

    Raises Stopped after a signal, when the last finished step is committed.
    """
    with Signals() as signals:
        accelerator = start_accelerator(loaded.recipe.train)
        is_writer = accelerator.is_main_process
        attempt = secrets.token_hex(4)
        with lease.acquire(path, attempt) if is_writer else nullcontext():
            with accelerator.main_process_first():
                resolved, facts, changes = _resolve(loaded, path, accelerator)
                base_directory = base.directory(resolved.plan.recipe.base, resolved.plan.base)
            progress = Progress(resolved.plan.steps, is_quiet, is_silent=not is_writer)
            recorder = Recorder(path, resolved.plan, facts, attempt, progress, is_writer)
            estimate.refuse_small_disk(resolved.plan, path)
            for change in changes:
                progress.say(change)
            checkpoint, damages = recorder.open(loaded.text, resolved.base_directory, changes)
            try:
                state = build(resolved.plan, base_directory, accelerator)
                accelerator.wait_for_everyone()
                _resume(state, resolved.plan, recorder, checkpoint, damages)
                _refuse_different_steps(state, accelerator)
                signals.is_training = True
                is_finished = execute(resolved, base_directory, state, recorder, signals)
            finally:
                progress.close()
                recorder.close()
    if not is_finished:
        raise Stopped(signals.received or signal.SIGTERM)


def execute(resolved: Resolved, base_directory: Path, state: TrainState, recorder: Recorder, signals: Signals) -> bool:
    """From the state's step to the plan's end, or to a signal: iterate, record, evaluate, commit.

    Returns whether the run is finished: all steps done, and the last one evaluated.
    """
    plan, recipe = resolved.plan, resolved.plan.recipe
    save_steps = [every.steps for every in recipe.checkpoint.every if every.steps]
    save_minutes = [every.minutes for every in recipe.checkpoint.every if every.minutes]

    def wishes() -> loop.Wishes:
        age = (time.monotonic() - recorder.committed_at) / 60
        return loop.Wishes(
            signals.received is not None, recorder.is_writer and any(age >= limit for limit in save_minutes)
        )

    def evaluate_and_record() -> dict | None:
        metrics = evaluate(resolved, state.accelerator, state.objective, wishes)
        if metrics:
            recorder.evaluated(state.step, metrics)
        return metrics

    def commit_last() -> None:
        if state.step > recorder.last_step:
            recorder.commit(state, base_directory, None)
        recorder.finish(state)

    def is_save(step: int) -> bool:
        return step == plan.steps or any(step % steps == 0 for steps in save_steps)

    def is_evaluation(step: int, is_saved: bool) -> bool:
        is_due = (
            step in (0, plan.steps)
            or (is_saved and recipe.checkpoint.keep.best)
            or _is_due(recipe.evaluate.every, step)
        )
        return bool(is_due) and len(resolved.holdout) > 0

    if is_evaluation(state.step, is_saved=state.step > 0) and not recorder.is_evaluated(state.step):
        evaluate_and_record()  # at the start, or where a signal cut it short
    try:
        for report in loop.steps(state, plan, batches(plan, resolved.train, state.accelerator), plan.steps, wishes):
            recorder.step(report)
            is_saved = report.is_save_due or is_save(report.step)
            metrics = evaluate_and_record() if is_evaluation(report.step, is_saved) else None
            if is_saved:
                recorder.commit(state, base_directory, metrics)
            _watch(recorder, report)
    except (NotFiniteError, SpikeError) as error:
        recorder.event(error.code, step=state.step, message=error.message)
        commit_last()
        raise
    commit_last()
    is_finished = state.step == plan.steps and (len(resolved.holdout) == 0 or recorder.is_evaluated(state.step))
    if is_finished:
        recorder.progress.say(f"finished at step {state.step}")
    return is_finished


def _resume(
    state: TrainState, plan: Plan, recorder: Recorder, checkpoint: Checkpoint | None, damages: list[Damage]
) -> None:
    """Brings the state to the newest sound checkpoint, and says what that costs where newer ones are damaged."""
    for damage in damages:
        recorder.progress.say(f"damaged: {damage.file}: {damage.message}")
    if damages:
        lost = max(int(damage.file[5:13]) for damage in damages) - recorder.last_step
        recorder.progress.say(f"falling back to step {recorder.last_step}: {lost} steps are run again")
    if not damages and recorder.newest_recorded > recorder.last_step:
        lost = recorder.newest_recorded - recorder.last_step
        recorder.progress.say(f"step {recorder.newest_recorded} was committed and is gone: {lost} steps are run again")
    if checkpoint:
        snapshot.read(state, plan, checkpoint)
        recorder.progress.say(f"resumed from step {state.step}")


def _refuse_different_steps(state: TrainState, accelerator: Accelerator) -> None:
    """Hosts that do not share the run directory would each start from another step."""
    steps = accelerator.gather(torch.tensor([state.step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise RunError(
            f"the processes are at different steps: {steps}", hint="give all hosts one run directory on a shared disk"
        )


class SpikeError(FinetuneError):
    code = "spike"


def batches(plan: Plan, examples: Examples, accelerator: Accelerator) -> Batches:
    """The micro-batches of this rank, arranged and collated as the plan says."""
    task = TASKS[plan.recipe.task.name]
    is_packed = plan.recipe.task.packing
    return Batches(
        examples,
        arrange=pack.packed if is_packed else pack.padded,
        collate=task.collate_packed if is_packed else task.collate_padded,
        budget=micro_batch_tokens(plan.recipe),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def evaluate(
    resolved: Resolved,
    accelerator: Accelerator,
    objective: torch.nn.Module,
    wishes: Callable[[], loop.Wishes] = loop.Wishes,
) -> dict | None:
    """Held-out figures of a prepared objective; None when a signal cut them short."""
    score = TASKS[resolved.plan.recipe.task.name].score
    return loop.evaluate(accelerator, objective, batches(resolved.plan, resolved.holdout, accelerator), score, wishes)


def _resolve(loaded: LoadedRecipe, path: Path, accelerator: Accelerator) -> tuple[Resolved, dict, list[str]]:
    """Plan and facts of the run: its own where it exists, else new ones; and a line for everything that changed since."""
    now = _facts(loaded, accelerator)
    if not (path / "plan.json").exists():
        return resolve(loaded), now | {"run": secrets.token_hex(8)}, []
    earlier, facts = plans.load(path)
    different = differences(earlier.recipe, loaded.recipe)
    refused = [f"{key}: {old} -> {new}" for key, old, new in different if not is_free(key)]
    if refused:
        raise RunError(
            "was started with another recipe:\n  " + "\n  ".join(refused),
            where=str(path),
            hint=f"use another --run, or go on from a step of this one with `finetune branch {path}@STEP --set KEY=VALUE`",
        )
    changes = [f"taken from the recipe: {key}: {old} -> {new}" for key, old, new in different]
    changes += [
        f"{name} changed: {facts[name]} -> {now[name]}; bit equality may be lost"
        for name in ("versions", *WORLD)
        if facts[name] != now[name]
    ]
    return resolve(loaded, earlier), now | {"run": facts["run"]}, changes


def _facts(loaded: LoadedRecipe, accelerator: Accelerator) -> dict:
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    return {
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "device": name,
        "world_size": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "micro_batch_tokens": micro_batch_tokens(loaded.recipe),
    }


def _is_due(every: Every | None, step: int) -> bool:
    return every is not None and step % every.steps == 0


def _watch(recorder: Recorder, report: loop.StepReport) -> None:
    """Says when loss or gradient norm is far outside the last steps, or ends the run, as guard.spike has it."""
    rule = recorder.plan.recipe.guard.spike
    for quantity in ("loss", "grad_norm") if rule != "ignore" else ():
        value = getattr(report, quantity)
        distance = guard.spike(recorder.history(quantity, report.step, guard.WINDOW), value)
        if distance is not None:
            message = f"{quantity} {value:.4g} lies {distance:.0f} deviations above the last steps"
            recorder.progress.say(f"spike at step {report.step}: {message}")
            if rule == "stop":
                raise SpikeError(message, where=f"step {report.step}", hint="look at the rows of that step")
            recorder.event("spike", step=report.step, quantity=quantity, deviations=round(distance, 1))
