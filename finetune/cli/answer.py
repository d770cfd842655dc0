"""What a command has to say: facts for `--json`, the same as text for a reader, and whether all is well."""

import functools
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import click

from finetune.errors import FinetuneError
from finetune.store.rank import is_first
from finetune.store.strict_json import to_json


@dataclass(frozen=True)
class Answer:
    facts: Mapping[str, object]
    text: str
    is_good: bool = True
    refuse: Callable[[], None] | None = None
    """Raises what speaks against going on. A reader has seen the text by then; `--json` prints one object, the error or the facts."""


def answers(command: Callable[..., Answer]) -> Callable[..., None]:
    """Adds `--json` to a command and prints its answer; the exit code is 1 if that is not good."""

    @functools.wraps(command)
    def printing(*arguments: object, is_json: bool, **others: object) -> None:
        answer = command(*arguments, **others)
        if answer.refuse and is_json:
            answer.refuse()
        if is_first(os.environ):  # all ranks know the answer; one prints it
            click.echo(to_json(answer.facts) if is_json else answer.text)
        if answer.refuse and not is_json:
            answer.refuse()
        if not answer.is_good:
            sys.exit(FinetuneError.exit_code)

    return click.option("--json", "is_json", is_flag=True, help="Print one JSON object.")(printing)
