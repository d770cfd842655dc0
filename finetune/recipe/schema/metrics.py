"""Metrics of what a model answers to the rows of an evaluation set."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, PositiveFloat, Tag, field_validator

from finetune.recipe.schema.values import Section, Short

Better = Literal["lower", "higher"]
METRIC_NAME = re.compile(r"[A-Za-z_][\w-]*")


class ExactMatch(Section):
    """Whether the answer is the row's, apart from blanks around it: `exact_match`."""

    name: Literal["exact_match"]

    better: ClassVar[Better] = "higher"


class Rouge(Section):
    """ROUGE-L (Lin 2004): the F-measure of the longest common subsequence of words with the row's answer, from 0 to 1. Needs the extra `metrics`."""

    name: Literal["rouge"]

    better: ClassVar[Better] = "higher"


class Regex(Section):
    """Whether a regular expression matches somewhere in the answer. If it has a group, whether the last match of that group is also the one in the row's answer."""

    name: Literal["regex"]
    pattern: str = Field(min_length=1)
    """A regular expression of Python, like `"answer is (\\d+)"`."""

    better: ClassVar[Better] = "higher"

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return pattern


class Json(Section):
    """Whether the answer is JSON."""

    name: Literal["json"]
    matches: str | None = Field(default=None, min_length=1)
    """A file with a JSON Schema that it has to match as well. Needs the extra `metrics`."""

    better: ClassVar[Better] = "higher"


class Program(Section):
    """Your own metric: a program that reads rows as JSON lines, and writes a number for each."""

    name: str
    """The name of its figure."""
    program: list[str] = Field(min_length=1)
    """The program with its arguments, like `[python, score.py]`. Each line of its stdin has `row`, `prompt`, `answer`, `expected`, `loss` and `tokens`."""
    better: Better = "higher"
    """Which way is better."""
    timeout_seconds: PositiveFloat = 600.0
    """How long it may take for all rows of a set."""

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if not METRIC_NAME.fullmatch(name) or name in RESERVED:
            raise ValueError("cannot be the name of a metric of yours")
        return name


RESERVED = {
    *("exact_match", "rouge", "regex", "json"),
    *("loss", "loss_stderr", "perplexity", "rows", "tokens", "row", "content", "answer"),
}


BY_NAME: dict[str, ExactMatch | Rouge | Json] = {
    "exact_match": ExactMatch(name="exact_match"),
    "rouge": Rouge(name="rouge"),
    "json": Json(name="json"),
}
"""The metrics that are asked for by their name alone."""


def _kind(value: object) -> str | None:
    given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "program" if "program" in given else given.get("name")


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


Metric = Annotated[
    Annotated[ExactMatch, Tag("exact_match")]
    | Annotated[Rouge, Tag("rouge")]
    | Annotated[Regex, Tag("regex")]
    | Annotated[Json, Tag("json")]
    | Annotated[Program, Tag("program")],
    Discriminator(_kind),
    BeforeValidator(_named),
    Short({"enum": [*BY_NAME]}),
]
