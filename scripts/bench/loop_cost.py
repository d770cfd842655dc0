"""What the loop adds to the arithmetic: a tiny model, stepped by ours with its journal and by a loop without anything, in turns.

Both forms step the same model and optimizer; the bare one has its batches ready. With one and with eight micro-batches in an
update the difference is a cost of a step and a cost of a micro-batch.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import cells
import torch
from figures import OURS, Goal, Part, Quantity
from starting import TINY
from training import Training, Work, opened, write_recipe

from finetune.model import losses
from finetune.recipe.load import load
from finetune.training.evaluation import batches
from finetune.training.resume import open_plan

TOKENS, MANY = 16, 8
BLOCK, BLOCKS = 50, 20  # steps of a block; blocks of each kind and sample
BARE = "bare"


def parts(work: Path, options: argparse.Namespace, measure: Callable) -> Iterator[tuple[str, Part]]:
    blocks = 2 if options.tiny else BLOCKS * options.rounds
    one, many = (times(work / f"overhead-{count}", count, blocks) for count in (1, MANY))
    extra_one, extra_many = (
        [ours - bare for ours, bare in zip(found[OURS], found[BARE], strict=True)] for found in (one, many)
    )
    of_micro_batch = Quantity("a micro-batch takes longer than its arithmetic by", "ms")
    of_step = Quantity("a step takes longer than its arithmetic by, its micro-batches not counted", "ms")
    for single, several in zip(extra_one, extra_many, strict=True):
        cost = (several - single) / (MANY - 1)
        of_micro_batch.add(OURS, cost)
        of_step.add(OURS, single - cost)
    steps = Quantity("seconds of a whole step", "ms")
    for count, found in ((1, one), (MANY, many)):
        for name in (OURS, BARE):
            steps.samples[f"{name}, {count} micro-batches"] = found[name]
    goals = [
        Goal("loop overhead of a micro-batch", of_micro_batch.median(), 300e-6, "ms"),
        Goal("loop overhead of a step, journal included", of_step.median(), 1e-3, "ms"),
    ]
    yield "overhead", Part([of_micro_batch, of_step, steps], goals, {"steps of each kind": blocks * BLOCK})


def times(work: Path, micro_batches: int, blocks: int) -> dict[str, list[float]]:
    """Seconds of a step, the median of each block."""
    with opened(_recipe(work, micro_batches), work / "run") as training:
        bare = bare_step(training)
        found: dict[str, list[float]] = {OURS: [], BARE: []}
        for number in range(-1, blocks):
            for name, step in ((OURS, training.step), (BARE, bare))[:: 1 if number % 2 else -1]:
                seconds = [_seconds(step) for _ in range(BLOCK)]
                if number >= 0:  # the first block warms up
                    found[name].append(median(seconds))
    return found


def bare_step(training: Training) -> Callable[[], None]:
    """Forward, loss, backward, clipping and update of the same batches, and nothing else."""
    state = training.state
    model, optimizer = state.model, state.optimizer.optimizer
    parameters = list(state.trainable.values())
    made = [micro_batch.inputs for micro_batch in _micro_batches(training)]
    count = sum(len(inputs["labels_N"]) for inputs in made)

    def step() -> None:
        total = torch.zeros(())
        for inputs in made:
            loss, _ = losses.chunked(model, inputs["model_inputs"], inputs["positions_N"], inputs["labels_N"])
            (loss / count).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total.item()

    return step


def _micro_batches(training: Training) -> list:
    run = training.recorder.path
    resolved, _, _ = open_plan(load(run / "recipe.yaml"), run, training.state.accelerator)
    made = batches(resolved, resolved.train, training.state.accelerator)
    return made.of(training.plan.order.examples_of(1))


def _recipe(work: Path, micro_batches: int) -> Path:
    write_recipe(work / "tiny.yaml", TINY, Work(micro_batches, TOKENS))
    model = next(path for path in work.iterdir() if path.is_dir())
    sections = cells.sections(cells.Cell("full", TOKENS, "fp32"), model, work / "tiny.jsonl", 1_000_000)
    sections["train"] |= {"batch_size": micro_batches, "micro_batch_tokens": TOKENS}
    sections["optimizer"]["learning_rate"] = 1e-6
    return cells.write_recipe(work / "overhead.yaml", sections | {"guard": {"spike": "warn"}})


def _seconds(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
