"""The operators of one step in the steady state, by torch's profiler: ours, and the bare loop that is nearest to it."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cells
import processes

BARE = "bare-per-row"
STEPS = 4  # the last one is profiled
SHOWN = 15


def parts(work: Path, options: argparse.Namespace, measure: Callable[..., dict]) -> Iterator[tuple[str, list[dict]]]:
    """Each step as a list of its operators: name, seconds, calls, and the share of the step."""
    cell = cells.parse("full-512-bf16")
    prepared = cells.prepare(cell, STEPS, options.model, work / "profile", is_profiled=True)
    script, answer = Path(__file__).parent / "contenders" / "profiled.py", work / "profile" / "ours.answer"
    command = [sys.executable, script, prepared.recipe, work / "profile" / "run", answer]
    processes.run(command, options.environment, work / "profile" / "ours.log")
    yield "profile, finetune", shares(json.loads(answer.read_bytes())["operators"])
    yield f"profile, {BARE}", shares(measure(BARE, prepared, options)["operators"])


def shares(operators: list[dict]) -> list[dict]:
    """The most expensive operators with their share, and the rest as one."""
    total = sum(operator["seconds"] for operator in operators)
    kept, rest = operators[:SHOWN], operators[SHOWN:]
    others = {"name": f"{len(rest)} others", "seconds": sum(operator["seconds"] for operator in rest)}
    others["calls"] = sum(operator["calls"] for operator in rest)
    return [operator | {"share": operator["seconds"] / total} for operator in [*kept, others]]
