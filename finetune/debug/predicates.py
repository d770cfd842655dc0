"""The meaning of "bad" in a search: a comparison with a recorded or evaluated figure, or a command's exit code."""

import math
import operator
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from finetune.errors import FinetuneError
from finetune.store.run import row_losses
from finetune.store.run.records import Record, is_number

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON = re.compile(
    r"\s*(?P<quantity>[A-Za-z_][\w./]*)\s*(~\s*(?P<span>\d+))?\s*(?P<operator>>=|<=|>|<)\s*(?P<limit>\S+)\s*"
)
OF_ROWS = {"row_loss": max, "row_loss_min": min}  # over the rows of a step
SKIP_CODE, FIRST_ABORT_CODE = 125, 128  # as in `git bisect run`


class PredicateError(FinetuneError):
    """A predicate with bad syntax, or without a recorded quantity."""

    code = "predicate"
    exit_code = 2


class Comparison(NamedTuple):
    """`loss > 4`, `grad_norm/layers.3 > 1`, or `loss~20 > 4`: the mean over the last 20 steps."""

    quantity: str
    span: int
    operator: str
    limit: float

    def holds(self, value: float) -> bool:
        """NaN and infinity are always bad: no comparison may hide them."""
        return not math.isfinite(value) or OPERATORS[self.operator](value, self.limit)

    def __str__(self) -> str:
        smoothed = f"~{self.span}" if self.span > 1 else ""
        return f"{self.quantity}{smoothed} {self.operator} {self.limit:g}"


def parse(text: str) -> Comparison:
    match = _COMPARISON.fullmatch(text)
    hint = "write it like 'loss > 4', 'grad_norm/layers.3 > 1' or, over the mean of 20 steps, 'loss~20 > 4'"
    if match is None or (limit := _number(match["limit"])) is None:
        raise PredicateError(f"`{text}` is not a comparison", hint=hint)
    span = int(match["span"] or 1)
    if span < 1:
        raise PredicateError(f"`{text}`: a mean is over one step or more", hint=hint)
    return Comparison(match["quantity"], span, match["operator"], limit)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def recorded(run: Path, steps: Mapping[int, Record], comparison: Comparison) -> dict[int, float]:
    """The quantity by step, for every step with a record of it; smoothed ones are means over the steps up to it."""
    name, _, module = comparison.quantity.partition("/")
    reader = row_losses.Reader(run)
    found: Mapping[int, object]
    if module:
        found = {step: reader.modules(step).get(module) if name == "grad_norm" else None for step in sorted(steps)}
    elif name in OF_ROWS:
        found = {step: OF_ROWS[name]((row.loss for row in reader.rows(step)), default=None) for step in sorted(steps)}
    else:
        found = {step: record.get(name) for step, record in steps.items()}
    values = {step: float(value) for step, value in found.items() if is_number(value)}
    if not values:
        known = sorted(
            {name for record in steps.values() for name, value in record.items() if is_number(value)} - {"step"}
        )
        hint = f"recorded are {', '.join(known)}, row_loss, row_loss_min and grad_norm/MODULE"
        raise PredicateError(f"`{comparison.quantity}` was not recorded", where=str(run), hint=hint)
    order = sorted(values)
    return {
        step: _mean([values[each] for each in order[max(0, place + 1 - comparison.span) : place + 1]])
        for place, step in enumerate(order)
    }


def run_command(command: str, checkpoint: Path) -> bool | None:
    """Whether a command calls a checkpoint bad; None if it cannot tell. Raises FinetuneError if it ends the search."""
    words = [word.replace("{checkpoint}", str(checkpoint)) for word in shlex.split(command)]
    try:
        code = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=2, check=False).returncode
    except OSError as error:
        raise PredicateError(f"cannot start `{words[0]}`: {error.strerror}") from error
    if code < 0 or code >= FIRST_ABORT_CODE:
        raise FinetuneError(f"`{command}` ended with {code}, which ends the search", where=str(checkpoint))
    return None if code == SKIP_CODE else code != 0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
