"""Runs that nobody trained: a plan of an older run, and a journal as a test wants it."""

import json
import math
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from finetune.store.run.directory import RunDirectory

OLDER = Path(__file__).parents[1] / "fixtures/older_run/runs/older"
BEGIN = datetime(2026, 11, 1, tzinfo=UTC)


def made(run: Path, steps: int, lines: Iterable[str] = (), **recipe: dict) -> Path:
    """A run of so many planned steps. `recipe` changes its sections."""
    run.mkdir(parents=True)
    plan, facts = RunDirectory(OLDER).plan()
    sections = {name: getattr(plan.recipe, name).model_copy(update=keys) for name, keys in recipe.items()}
    whole = plan.recipe.model_copy(update=sections)
    own = plan.model_copy(update={"steps": steps, "segments": (), "recipe": whole})
    (run / "plan.json").write_bytes(own.dump({**facts, "run": f"id of {run.name}"}))
    shutil.copy(OLDER / "recipe.yaml", run)
    write(run, lines)
    return run


def write(run: Path, lines: Iterable[str]) -> None:
    """Appends to the journal."""
    with (run / "journal.jsonl").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def step(number: int, loss: float | str, attempt: str = "one", **figures: object) -> str:
    time = (BEGIN + timedelta(seconds=number)).isoformat(timespec="milliseconds")
    record = {"kind": "step", "step": number, "loss": loss, "grad_norm": 1.0, "learning_rate": 0.001, "tokens": 100}
    about = {"supervised_tokens": 60, "seconds": 0.5, "await_seconds": 0.0, "attempt": attempt, "time": time}
    return json.dumps({**record, **about, **figures})


def event(name: str, attempt: str = "one", at: float = 0, **figures: object) -> str:
    time = (BEGIN + timedelta(seconds=at)).isoformat(timespec="milliseconds")
    return json.dumps({"kind": "event", "event": name, "attempt": attempt, "time": time, **figures})


def evaluated(number: int, loss: float, **others: float) -> str:
    return event("evaluated", step=number, loss=loss, rows=20, tokens=900, loss_stderr=0.05, at=number, **others)


def committed(number: int) -> str:
    return event("committed", step=number, newest_step=number, bytes=1000, at=number)


def whole(run: Path, steps: int, rate: float = 1.0, **recipe: dict) -> Path:
    """A run that ended well: evaluated and committed four times."""
    lines = [event("started", step=0), evaluated(0, 3.0)]
    for number in range(1, steps + 1):
        lines.append(step(number, 1 + 2 * math.exp(-rate * number / steps) + 0.1 * math.sin(number)))
        if number % max(1, steps // 4) == 0:
            lines += [evaluated(number, 1 + 2 * math.exp(-rate * number / steps)), committed(number)]
    return made(run, steps, lines, **recipe)
