"""Scores of what a model answered to rows: exact match, ROUGE, regular expressions, JSON, and your own programs and functions."""

import json
import math
import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypedDict, cast

import blake3

from finetune.errors import FinetuneError, counted
from finetune.recipe.schema.metrics import Better, ExactMatch, Json, Metric, Program, Regex, Rouge
from finetune.store.evaluations import Measure
from finetune.store.strict_json import to_json

LAST_LINES = 5  # of a failed program's stderr


class Answered(TypedDict):
    """A row with the model's answer, as programs and functions get it."""

    row: int
    """Its number, counted through the sources of its set."""
    prompt: str
    answer: str
    expected: str
    """The answer in the row."""
    loss: float
    """Mean loss of the expected answer, in nats a token."""
    tokens: int
    """Supervised tokens of the row."""


Function = Callable[[Answered], float]
"""A metric of yours: a row with its answer to a number; more is better, unless it has an attribute `better = "lower"`."""
Score = Callable[[Sequence[Answered]], list[float]]


def scores(metrics: Sequence[Metric], rows: Sequence[Answered]) -> dict[str, list[float]]:
    """By the names of the metrics, a number for each row."""
    return {metric.name: _score_of(metric)(rows) for metric in metrics}


def measures(metrics: Sequence[Metric]) -> dict[str, Measure]:
    return {metric.name: {"per": "rows", "better": metric.better} for metric in metrics}


def definition(metrics: Sequence[Metric]) -> str:
    """All that decides the scores, with the content of the files that they name: of a program's arguments, those that are files."""
    told = []
    for metric in metrics:
        named = metric.program if isinstance(metric, Program) else [getattr(metric, "matches", None) or ""]
        files = [_content(Path(name)) for name in named if name and Path(name).is_file()]
        told.append([metric.model_dump(mode="json", exclude={"timeout_seconds"}), files])
    return json.dumps(told, sort_keys=True)


def of_function(function: Function, rows: Sequence[Answered]) -> list[float]:
    """Its bugs keep their traceback; FinetuneError where it gives something else than numbers."""
    return [_number(function(row), f"row {row['row']}", name_of(function)) for row in rows]


def name_of(function: Function) -> str:
    return getattr(function, "__name__", type(function).__name__)


def better_of(function: Function) -> Better:
    return "lower" if getattr(function, "better", None) == "lower" else "higher"


def _score_of(metric: Metric) -> Score:
    if isinstance(metric, Program):
        return partial(_program, metric)
    score = cast("Callable[[Metric], Callable[[str, str], float]]", SCORES[type(metric)])(metric)
    return lambda rows: [float(score(row["answer"], row["expected"])) for row in rows]


def _exact_match(metric: ExactMatch) -> Callable[[str, str], float]:
    return lambda answer, expected: answer.strip() == expected.strip()


def _rouge(metric: Rouge) -> Callable[[str, str], float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _lacking("rouge", "rouge-score") from None
    scorer = RougeScorer(["rougeL"])
    return lambda answer, expected: scorer.score(expected, answer)["rougeL"].fmeasure


def _regex(metric: Regex) -> Callable[[str, str], float]:
    pattern = re.compile(metric.pattern)

    def score(answer: str, expected: str) -> float:
        found = [*pattern.finditer(answer)]
        if not pattern.groups or not found:
            return bool(found)
        wanted = [*pattern.finditer(expected)]
        # a row's answer without the words around it is the group itself
        return found[-1][1] == (wanted[-1][1] if wanted else expected.strip())

    return score


def _json(metric: Json) -> Callable[[str, str], float]:
    validator = _validator(Path(metric.matches)) if metric.matches else None

    def score(answer: str, expected: str) -> float:
        try:
            value = json.loads(answer, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return False
        return validator is None or validator(value)

    return score


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is Python's, not JSON's")


def _validator(file: Path) -> Callable[[object], bool]:
    try:
        from jsonschema import exceptions, validators
    except ImportError:
        raise _lacking("json", "jsonschema") from None
    try:
        schema = json.loads(file.read_bytes())
        kind = validators.validator_for(schema)
        kind.check_schema(schema)
    except (OSError, ValueError, exceptions.SchemaError) as error:
        reason = str(error).partition("\n")[0]
        raise FinetuneError(f"is no JSON Schema: {reason}", where=str(file), hint="fix the file") from None
    return cast("Callable[[object], bool]", kind(schema).is_valid)


SCORES: dict[type, Callable[..., Callable[[str, str], float]]] = {
    ExactMatch: _exact_match,
    Rouge: _rouge,
    Regex: _regex,
    Json: _json,
}


def _program(metric: Program, rows: Sequence[Answered]) -> list[float]:
    """One number a line of stdout, in the order of the rows. FinetuneError with its stderr where it fails, is late, or writes others."""
    lines = "".join(f"{to_json(row)}\n" for row in rows)
    pipe = subprocess.PIPE
    try:
        # in a session of its own, so that what it starts ends with it
        process = subprocess.Popen(metric.program, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
    except OSError as error:
        raise _refuse(metric, f"cannot be started: {(error.strerror or str(error)).lower()}") from None
    with process:
        try:
            out, err = process.communicate(lines.encode(), timeout=metric.timeout_seconds)
        except subprocess.TimeoutExpired as late:
            message = f"took more than {metric.timeout_seconds:g} seconds"
            raise _refuse(metric, message, late.stderr) from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise _refuse(metric, f"ended with exit code {process.returncode}", err)
    written = out.decode(errors="replace").splitlines()
    if len(written) != len(rows):
        raise _refuse(metric, f"wrote {counted(len(written), 'score')} for {counted(len(rows), 'row')}", err)
    return [_number(text, f"line {number}", metric.name) for number, text in enumerate(written, 1)]


def _refuse(metric: Program, message: str, stderr: bytes | None = None) -> FinetuneError:
    said = (stderr or b"").decode(errors="replace").strip().splitlines()[-LAST_LINES:]
    told = "\n  ".join([f"{metric.program[0]} {message}", *said])
    return FinetuneError(told, where=f"metric {metric.name}", hint="run it by hand on a few rows as JSON lines")


def _number(value: object, place: str, name: str) -> float:
    try:
        number = float(cast(float, value))
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        shown = str(value)[:50]
        raise FinetuneError(
            f"{place}: `{shown}` is not a finite number", where=f"metric {name}", hint="give one for each row"
        )
    return number


def _content(file: Path) -> str:
    return blake3.blake3(file.read_bytes()).hexdigest()


def _lacking(metric: str, package: str) -> FinetuneError:
    hint = "pip install 'finetune[metrics]'"
    return FinetuneError(f"needs the package {package}", where=f"metric {metric}", hint=hint)
