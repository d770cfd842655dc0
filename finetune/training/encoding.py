"""How the rows of a recipe become tokens on its base: the template in force, what decides the tokens, and the reading of sources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.data.encode import encode
from finetune.data.example import Encoded, Encoder
from finetune.data.gates import OF_ROWS
from finetune.data.heldout.lineage import source_key
from finetune.data.shards import Work
from finetune.data.sources.hub import pin_dataset
from finetune.data.sources.open import State, located, open_source, reopen_source
from finetune.errors import DataError
from finetune.model import base
from finetune.model.base import templates
from finetune.plan import encodings
from finetune.plan.plan import ROW_RULES, PinnedSource, Plan
from finetune.recipe.schema import Recipe, Source, Task
from finetune.tasks import TASKS
from finetune.tasks.rendering import dates
from finetune.tasks.task import Explain


@dataclass(frozen=True)
class Encoding:
    """What turns rows into tokens."""

    task: Task
    directory: Path
    """With the tokenizer."""
    tokenizer: PreTrainedTokenizerBase
    row_rules: int
    template: str | None
    """The chat template in force; None where rows are not conversations."""
    digest: str
    """`Plan.encoding`."""
    day: str | None
    """`Plan.date`."""
    given_day: str | None
    """The day that the template is given."""
    notes: tuple[str, ...]
    """What was found out about templates that the base's user should know."""
    allowed: tuple[str, ...] = ()
    """The gates for single rows that are open."""

    @property
    def rendering(self) -> dict[str, Any]:
        """What the task's encoder is given by name."""
        if self.template is None:
            return {"row_rules": self.row_rules}
        given = {"row_rules": self.row_rules, "template": self.template, "date": self.given_day}
        return given | ({"allowed": self.allowed} if self.allowed else {})


def encoding_of(
    recipe: Recipe,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    earlier: Plan | None,
    like: Plan | None,
    today: date | None,
) -> Encoding:
    """That of a recipe, as far as a plan that it goes on with decides it. The tokenizer gets the template in force."""
    task = recipe.task
    row_rules = like.row_rules if like is not None and like.recipe.data == recipe.data else ROW_RULES
    is_same_task = like is not None and (like.recipe.task, like.recipe.base) == (task, recipe.base)
    rules_of = like if is_same_task else None
    template, digest = template_and_encoding(task, directory, tokenizer, row_rules, rules_of)
    notes = templates.others(tokenizer.chat_template) if template and not task.template_file else ()
    if shown := template or templates.default(tokenizer.chat_template):
        tokenizer.chat_template = shown
    day, given_day = dates(template, earlier, rules_of, today)
    allowed = tuple(name for name in OF_ROWS if name in recipe.data.allow and template is not None)
    return Encoding(task, directory, tokenizer, row_rules, template, digest, day, given_day, tuple(notes), allowed)


def read(
    sources: Sequence[Source], pins: Sequence[PinnedSource] | None, encoding: Encoding, like: Plan | None
) -> tuple[list[PinnedSource], list[Encoded]]:
    """The pin and the examples of each source. `pins` hold where there are some; a file that was moved is known by those of `like`."""
    known = {pin.name: pin for pin in (*like.train, *like.holdout)} if like else {}
    key = encodings.key(encoding.digest, encoding.task, encoding.tokenizer, encoding.given_day)
    key += f"\nallowed {encoding.allowed}" if encoding.allowed else ""
    encoder = encoder_of(encoding)
    held: Sequence[PinnedSource | None] = pins or [None] * len(sources)
    pairs = [
        _read(source, pin, encoding, encoder, key=key, known=known) for source, pin in zip(sources, held, strict=True)
    ]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _read(
    source: Source,
    earlier: PinnedSource | None,
    encoding: Encoding,
    encoder: Encoder,
    *,
    key: str,
    known: Mapping[str, PinnedSource],
) -> tuple[PinnedSource, Encoded]:
    revision = earlier.revision if earlier else (pin_dataset(source) if source.dataset else None)
    place = located(source, earlier or known.get(source.path or ""))
    rows = open_source(place, revision, encoding.row_rules)
    pin = PinnedSource(name=source.path or rows.name, revision=revision, fingerprint=rows.fingerprint, rows=len(rows))
    # in memory, by each process that opens it
    is_held = place.path is not None and place.path.lower().endswith(".csv")
    again = None if is_held else partial(_reopened, *_portable(encoding), place, pin, rows.state)
    content = TASKS[encoding.task.name].content
    return pin, encode(rows, rows.where, encoder, *source_key(source, pin), key, content=content, reopen=again)


