"""Draws lines and points as text: eight braille dots a cell, or one sign. It knows nothing of runs.

Our own, because of the libraries plotille has no ASCII and draws point by point, and plotext keeps one global figure and ships a
compiled kernel.
"""

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import click
import numpy as np

COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta", "bright_yellow")
SIGNS = "abcdefghijklmnopqrstuvwxyz"
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # of a cell's four rows and two columns
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Line:
    x: np.ndarray
    """Ascending."""
    y: np.ndarray
    """A gap where it is not finite."""
    style: int
    """Its place in the legend."""
    are_points: bool = False


@dataclass(frozen=True)
class Look:
    width: int
    """Columns of a whole panel."""
    height: int
    """Rows of its lines, without title and axis."""
    is_ascii: bool = False
    is_colored: bool = False
    has_signs: bool = False
    """A sign for each style instead of dots: without colors they tell styles apart."""

    def styled(self, text: str, style: int | None) -> str:
        return click.style(text, fg=COLORS[style % len(COLORS)]) if self.is_colored and style is not None else text

    def mark(self, style: int, are_points: bool = False) -> str:
        """What a legend shows of a style."""
        if self.has_signs:
            sign = SIGNS[style % len(SIGNS)]
            return sign.upper() if are_points else sign
        return self.styled(("o" if self.is_ascii else "●") if are_points else ("-" if self.is_ascii else "━"), style)


@dataclass
class _Cells:
    """The signs of a panel, and the style of each."""

    look: Look
    columns: int
    signs: np.ndarray = field(init=False)
    styles: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.signs = np.full((self.look.height, self.columns), " ", dtype="U1")
        self.styles = np.full((self.look.height, self.columns), -1)

    def rows(self) -> Iterator[str]:
        for signs, styles in zip(self.signs, self.styles, strict=True):
            yield "".join(
                self.look.styled(sign, int(style)) if style >= 0 else sign
                for sign, style in zip(signs, styles, strict=True)
            )


def panel(title: str, lines: Sequence[Line], look: Look, unit: str) -> list[str]:
    """A title, the lines, and an axis below; every row has `look.width` columns. `unit` is that of the x axis."""
    drawn = [line for line in lines if np.isfinite(line.y).any()]
    if not drawn:
        return _padded(title, ["", "nothing recorded yet", ""], look)
    left, right = _range(drawn, "x")
    low, high = _range(drawn, "y")
    margin = max(len(number(each)) for each in _ticks(low, high, look.height)) + 2
    cells = _Cells(look, look.width - margin - 1)
    for line in sorted(drawn, key=lambda each: each.are_points):
        _draw(cells, line, (left, right, low, high))
    ticks = {_place(low, high, each, look.height): number(each) for each in _ticks(low, high, look.height)}
    bar, corner, floor, notch = ("|", "+", "-", "+") if look.is_ascii else ("┤", "└", "─", "┬")
    side = "|" if look.is_ascii else "│"
    body = [
        f"{ticks.get(row, ''):>{margin - 1}} {bar if row in ticks else side}{text}"
        for row, text in enumerate(cells.rows())
    ]
    names, marks = _below(left, right, cells.columns, unit)
    axis = " " * margin + corner + "".join(notch if place in marks else floor for place in range(cells.columns))
    return _padded(title, [*body, axis, " " * (margin + 1) + names], look)


def _padded(title: str, rows: list[str], look: Look) -> list[str]:
    rows = [*textwrap.wrap(title, look.width), *rows]
    return [row + " " * max(0, look.width - len(click.unstyle(row))) for row in rows]


def _range(lines: Sequence[Line], name: str) -> tuple[float, float]:
    """The least and the greatest number that is drawn; never the same one."""
    values = np.concatenate([getattr(line, name)[np.isfinite(line.y)] for line in lines])
    low, high = float(values.min()), float(values.max())
    if high > low:
        return low, high
    room = abs(low) * 0.1 or 1.0
    return (low, low + 1.0) if name == "x" else (low - room, high + room)


