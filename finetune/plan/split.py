"""The held-out rows: a function of a row's content and a seed, independent of file, order and other rows.

A row's place is its content, hashed with the seed; rows up to a threshold are held out. New rows leave the others where they are, and
equal rows are on one side.
"""

import json
from collections.abc import Iterable
from fractions import Fraction
from hashlib import blake2b
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from finetune.plan.row_order import derive, permute
from finetune.recipe.schema import count_of

ALL = 2**64
PIECE = 1 << 20  # rows
BAD = 0
"""In place of the content of a row that was skipped as bad: it is on neither side."""

Word = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]  # 64 bits; as a JSON number it would lose digits in other tools


class Split(BaseModel):
    """The rule of a plan's held-out rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    seed: int
    threshold: Word | None = None
    """The last place that is held out."""
    contents: tuple[Word, ...] = ()
    """The rows one by one, where another run's rule knew them by their positions alone."""

    def holds_out(self, contents: np.ndarray) -> np.ndarray:
        """Which of these rows (`contents` uint64, bool out)."""
        if self.threshold is None:
            return np.isin(contents, words(self.contents))
        return places(contents, self.seed) <= np.uint64(int(self.threshold, 16))

    def is_within(self, other: "Split | None") -> bool:
        """Whether every row that this rule holds out, in whatever data, is held out by the other as well."""
        if other is None or self == other:
            return other is not None
        if self.threshold is None or other.threshold is None:
            return False
        return self.seed == other.seed and self.threshold <= other.threshold


def content_of(value: object) -> int:
    """64 bits that stand for what a task reads of a row."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return int.from_bytes(blake2b(canonical.encode(), digest_size=8).digest(), "little")


def places(contents: np.ndarray, seed: int) -> np.ndarray:
    """Where rows stand in the order that the seed makes of all possible ones (uint64); one to one."""
    first, second = (np.uint64(derive("split", seed, number)) for number in (0, 1))
    return _mix(_mix(contents ^ first) ^ second)


def _mix(words: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def draw(holdout: int | str, seed: int, sources: Iterable[np.ndarray]) -> Split:
    """The rule for a share, which looks at no row, or for a count: the place of the last of so many different rows."""
    if isinstance(holdout, str):
        last = int(Fraction(holdout[:-1]) / 100 * ALL) - 1
    else:
        last = int(_smallest(holdout, seed, sources)[-1])
    return Split(seed=seed, threshold=f"{max(last, 0):016x}")


def _smallest(count: int, seed: int, sources: Iterable[np.ndarray]) -> np.ndarray:
    """The `count` smallest different places, or all where there are fewer; a piece at a time is in memory."""
    kept = np.zeros(0, dtype=np.uint64)
    for contents in sources:
        for start in range(0, len(contents), PIECE):
            found = places(contents[start : start + PIECE], seed)
            kept = np.unique(np.concatenate([kept, found]))[:count]
    return kept


def held_out_rows(split: Split, sources: Iterable[np.ndarray]) -> np.ndarray:
    """The held-out rows (int64, sorted), counted through the sources; all copies of equal ones."""
    found, first = [np.zeros(0, dtype=np.int64)], 0
    for contents in sources:
        for start in range(0, len(contents), PIECE):
            some = split.holds_out(contents[start : start + PIECE])
            found.append(first + start + np.flatnonzero(some))
        first += len(contents)
    return np.concatenate(found)


def by_position(holdout: int | str, rows: int, seed: int) -> np.ndarray:
    """The rule of plans without a `Split`, which older versions made: rows (int64, sorted) by their places among so many, and `train.seed`."""
    return np.sort(permute(np.arange(count_of(holdout, rows)), rows, seed, "holdout"))


def words(texts: Iterable[str]) -> np.ndarray:
    return np.array([int(text, 16) for text in texts], dtype=np.uint64)


def texts(contents: np.ndarray) -> tuple[str, ...]:
    return tuple(f"{content:016x}" for content in np.unique(contents).tolist())


def digest(contents: np.ndarray) -> str:
    """Stands for a set of rows, in whatever order; with the same encoding, held-out figures of equal ones can be compared."""
    return "blake2b:" + blake2b(np.sort(contents).astype("<u8").tobytes(), digest_size=32).hexdigest()


class Seen(BaseModel):
    """What is known of held-out rows that some training had before: figures on them are better than on new rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    by: str
    """The run and the step up to which it trained; `this run` where it is the run's own."""
    rows: int | None
    """None where it cannot be found out."""
    why: str = ""

    def told(self, held_out: int) -> str:
        if self.rows is None:
            return f"whether {self.by} trained on held-out rows cannot be checked: {self.why}"
        return f"{self.rows:,} of {held_out:,} held-out rows are training rows of {self.by}"
