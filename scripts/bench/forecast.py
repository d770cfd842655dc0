"""What `finetune plan` forecasts beside what `finetune train` then takes: peak memory, and the time of the rest after 20 steps.

    python scripts/bench/forecast.py --work DIRECTORY [--only memory,evaluation,long,experts,time] [--json FILE] [--tiny]

Every cell is a real `finetune train` in a separate process. Memory is that process's VmHWM: all of it, staging buffers and
the pages of the base's file included. Time is that from the forecast at step 20 to the last step's end, journalled, saves and
evaluations included. `--tiny` runs one cell of each on a tiny model: whether it runs, not how right it is.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import NamedTuple

import machine
from training import MEDIUM, SMOLLM2, TINY, Shape, Work, write_recipe

from finetune.store.run import journal

LIMITS = {"memory": 0.15, "evaluation": 0.15, "long": 0.15, "experts": 0.15, "time": 0.25}
SAVERS = {
    "no saver": [],
    "checkpointed": ["train.activation_checkpointing=true"],
    "checkpointed, feed-forward in pieces": ["train.activation_checkpointing=true", "train.mlp_chunk_tokens=1024"],
}
# Tells the peak of the process that it is: what the parent had resident before does not count, as it would in ru_maxrss.
PEAK = """
import re
from finetune.cli import main
main()
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
"""


class Cell(NamedTuple):
    """One training."""

    model: str
    adapter: str
    precision: str
    micro_batch_tokens: int
    rows: int
    """Rows of a step; each is of the bench's length."""


class Row(NamedTuple):
    """What was forecast and measured of a cell, in bytes or seconds."""

    cell: str
    forecast: float
    measured: float
    parts: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.forecast / self.measured


def cells(is_tiny: bool) -> Iterator[Cell]:
    if is_tiny:
        yield Cell("tiny", "full", "fp32", 64, 4)
        return
    for model, adapter, precision in product(("SmolLM2-135M", "random Llama"), ("full", "lora"), ("bf16", "fp32")):
        for tokens, rows in ((512, 4), (1024, 4), (2048, 8)):  # the first in two micro-batches, the others in one
            yield Cell(model, adapter, precision, tokens, rows)


def models(is_tiny: bool) -> dict[str, Shape | str]:
    return {"tiny": TINY} if is_tiny else {"SmolLM2-135M": SMOLLM2, "random Llama": MEDIUM}


def memory(work: Path, is_tiny: bool) -> Iterator[Row]:
    for cell in cells(is_tiny):
        recipe = recipe_of(work, cell, models(is_tiny), tokens=16 if is_tiny else 256)
        settings = [*settings_of(cell), "train.steps=4", "checkpoint.every=2 steps"]
        facts = planned(recipe, settings)
        yield Row(name_of(cell), facts["memory_bytes"], trained(recipe, work / "run", settings), facts["memory"])
        shutil.rmtree(work / "run")


def evaluation(work: Path, is_tiny: bool) -> Iterator[Row]:
    """The peak where held-out rows are longer than those that are trained on, with a large vocabulary."""
    shape = Shape(2, 32, 64, 300) if is_tiny else Shape(2, 64, 128, 150_000)
    for adapter, precision in product(("full", "lora"), ("fp32", "bf16")):
        cell = Cell("a large vocabulary", adapter, precision, 64, 4)
        longer = write_recipe(work / "longer.yaml", shape, Work(8, 32 if is_tiny else 512)).with_suffix(".jsonl")
        recipe = recipe_of(work, cell, {cell.model: shape}, tokens=16)
        text = recipe.read_text().replace('"max_length": 16', '"max_length": 512')
        recipe.write_text(text.replace("data: {", f'data: {{"holdout": [{{"path": "{longer}"}}], '))
        settings = [*settings_of(cell), "train.steps=2", "checkpoint.every=2 steps"]
        facts = planned(recipe, settings)
        yield Row(name_of(cell), facts["memory_bytes"], trained(recipe, work / "run", settings), facts["memory"])
        shutil.rmtree(work / "run")


def long(work: Path, is_tiny: bool) -> Iterator[Row]:
    """One row beyond the positions of its base, whose feed-forward is wide; two steps of it."""
    shape = Shape(2, 32, 64, 300) if is_tiny else Shape(4, 256, 4096, 1024)
    for tokens in (2048,) if is_tiny else (8192, 16384):
        for adapter, (saver, settings) in product(("full", "lora"), SAVERS.items()):
            if tokens > 8192 and saver != list(SAVERS)[-1]:
                continue  # gigabytes
            cell = Cell("wide" if not is_tiny else "tiny", adapter, "fp32", tokens, 1)
            recipe = write_recipe(
                work / f"{adapter}.yaml", shape, Work(2, tokens), {"name": "lora"} if adapter == "lora" else None
            )
            text = recipe.read_text().replace("base: {", 'base: {"rope": {"rope_type": "linear", "factor": 16.0}, ')
            recipe.write_text(text)
            chosen = [*settings_of(cell), *settings, "train.steps=2", "checkpoint.every=1 steps"]
            facts = planned(recipe, chosen)
            yield Row(
                f"{tokens} tokens, {adapter}, {saver}",
                facts["memory_bytes"],
                trained(recipe, work / "run", chosen),
                facts["memory"],
            )
            shutil.rmtree(work / "run")


