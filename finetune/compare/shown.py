"""What `compare --json` prints."""

from typing import Literal, NotRequired, TypedDict

from finetune.compare.origins import Cost, Entry
from finetune.plan.statistics.judge import Better, Interval, Verdict


class Result(Cost):
    """A ref with its figure."""

    ref: str
    value: float
    interval: Interval | None
    """Of 95 %; None with fewer than six rows, or with rows that are NaN or infinite."""
    unpaired_rows: int
    """Rows that another ref lacks: they do not count here."""
    not_finite_rows: int
    """Rows that are NaN or infinite for this ref and not for all."""


class ChangedRow(TypedDict):
    """A row whose figure differs much between two refs."""

    row: int
    a: float
    b: float
    tokens: int
    text: str | None
    """None where the file is gone."""
    answer_a: NotRequired[str]
    answer_b: NotRequired[str]


class Pair(TypedDict):
    """A ref `b` against the baseline `a`."""

    a: str
    b: str
    difference: float
    """Of b to a."""
    interval: Interval | None
    interval_of_all: Interval | None
    """It holds for all pairs at once, and so for the one that you choose."""
    p_value: float | None
    p_corrected: float | None
    """Corrected for the number of pairs (Holm)."""
    smallest: float | None
    """The smallest difference that these rows find in four of five cases, with so many pairs."""
    verdict: Verdict | None
    """Of b against a; None where nothing can be said."""
    won: int
    """Rows, or clusters of rows, in which b is better than a."""
    lost: int
    recipe: list[Entry]
    """Recipe keys that differ."""
    changed: list[ChangedRow]


class Comparison(TypedDict):
    metric: str
    better: Better
    per: Literal["tokens", "rows"]
    set: str
    rows: int
    """Different rows that all refs have."""
    tokens: int
    cluster: str | None
    clusters: int | None
    margin: float | None
    baseline: str
    results: list[Result]
    pairs: list[Pair]
    best: str
    """The best of the refs that are better than the baseline; the baseline where none is."""
    leaders: list[str]
    """The refs that cannot be told from the one with the best value."""
    notes: list[str]
