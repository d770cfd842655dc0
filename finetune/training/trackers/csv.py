"""`figures.csv` in the run directory: one line a step, the held-out loss beside it where the step was evaluated."""

import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

from finetune.training.trackers.tracker import Start

COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "seconds", "held_out_loss")
_END = "\r\n"  # of a line (RFC 4180); numbers need no quotes
_HEADING = ",".join(COLUMNS) + _END


class Table:
    """A step's line is written with its update, and again with its evaluation, so a kill between steps loses neither."""

    had = None

    def __init__(self, path: Path):
        self.place = str(path)
        self._path = path
        self._line: dict[str, str] = {}
        self._file: FileIO | None = None

    def back_to(self, step: int) -> None:
        """The table up to a step, to add to."""
        lines = _lines(self._path, step)
        text = _HEADING + "".join(lines)
        beside = self._path.with_suffix(".csv.new")
        beside.write_text(text, encoding="utf-8", newline="")
        # In one rename: a kill here must not cost the table.
        os.replace(beside, self._path)
        self.finish()
        # Unbuffered, so that a kill loses no line.
        self._file = FileIO(self._path, "ab")
        last = lines[-1] if lines else _HEADING
        self._begins = len(text.encode()) - len(last.encode())
        self._line = dict(zip(COLUMNS, last.removesuffix(_END).split(","), strict=True))

    def log(self, step: int, figures: Mapping[str, float], time: float) -> None:
        if step == 0 or self._file is None:  # of which there is no update that the figures could stand beside
            return
        if str(step) != self._line["step"]:
            self._line = {"step": str(step)}
            self._begins = self._file.seek(0, os.SEEK_END)
        self._line |= {name: str(value) for name, value in figures.items()}
        self._file.truncate(self._begins)
        self._file.write((",".join(self._line.get(name, "") for name in COLUMNS) + _END).encode())

    def note(self, step: int, kind: str, text: str, time: float) -> None:
        """A table of figures has no place for it."""

    def flush(self) -> None:
        """Every line is written at once."""

    def finish(self) -> None:
        if self._file:
            self._file.close()


def start(about: Start) -> Table:
    return Table(about.run.figures)


def _lines(path: Path, step: int) -> list[str]:
    """The lines up to a step, without one that a kill cut short."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as old:
        return [line for line in old if _is_kept(line, step)]


def _is_kept(line: str, step: int) -> bool:
    number = line.partition(",")[0]
    return line.endswith(_END) and line.count(",") == len(COLUMNS) - 1 and number.isdecimal() and int(number) <= step