def experts(work: Path, is_tiny: bool) -> Iterator[Row]:
    """A base whose experts are most of it: trained in full, by LoRA beside them, and by LoRA on them."""
    shape = Shape(2, 32, 32, 300, 4) if is_tiny else Shape(6, 256, 512, 1024, 16)
    ways = {
        "full": None,
        "lora beside": {"name": "lora", "targets": ["q_proj", "v_proj"]},
        "lora on experts": {"name": "lora", "targets": ["q_proj"], "parameters": ["experts.*"]},
    }
    savers = list(SAVERS.items())[:2]
    for (way, adapter), precision, (saver, settings) in product(ways.items(), ("fp32", "bf16"), savers):
        recipe = write_recipe(work / f"{way}.yaml".replace(" ", "-"), shape, Work(8, 16 if is_tiny else 512), adapter)
        chosen = [
            *settings_of(Cell("", way, precision, 1024, 4)),
            *settings,
            "train.steps=2",
            "checkpoint.every=1 steps",
        ]
        facts = planned(recipe, chosen)
        yield Row(
            f"{way}, {precision}, {saver}",
            facts["memory_bytes"],
            trained(recipe, work / "run", chosen),
            facts["memory"],
        )
        shutil.rmtree(work / "run")


def time(work: Path, is_tiny: bool) -> Iterator[Row]:
    for adapter in ("full", "lora"):
        model = next(iter(models(is_tiny)))
        cell = Cell(model, adapter, "bf16", 512, 4)
        recipe = recipe_of(work, cell, models(is_tiny), tokens=16 if is_tiny else 128)
        cadences = ["checkpoint.every=25 steps", "evaluate.every=30 steps", "data.holdout=2"]
        settings = [*settings_of(cell), "train.steps=80", *cadences]
        trained(recipe, work / "run", settings)
        records = journal.read(work / "run")
        [event] = [record for record in records if record.get("event") == "forecast"]
        last = next(record for record in reversed(records) if record["kind"] == "step")
        took = datetime.fromisoformat(last["time"]) - datetime.fromisoformat(event["time"])
        figures = {name: event[name] for name in ("tokens_per_second", "evaluation_seconds", "save_seconds")}
        yield Row(f"{name_of(cell)}, 60 steps", event["seconds_left"], took.total_seconds(), figures)
        shutil.rmtree(work / "run")


PARTS = {"memory": memory, "evaluation": evaluation, "long": long, "experts": experts, "time": time}


def recipe_of(work: Path, cell: Cell, known: dict[str, Shape | str], tokens: int) -> Path:
    adapter = {"name": "lora"} if cell.adapter == "lora" else None
    path = work / f"{cell.model}-{cell.adapter}-{cell.rows}.yaml".replace(" ", "-")
    return write_recipe(path, known[cell.model], Work(cell.rows * 4, tokens), adapter)


def settings_of(cell: Cell) -> list[str]:
    return [
        f"train.precision={cell.precision}",
        f"train.micro_batch_tokens={cell.micro_batch_tokens}",
        f"train.batch_size={cell.rows}",
    ]


def name_of(cell: Cell) -> str:
    return f"{cell.model}, {cell.adapter}, {cell.precision}, {cell.micro_batch_tokens} tokens"


def planned(recipe: Path, settings: list[str]) -> dict:
    command = [sys.executable, "-m", "finetune", "plan", recipe, "--json", *options(settings)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def trained(recipe: Path, run: Path, settings: list[str]) -> int:
    """Trains, and returns the process's peak memory."""
    command = [sys.executable, "-c", PEAK, "train", recipe, "--run", run, "--quiet", *options(settings)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return int(re.search(r"\d+\s*\Z", result.stdout)[0])


def options(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def table(name: str, rows: list[Row]) -> str:
    scale, unit = (1, "s") if name == "time" else (2**-20, "MiB")
    width = max(len(row.cell) for row in rows)
    lines = [f"{f'{name} ({unit})':{width}}{'forecast':>11}{'measured':>11}{'ratio':>8}"]
    for row in rows:
        parts = ", ".join(f"{part} {value * scale:.4g}" for part, value in row.parts.items() if value)
        figures = f"{row.forecast * scale:11.1f}{row.measured * scale:11.1f}{row.ratio:8.2f}"
        lines.append(f"{row.cell:{width}}{figures}   {parts}")
    worst = max(abs(row.ratio - 1) for row in rows)
    verdict = "reached" if worst <= LIMITS[name] else "MISSED"
    return "\n".join([*lines, f"{verdict}: off by {worst:.0%} at most (goal {LIMITS[name]:.0%})"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where runs are written")
    parser.add_argument("--only", default=",".join(PARTS), help="some of the parts")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    parser.add_argument("--tiny", action="store_true", help="one cell of each on a tiny model")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {"machine": machine.facts(chosen.work)}
    print(json.dumps(report["machine"], indent=1))
    for name in chosen.only.split(","):
        with tempfile.TemporaryDirectory(prefix=f"forecast-{name}-", dir=chosen.work) as work:
            rows = list(PARTS[name](Path(work), chosen.tiny))
        print(f"\n{table(name, rows)}", flush=True)
        report[name] = [row._asdict() | {"ratio": row.ratio} for row in rows]
        if chosen.json:
            chosen.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