def _portable(encoding: Encoding) -> tuple[Path, Task, dict[str, Any]]:
    """What another process needs to encode alike; a tokenizer is opened there again."""
    return encoding.directory, encoding.task, encoding.rendering


def _reopened(
    directory: Path, task: Task, rendering: dict[str, Any], source: Source, pin: PinnedSource, state: State | None
) -> Work:
    """What encodes a source, made again in a worker process."""
    rows = reopen_source(source, pin, state, rendering["row_rules"])
    encoder = _encoder(directory, base.load_tokenizer(directory), task, rendering)
    return Work(rows, rows.where, encoder, TASKS[task.name].content)


def encoder_of(encoding: Encoding) -> Encoder:
    return _encoder(encoding.directory, encoding.tokenizer, encoding.task, encoding.rendering)


def explain_of(encoding: Encoding) -> Explain:
    """A function from a row and its place to its examples before cutting, with a reason for each token."""
    task = TASKS[encoding.task.name]
    if task.explained is None:
        raise DataError(f"rows of the task {encoding.task.name} cannot be explained")
    stops = base.stop_tokens(encoding.directory, encoding.tokenizer)
    return task.explained(encoding.tokenizer, encoding.task, stops, **encoding.rendering)


def _encoder(directory: Path, tokenizer: PreTrainedTokenizerBase, task: Task, rendering: dict[str, Any]) -> Encoder:
    return TASKS[task.name].encoder(tokenizer, task, base.stop_tokens(directory, tokenizer), **rendering)


def template_and_encoding(
    task: Task,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    row_rules: int = ROW_RULES,
    like: Plan | None = None,
) -> tuple[str | None, str]:
    """The chat template in force, and a digest over what decides which tokens a row becomes, by the rules of a plan that exists."""
    stops = sorted(base.stop_tokens(directory, tokenizer))

    def pairs(text: str | None) -> list[tuple[str | None, str]]:
        if like is None or not encodings.is_older(like.encoding):
            return [(text, encodings.digest(task, base.tokenizer_files(directory), text, stops, row_rules))]
        texts = encodings.older_texts(text)
        return [(each, encodings.older_digest(task, directory, each, stops, row_rules)) for each in texts]

    def is_known(text: str) -> bool:
        return like is not None and like.encoding in [digest for _, digest in pairs(text)]

    template_of = TASKS[task.name].template_of
    found = pairs(template_of(tokenizer, task, is_known) if template_of else None)
    return next((pair for pair in found if like and pair[1] == like.encoding), found[0])


def in_force(plan: Plan, directory: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that a plan trains with, for the tokenizer in a directory; what is there where rows are not conversations.

    DataError where that tokenizer and no template at hand are what the rows were encoded with.
    """
    task, template = plan.recipe.task, templates.default(tokenizer.chat_template)
    has_template = TASKS[task.name].template_of is not None
    tries = [task.model_copy(update={"template": None}), task] if has_template else [task]
    for settings in tries:
        if has_template and settings.template_file is None and template is None:
            continue
        found, encoding = template_and_encoding(settings, directory, tokenizer, plan.row_rules, plan)
        if encoding == plan.encoding:
            return template if found is None else found
    message = "the tokenizer or the chat template is not the one that the rows were encoded with"
    raise DataError(message, hint="restore the file that task.template names")
