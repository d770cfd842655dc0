"""`figures.csv` in the run directory: one line a step, the held-out loss beside it where the step was evaluated."""

import os
from collections.abc import Mapping
from pathlib import Path

from finetune.training.trackers.tracker import Start

COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "seconds", "held_out_loss")
_END = "\r\n"  # of a line (RFC 4180); numbers need no quotes
_HEADING = ",".join(COLUMNS) + _END


class Table:
    """A step's line is written with its update, and again with its evaluation, so a kill between steps loses neither."""

    def __init__(self, path: Path, every: int, step: int):
        self._path, self._every = path, every
        self._line: dict[str, float] = {"step": step}
        self._open(step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if step < self._line["step"]:  # A rollback: the steps after it run again.
            self._file.close()
            self._open(step - 1)
        if step != self._line["step"]:
            self._line = {"step": step}
            self._begins = self._file.seek(0, os.SEEK_END)
        self._line |= figures
        if "held_out_loss" in self._line or step % self._every == 0:
            self._file.truncate(self._begins)
            self._file.write(_text(self._line))

    def finish(self) -> None:
        self._file.close()

    def _open(self, step: int) -> None:
        """The table up to a step, to add to."""
        _cut(self._path, step)
        # Unbuffered, so that a kill loses no line.
        self._file = self._path.open("ab", buffering=0)
        self._begins = self._file.seek(0, os.SEEK_END)


def start(about: Start) -> Table:
    settings = about.plan.recipe.trackers.csv
    every = settings.every.steps if settings and settings.every else None
    return Table(about.run.figures, every or 1, about.step)


def _cut(path: Path, step: int) -> None:
    """Makes the table where it is not there, and takes off the lines of later steps and one that a kill cut short."""
    lines = ""
    if path.exists():
        with path.open(newline="", encoding="utf-8", errors="replace") as old:
            lines = "".join(line for line in old if _is_kept(line, step))
    beside = path.with_suffix(".csv.new")
    beside.write_text(_HEADING + lines, encoding="utf-8", newline="")
    # In one rename: a kill here must not cost the table.
    os.replace(beside, path)


def _is_kept(line: str, step: int) -> bool:
    number = line.partition(",")[0]
    return line.endswith(_END) and line.count(",") == len(COLUMNS) - 1 and number.isdecimal() and int(number) <= step


def _text(line: Mapping[str, float]) -> bytes:
    return (",".join(str(line.get(name, "")) for name in COLUMNS) + _END).encode()
