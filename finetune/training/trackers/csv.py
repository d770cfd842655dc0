"""`figures.csv` in the run directory: one line a step, the held-out loss beside it where the step was evaluated."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path

from finetune.training.trackers.tracker import Start

COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "seconds", "held_out_loss")


class Table:
    """The line of the newest step is held back until the next one begins: its evaluation comes after its update."""

    def __init__(self, path: Path, every: int, step: int):
        self._every = every
        _cut(path, step)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS, extrasaction="ignore")
        if self._file.tell() == 0:
            self._writer.writeheader()
        self._line: dict[str, float] = {}

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if self._line and self._line["step"] != step:
            self._write()
        self._line |= {"step": step, **figures}

    def finish(self) -> None:
        try:
            if self._line:
                self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        line, self._line = self._line, {}
        if "held_out_loss" in line or line["step"] % self._every == 0:
            self._writer.writerow(line)
            self._file.flush()


def start(about: Start) -> Table:
    settings = about.plan.recipe.trackers.csv
    every = settings.every.steps if settings and settings.every else None
    return Table(about.run.figures, every or 1, about.step)


def _cut(path: Path, step: int) -> None:
    """Takes off the lines of later steps, which run again, and one that a kill cut short."""
    if not path.exists():
        return
    beside = path.with_suffix(".csv.new")
    with (
        path.open(newline="", encoding="utf-8", errors="replace") as old,
        beside.open("w", newline="", encoding="utf-8") as new,
    ):
        writer = csv.DictWriter(new, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for line in csv.DictReader(old):
            if line.get(COLUMNS[-1]) is not None and line["step"].isdecimal() and int(line["step"]) <= step:
                writer.writerow({name: line[name] for name in COLUMNS})
    os.replace(beside, path)
