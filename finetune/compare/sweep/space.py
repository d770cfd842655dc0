"""The settings that a sweep tries: lists and ranges of `--set`, and the trials that a grid or a random search makes of them.

Pure functions of the space, the seed and a trial's number: a sweep that goes on after a kill makes the same trials.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import blake3

from finetune.errors import Problem, RecipeError
from finetune.recipe.yaml_nodes import NUMBER, Plain, parse, plain

Settings = dict[str, Plain]
"""A value for each key of the space, by its dotted name."""

DIGITS = 4  # of a number that is drawn: more would not be read, and decide nothing
MOST_DRAWS = 100  # for each trial: a short range of whole numbers may not have enough
_RANGE = re.compile(r"(log|uniform|int)\(([^,()]*),([^,()]*)\)")
_FORMS = "give values like `[8, 16]`, or a range: `log(1e-5, 1e-3)`, `uniform(0, 0.1)` or `int(4, 64)`"


@dataclass(frozen=True)
class Values:
    """A list: each is tried."""

    values: tuple[Plain, ...]

    def at(self, place: float) -> Plain:
        return self.values[int(place * len(self.values))]

    @property
    def ends(self) -> tuple[Plain, ...]:
        """What has to be right for all to be right."""
        return self.values

    @property
    def record(self) -> Plain:
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`: `uniform` and `log` draw any, `int` whole ones."""

    kind: str
    low: float
    high: float

    def at(self, place: float) -> Plain:
        """The number at a place from 0 (the low end) to 1."""
        if self.kind == "int":
            return int(self.low) + int(place * (self.high - self.low + 1))
        low, high = (math.log(end) if self.kind == "log" else end for end in (self.low, self.high))
        at = low + place * (high - low)
        return self.rounded(math.exp(at) if self.kind == "log" else at)

    def rounded(self, value: float) -> float:
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    @property
    def ends(self) -> tuple[Plain, ...]:
        return (int(self.low), int(self.high)) if self.kind == "int" else (self.low, self.high)

    @property
    def record(self) -> Plain:
        return f"{self.kind}({self.ends[0]}, {self.ends[1]})"


Axis = Values | Range
Space = dict[str, Axis]


def space_of(overrides: Sequence[str]) -> tuple[Space, list[Problem]]:
    """The axes of `--set KEY=…`, and what is wrong with them. A single value is a list of one."""
    space: Space = {}
    problems: list[Problem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not text.strip():
            problems.append(Problem("--set", "", f"`{override}` is not like `optimizer.learning_rate=[1e-4, 2e-4]`"))
        elif key in space:
            problems.append(Problem("--set", key, "is set twice", "put all values into one list"))
        else:
            try:
                space[key] = _axis(key, text)
            except RecipeError as error:
                problems += error.problems
    return space, problems


def axis_of(record: Plain) -> Axis:
    """The axis with this record."""
    return Values(tuple(record)) if isinstance(record, list) else _range("", cast(str, record))


def _axis(key: str, text: str) -> Axis:
    if re.match(r"\s*\w+\(", text):
        return _range(key, text.strip())
    root = parse(text, "--set", key).root
    value = plain(root, {}) if root else None
    if not isinstance(value, list):
        return Values((value,))
    if not value:
        raise RecipeError([Problem("--set", key, "has no value in its list", _FORMS)])
    if repeated := next((one for place, one in enumerate(value) if _is_in(one, value[:place])), None):
        raise RecipeError([Problem("--set", key, f"`{written(repeated)}` is in the list twice", "keep one of them")])
    return Values(tuple(value))


def _is_in(value: Plain, others: Sequence[Plain]) -> bool:
    """As JSON: `1` and `true` are equal in Python."""
    return json.dumps(value) in map(json.dumps, others)


def _range(key: str, text: str) -> Range:
    match = _RANGE.fullmatch(text)
    ends = [end.strip() for end in match.groups()[1:]] if match else []
    if not match or not all(NUMBER.fullmatch(end) for end in ends):
        raise RecipeError([Problem("--set", key, f"`{text}` is no range", _FORMS)])
    found = Range(match[1], *map(float, ends))
    wrong = None
    if not found.low < found.high < math.inf:
        wrong = "has a low end that is not below its high end"
    elif found.kind == "log" and found.low <= 0:
        wrong = "has no logarithm at its low end: it must be above 0"
    elif found.kind == "int" and not all(end.is_integer() for end in (found.low, found.high)):
        wrong = "has an end that is not whole"
    if wrong:
        raise RecipeError([Problem("--set", key, f"`{text}` {wrong}")])
    return found


def size(space: Space) -> int | None:
    """The number of combinations; None with a range."""
    if any(isinstance(axis, Range) for axis in space.values()):
        return None
    return math.prod(len(axis.values) for axis in space.values() if isinstance(axis, Values))


def grid(space: Mapping[str, Axis]) -> list[Settings]:
    """Every combination; the last key changes fastest."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*(a.ends for a in space.values()))]


def random(space: Space, trials: int, seed: int) -> list[Settings]:
    """The first trials of a random search, all different. More trials begin with the same ones."""
    if size(space) is not None:  # a shuffled grid: draws would miss its last combinations for long
        return sorted(grid(space), key=lambda settings: _uniform(f"{seed}/{json.dumps(settings)}"))[:trials]
    found: dict[str, Settings] = {}
    for number in itertools.count():
        settings = {key: axis.at(_uniform(f"{seed}/{number}/{key}")) for key, axis in space.items()}
        found.setdefault(json.dumps(settings), settings)
        if len(found) == trials or number == MOST_DRAWS * trials:
            break
    return list(found.values())


def _uniform(name: str) -> float:
    """A number from 0 to below 1, decided by a name."""
    return int.from_bytes(blake3.blake3(name.encode()).digest()[:6], "big") / 2**48


def corners(space: Space) -> Iterator[Settings]:
    """Settings that show whether the space is right: each value and each end of a range, one key after the other."""
    first = {key: axis.ends[0] for key, axis in space.items()}
    yield first
    for key, axis in space.items():
        for end in axis.ends[1:]:
            yield {**first, key: end}


def arguments(settings: Mapping[str, Plain]) -> list[str]:
    """The settings as `train --set` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def written(value: Plain) -> str:
    """A value for a reader."""
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def told(settings: Mapping[str, Plain], tried: Sequence[str]) -> str:
    """The settings in which trials differ, for a reader: `learning_rate=0.0001 rank=8`."""
    return " ".join(f"{short(key, tried)}={written(settings[key])}" for key in tried)


def short(key: str, keys: Sequence[str]) -> str:
    """The last part of a key, where that names it among the others."""
    last = key.rpartition(".")[2]
    return last if sum(each.rpartition(".")[2] == last for each in keys) == 1 else key