def _place(low: float, high: float, value: float | np.ndarray, count: int) -> "int | np.ndarray":
    """The row of a value, from the top."""
    places = np.rint((high - value) / (high - low) * (count - 1)).astype(int)
    return int(places) if np.ndim(places) == 0 else places


def _draw(cells: _Cells, line: Line, box: tuple[float, float, float, float]) -> None:
    look, (left, right, low, high) = cells.look, box
    across, down = (1, 1) if look.has_signs or line.are_points or look.is_ascii else (2, 4)
    finite = np.isfinite(line.y)
    columns = np.rint((line.x[finite] - left) / (right - left) * (cells.columns * across - 1)).astype(int)
    rows = np.asarray(_place(low, high, line.y[finite], look.height * down))
    grid = np.zeros((look.height * down, cells.columns * across), dtype=bool)
    if line.are_points:
        grid[rows, columns] = True
    else:
        _trace(grid, columns, rows, np.cumsum(~finite)[finite])
    if down == 1:
        sign = look.mark(line.style, line.are_points) if look.has_signs else "o" if line.are_points else "*"
        cells.signs[grid] = "●" if line.are_points and not (look.is_ascii or look.has_signs) else sign
        cells.styles[grid] = line.style
        return
    dots = (grid.reshape(look.height, 4, cells.columns, 2) * _DOTS[:, None, :]).sum(axis=(1, 3))
    before = np.array([[ord(sign) - 0x2800 if sign >= "\u2800" else 0 for sign in row] for row in cells.signs])
    for row, column in np.argwhere(dots):
        cells.signs[row, column] = chr(0x2800 + int(dots[row, column] | before[row, column]))
        cells.styles[row, column] = line.style


def _trace(grid: np.ndarray, columns: np.ndarray, rows: np.ndarray, pieces: np.ndarray) -> None:
    """A line through points in order of their columns. In each column everything from its highest to its lowest point is drawn, so that
    no point gets lost; points of two pieces are not connected."""
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    ends = np.append(starts[1:], len(columns)) - 1
    tops, bottoms = np.minimum.reduceat(rows, starts), np.maximum.reduceat(rows, starts)
    for column, top, bottom in zip(columns[starts], tops, bottoms, strict=True):
        grid[top : bottom + 1, column] = True
    for last, first in zip(ends[:-1], starts[1:], strict=True):
        if pieces[last] == pieces[first]:
            count = max(abs(columns[first] - columns[last]), abs(rows[first] - rows[last])) + 1
            across = np.rint(np.linspace(columns[last], columns[first], count)).astype(int)
            grid[np.rint(np.linspace(rows[last], rows[first], count)).astype(int), across] = True


def _ticks(low: float, high: float, rows: int) -> list[float]:
    """Round numbers between two, at most one for two rows."""
    size = (high - low) / max(1, min(6, rows // 2))
    power = 10.0 ** math.floor(math.log10(size))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= size * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    found = [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]
    return found or [high]


def _below(left: float, right: float, columns: int, unit: str) -> tuple[str, set[int]]:
    """The numbers under an axis with its unit at the end, and the columns of their notches."""
    text, marks = [" "] * columns, set()
    room = columns - len(unit) - 1
    for tick in _ticks(left, right, max(3, columns // 5)):
        name = number(tick)
        place = round((tick - left) / (right - left) * (columns - 1))
        start = max(0, min(place - len(name) // 2, columns - len(name)))
        marks.add(place)
        if start + len(name) <= room and not "".join(text[max(0, start - 1) : start + len(name) + 1]).strip():
            text[start : start + len(name)] = name
    text[columns - len(unit) :] = unit
    return "".join(text), marks


def number(value: float) -> str:
    """At most four digits, with k, M, G or T after large numbers."""
    if not math.isfinite(value):
        return str(value)
    for size, prefix in _PREFIXES:
        if abs(value) >= size * 10 or (abs(value) >= size and value % size == 0):
            return f"{value / size:.4g}{prefix}"
    return f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.2e}"


def printable(text: str) -> str:
    """Without what would move the cursor, change colors, or not be seen."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)
