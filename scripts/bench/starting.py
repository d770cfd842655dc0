"""From the start of a process to its first step: ours beside a bare loop, and ours resuming near the beginning and far from it.

`python scripts/bench/throughput.py --part start` runs it. Ours also reads a recipe, encodes rows, plans, and opens a run; the bare loop
is given tokens.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from statistics import median

import cells
import processes
from comparison import first_step_seconds, ratios
from figures import OURS, Goal, Part, Quantity, rotated
from training import MEDIUM, Shape, Work, write_recipe

from finetune.model import base
from finetune.recipe.load import load
from finetune.store.run import journal, lease
from finetune.training.attempt import begin
from finetune.training.build import build
from finetune.training.progress import Progress
from finetune.training.resume import open_plan
from finetune.training.strategy.start import start_accelerator

BARE = "bare-chunked"
CELLS = ("full-512-bf16", "lora-512-bf16")
POSITIONS, NEAR = (10, 2_000, 2_000_000), (10, 2_000)
TINY = Shape(2, 32, 64, 300)


def parts(work: Path, options: argparse.Namespace, measure: Callable[..., dict]) -> Iterator[tuple[str, Part]]:
    bases = {"tiny Llama": options.model} if options.tiny else models(work / "start-models", options.model)
    for base_name, model in bases.items():
        for name in CELLS[: 1 if options.tiny else None]:
            place = work / f"start-{base_name.replace(' ', '-')}-{name}"
            prepared = cells.prepare(cells.parse(name), 1, model, place)
            yield f"start, {base_name}, {name}", started(prepared, options, measure)
    yield "resume", resumed(work / "resume", options)


def models(work: Path, quickstart: Path) -> dict[str, Path]:
    """Two that are made here, 0.04 and 42 million parameters, and the quickstart's of 135."""
    return {"tiny Llama": random_model(work / "tiny", TINY), "small Llama": random_model(work / "small", MEDIUM)} | {
        "SmolLM2-135M": quickstart
    }


def started(prepared: cells.Prepared, options: argparse.Namespace, measure: Callable[..., dict]) -> Part:
    """Warm: what both can keep (pages, bytecode, encoded rows) is kept by a round before the first."""
    seconds = Quantity("start of the process to the end of its first step, warm cache", "s")
    of_cpu = Quantity("CPU time of the whole process of one step; of ours with the commit of it", "s")
    runs: dict[str, list[dict]] = {OURS: [], BARE: []}
    for turn in _turns(options):
        for name in rotated((OURS, BARE), turn):
            run = measure(name, prepared, options)
            if turn >= 0:
                runs[name].append(run | {"round": turn})
                seconds.add(name, first_step_seconds(run))
                of_cpu.add(name, run["cpu_seconds"])
    found = ratios(first_step_seconds, runs[OURS], runs[BARE])
    goal = Goal("start to first step, ours / bare loop, median of the rounds", median(found), 1.0, "x")
    facts = {"ratio of each round": ", ".join(f"{each:.2f}" for each in found), "threads": options.threads}
    return Part([seconds, of_cpu], [goal], facts)


def resumed(work: Path, options: argparse.Namespace) -> Part:
    """A step takes one row, so that steps are positions; the far ones are commits of this state that were given their number."""
    work.mkdir()
    recipe = _recipe(work)
    with_records = Quantity("to the first step after resuming, the journal has a record of every step before", "s")
    without = Quantity("the same, the journal has none of them", "s")
    runs, positions = {}, NEAR if options.tiny else POSITIONS
    for position in positions:
        for quantity, has_records in ((with_records, True), (without, False)):
            run = work / f"run-{position}-{has_records}"
            _advance(recipe, run, position, has_records)
            runs[quantity.title, position] = (quantity, run)
    for turn in _turns(options):
        for key in rotated(list(runs), turn):
            quantity, run = runs[key]
            seconds = _resume(recipe, run, options, key[1] + turn + 2)
            if turn >= 0:
                quantity.add(_named(key[1]), seconds)
    goals = []
    for quantity, about in ((with_records, "with records"), (without, "without records")):
        nearest = quantity.median(_named(positions[0]))
        for position in positions[1:]:
            ratio = quantity.median(_named(position)) / nearest
            goals.append(Goal(f"resume at {position:,} / at {positions[0]}, {about}", ratio, 1.05, "x"))
    return Part([with_records, without], goals)


def _turns(options: argparse.Namespace) -> range:
    """A round before the first warms what is kept; the short form asks for no figures worth it."""
    return range(0 if options.tiny else -1, options.rounds)


def _named(position: int) -> str:
    return f"at step {position:,}"


def random_model(work: Path, shape: Shape = TINY) -> Path:
    """A random Llama that reads bytes."""
    write_recipe(work / "recipe.yaml", shape, Work(1, 16))
    return next(path for path in work.iterdir() if path.is_dir())


def _resume(recipe: Path, run: Path, options: argparse.Namespace, until: int) -> float:
    """Seconds to the end of the first step; `until` is the step after."""
    command = [sys.executable, "-m", "finetune", "train", recipe, "--run", run, "--quiet", "--until", str(until)]
    outcome = processes.run(command, options.environment, run.with_suffix(".log"))
    ends = [record for record in journal.read(run) if record["kind"] == "step"]
    return datetime.fromisoformat(ends[-1]["time"]).timestamp() - outcome.started


def _recipe(work: Path) -> Path:
    """20,000 rows of 16 tokens for a tiny Llama."""
    draw = random.Random(0)
    data = work / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"text": "".join(draw.choices("abcdefgh", k=15))}) + "\n" for _ in range(20_000))
    )
    parts = cells.sections(cells.Cell("full", 16, "fp32"), random_model(work), data, 4_000_000)
    parts["train"] |= {"batch_size": 1}
    return cells.write_recipe(work / "resume.yaml", parts | {"guard": {"spike": "ignore"}})


def _advance(recipe: Path, run: Path, position: int, has_records: bool) -> None:
    """A run whose newest commit is at a step, made by the code that makes every commit."""
    loaded = load(recipe)
    accelerator = start_accelerator(loaded.recipe.train)
    with lease.acquire(run, "bench") as held:
        opened = open_plan(loaded, run, accelerator)
        plan = opened.resolved.plan
        if has_records:
            _write_records(run, position)
        state = build(plan, base.directory(plan.recipe.base, plan.base), accelerator)
        for parameter in state.trainable.values():  # moments exist after a step
            parameter.grad = parameter.detach().clone()
        state.optimizer.step()
        state.optimizer.zero_grad()
        recorder, _ = begin(run, opened, loaded.text, state, Progress(plan.steps, is_silent=True), held)
        state.step = position
        recorder.commit(state)
        recorder.finish(state)
        recorder.close()
    os.sync()


def _write_records(run: Path, steps: int) -> None:
    """Lines as a training would have left them."""
    run.mkdir(exist_ok=True)
    record = {"loss": 5.703782476891174, "grad_norm": 1.2345678806304932, "learning_rate": 1e-5, "tokens": 16}
    record |= {"supervised_tokens": 15, "seconds": 0.004321, "await_seconds": 0.0, "attempt": "bench"}
    with (run / "journal.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            line = {"kind": "step", "step": step, **record, "time": journal.now()}
            file.write(json.dumps(line) + "\n")
