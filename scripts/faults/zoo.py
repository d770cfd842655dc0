"""Faults of all kinds, put into a small but real training at a step drawn by a seed; whether `bisect` names the step, and of data the row.

    python scripts/faults/zoo.py --work DIR [--seeds 1] [--only NAME,...] [--stride 1]

The base is a Llama of two layers that was trained on the standard library's docstrings, so that rows which are no prose stand out. A run has
64 steps and 8 checkpoints. A fault is in a row of the data, in the code that trains (not in the code that bisects), or in both.
Prints a table; exit code 1 unless all but one in twenty are named, within log2(checkpoints) + log2(interval) + 2 evaluations.
"""

import argparse
import ast
import contextlib
import json
import random
import sys
import sysconfig
import time
from dataclasses import dataclass
from math import log2
from pathlib import Path

import torch
from training import tiny_base
from zoo_faults import BATCH, FAULTS, ROWS, STEPS, edited

from finetune.debug.bisect import bisect
from finetune.errors import FinetuneError
from finetune.plan.row_order import Order
from finetune.recipe.load import load
from finetune.store.run import journal, row_losses
from finetune.training.run import train

EVERY, LENGTH = 8, 96
MOST = log2(STEPS / EVERY) + log2(EVERY) + 2
TRAINED_ON = 2_000


def texts() -> list[str]:
    """Docstrings of the standard library, a paragraph each, short enough for a row."""
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                paragraph = " ".join(text.split("\n\n")[0].split())
                if 30 <= len(paragraph) < LENGTH - 4 and paragraph.isascii():
                    found.append(paragraph)
    return list(dict.fromkeys(found))


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def recipe(path: Path, base: Path, data: Path, holdout: Path, steps: int, sections: dict) -> Path:
    parts = {
        "base": {"checkpoint": str(base)},
        "task": {"name": "text", "max_length": LENGTH},
        "data": {"train": [{"path": str(data)}], "holdout": [{"path": str(holdout)}]},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "warmup": 0},
        "train": {"steps": steps, "batch_size": BATCH, "precision": "fp32", "micro_batch_tokens": 512},
        "checkpoint": {"every": f"{EVERY} steps", "keep": {"last": 100}},
        "guard": {"spike": "ignore"},
    } | sections
    path.write_text("".join(f"{name}: {json.dumps(section)}\n" for name, section in parts.items()))
    return path


def trained_base(work: Path, rows: list[str]) -> Path:
    """A random base, trained on docstrings until prose is what it expects."""
    tiny_base(work / "random", hidden=64, positions=1024)
    data, holdout = write(work / "prose.jsonl", rows[:TRAINED_ON]), write(work / "holdout.jsonl", rows[-40:])
    sections = {
        "optimizer": {"learning_rate": 5e-3},
        "train": {"steps": 600, "batch_size": 16, "precision": "fp32", "micro_batch_tokens": 2048},
        "checkpoint": {"every": "600 steps"},
    }
    path = recipe(work / "base.yaml", work / "random", data, holdout, 600, sections)
    train(load(path), work / "base-run", is_quiet=True)
    return work / "base-run/checkpoints/step-00000600"


def figures_of(run: Path) -> dict:
    """The extremes of a sound run."""
    records = journal.steps(journal.read(run))
    rows = [row.loss for step in records for row in row_losses.read_rows(run, step)]
    found = {name: max(record[name] for record in records.values()) for name in ("loss", "grad_norm", "tokens")}
    evaluated = journal.evaluations(journal.read(run))
    return found | {
        "row_loss": max(rows),
        "row_loss_min": min(rows),
        "start": max(each["loss"] for each in evaluated.values()),
    }


@dataclass(frozen=True)
class Sound:
    """The training that every fault is put into."""

    work: Path
    base: Path
    rows: list[str]
    figures: dict


def attempt(name: str, seed: int, sound: Sound) -> tuple[bool, str]:
    """Whether a fault was named, and what was said."""
    fault, draw = FAULTS[name], random.Random(f"{name}/{seed}")
    step = draw.randrange(12, STEPS - 4)
    is_edited_later = fault.names_row and not fault.edit
    row = edited(step) if is_edited_later else int(draw.choice(list(Order(0, BATCH, (ROWS,)).examples_of(step))))
    changed = list(sound.rows)
    if fault.edit:
        changed[row] = fault.edit(changed[row], draw)
    place = sound.work / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    place.mkdir()
    data, holdout = write(place / "rows.jsonl", changed), sound.work / "holdout.jsonl"
    path = recipe(place / "recipe.yaml", sound.base, data, holdout, STEPS, fault.sections)
    patch = fault.patch(step) if fault.patch else contextlib.nullcontext()
    asked = fault.ask(sound.figures, step)
    with patch:
        with contextlib.suppress(FinetuneError):
            train(load(path), place / "run", is_quiet=True)
        facts = bisect(place / "run", **asked) if fault.stays else None
    facts = facts or bisect(place / "run", **asked)
    found, first = facts["first_bad_step"], facts["rows"][0]["id"] if facts["rows"] else None
    is_named = found == step and (not fault.names_row or first == row) and facts["evaluations"] <= MOST
    wanted = f"step {step}" + (f", row {row}" if fault.names_row else "")
    said = f"step {found}" + (f", row {first}" if first is not None else "")
    return is_named, f"{name:38} {wanted:18} {said} ({facts['cause']}, {facts['evaluations']} evaluations)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new directory")
    parser.add_argument("--seeds", type=int, default=1, help="how many steps to try for each fault")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(FAULTS))
    parser.add_argument("--stride", type=int, default=1, help="of these, every which")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work.resolve()
    work.mkdir(parents=True)
    rows = texts()
    base, started = trained_base(work, rows), time.monotonic()
    draw = random.Random(0)
    chosen = draw.sample(rows[:TRAINED_ON], ROWS)
    path = recipe(work / "sound.yaml", base, write(work / "sound.jsonl", chosen), work / "holdout.jsonl", STEPS, {})
    train(load(path), work / "sound", is_quiet=True)
    sound, named, lines = Sound(work, base, chosen, figures_of(work / "sound")), 0, []
    for name in options.only[:: options.stride]:
        for seed in range(options.seeds):
            is_named, line = attempt(name, seed, sound)
            named += is_named
            lines.append(f"{'ok    ' if is_named else 'MISSED'} {line}")
            print(lines[-1], flush=True)
    print(
        f"{named} of {len(lines)} faults named, in {time.monotonic() - started:.0f} s; at most {MOST:.0f} evaluations each"
    )
    is_enough = named >= len(lines) - len(lines) // 20
    print("PASS: " if is_enough else "FAIL: ", "bisect names what went wrong")
    return 0 if is_enough else 1


if __name__ == "__main__":
    sys.exit(main())
