"""How the rows of a recipe become tokens on its base: the template in force, what decides the tokens, and the reading of sources."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from finetune.data.encode import Part, encode, encode_part
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
from finetune.plan.pinned import Counts
from finetune.plan.plan import ROW_RULES, PinnedSource, Plan
from finetune.recipe.schema import Recipe, Source, Task
from finetune.tasks import TASKS
from finetune.tasks.explained import by_masks
from finetune.tasks.rendering import dates
from finetune.tasks.task import Explain

EncodedT = TypeVar("EncodedT", bound=Encoded | None)


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
    skips_bad: bool
    """`data.on_bad_row: skip`."""
    templates: tuple[str, ...]
    """What was found out about templates that the base's user should know."""
    allowed: tuple[str, ...] = ()
    """The gates for single rows that are open."""

    def notes(self, counts: Counts) -> list[str]:
        """What to know of templates, and the price of several examples a conversation."""
        if self.template is None or counts.examples <= counts.rows:
            return [*self.templates]
        learnt = counts.supervised_tokens / counts.tokens
        cost = f"{counts.rows:,} rows make {counts.examples:,} examples, one for each learnt turn, with {learnt:.0%} of their tokens learnt"
        return [*self.templates, f"the chat template renders a turn differently once others follow, so {cost}"]

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
    # A branch on the same rows reads them by the rules of its parent, or its tokens would differ.
    row_rules = like.row_rules if like is not None and like.recipe.data == recipe.data else ROW_RULES
    is_same_task = like is not None and (like.recipe.task, like.recipe.base) == (task, recipe.base)
    rules_of = like if is_same_task else None
    template, digest = template_and_encoding(task, directory, tokenizer, row_rules, rules_of)
    notes = templates.others(tokenizer.chat_template) if template and not task.template_file else ()
    if shown := template or templates.default(tokenizer.chat_template):
        # Everything that renders with this tokenizer later must use the template of the plan.
        tokenizer.chat_template = shown
    day, given_day = dates(template, earlier, rules_of, today)
    skips_bad = recipe.data.on_bad_row == "skip"
    allowed = tuple(name for name in OF_ROWS if name in recipe.data.allow and template is not None)
    facts = (template, digest, day, given_day, skips_bad, tuple(notes), allowed)
    return Encoding(task, directory, tokenizer, row_rules, *facts)


def read(
    sources: Sequence[Source], pins: Sequence[PinnedSource] | None, encoding: Encoding, like: Plan | None
) -> tuple[list[PinnedSource], list[Encoded]]:
    """The pin and the examples of each source. `pins` hold where there are some; a file that was moved is known by those of `like`."""
    known = {pin.name: pin for pin in (*like.train, *like.holdout)} if like else {}
    held: Sequence[PinnedSource | None] = pins or [None] * len(sources)
    pairs = [_read(*each, encoding, known, encode) for each in zip(sources, held, strict=True)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def read_part(source: Source, encoding: Encoding, part: Part) -> tuple[PinnedSource, Encoded | None]:
    """Makes the shards of one of several tasks. The pin of the source, and its examples once all tasks are done."""
    return _read(source, None, encoding, {}, encode if part.of == 1 else partial(encode_part, part=part))


def _read(
    source: Source,
    earlier: PinnedSource | None,
    encoding: Encoding,
    known: Mapping[str, PinnedSource],
    make: Callable[..., EncodedT],
) -> tuple[PinnedSource, EncodedT]:
    key = encodings.key(encoding.digest, encoding.task, encoding.tokenizer, encoding.given_day)
    key += f"\nallowed {encoding.allowed}" if encoding.allowed else ""
    encoder = encoder_of(encoding)
    revision = earlier.revision if earlier else (pin_dataset(source) if source.dataset else None)
    place = located(source, earlier or known.get(source.path or ""))
    rows = open_source(place, revision, encoding.row_rules, encoding.task.row_form, encoding.skips_bad)
    # Under the recipe's name, wherever the file was found: the plan's id must not change.
    pin = PinnedSource(name=source.path or rows.name, revision=revision, fingerprint=rows.fingerprint, rows=len(rows))
    again = partial(_reopened, *_portable(encoding), place, pin, rows.state)
    content = TASKS[encoding.task.name].content
    keys = (*source_key(source, pin), key, *(rows.choice.key if rows.choice else ()))
    encoded = make(rows, rows.where, encoder, *keys, content=content, reopen=again, skips_bad=encoding.skips_bad)
    if encoded is not None:
        encoded.said = rows.about
    return pin, encoded


def _portable(encoding: Encoding) -> tuple[Path, Task, dict[str, Any], bool]:
    """What another process needs to encode alike; a tokenizer is opened there again."""
    return encoding.directory, encoding.task, encoding.rendering, encoding.skips_bad


def _reopened(
    directory: Path,
    task: Task,
    rendering: dict[str, Any],
    skips_bad: bool,
    source: Source,
    pin: PinnedSource,
    state: State | None,
) -> Work:
    """What encodes a source, made again in a worker process."""
    rows = reopen_source(source, pin, state, rendering["row_rules"], task.row_form)
    encoder = _encoder(directory, base.load_tokenizer(directory), task, rendering)
    return Work(rows, rows.where, encoder, TASKS[task.name].content, skips_bad)


def encoder_of(encoding: Encoding) -> Encoder:
    return _encoder(encoding.directory, encoding.tokenizer, encoding.task, encoding.rendering)


def explain_of(encoding: Encoding) -> Explain:
    """A function from a row and its place to its examples before cutting, with a reason for each token."""
    section, explainer = encoding.task, TASKS[encoding.task.name].explainer
    if explainer is None:
        return by_masks(encoding.tokenizer, encoder_of(encoding))
    stops = base.stop_tokens(encoding.directory, encoding.tokenizer, section.stop_names)
    return explainer(encoding.tokenizer, section, stops, **encoding.rendering)


def _encoder(directory: Path, tokenizer: PreTrainedTokenizerBase, task: Task, rendering: dict[str, Any]) -> Encoder:
    return TASKS[task.name].encoder(
        tokenizer, task, base.stop_tokens(directory, tokenizer, task.stop_names), **rendering
    )


def template_and_encoding(
    task: Task,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    row_rules: int = ROW_RULES,
    like: Plan | None = None,
) -> tuple[str | None, str]:
    """The chat template in force, and a digest over what decides which tokens a row becomes, by the rules of a plan that exists."""
    stops = sorted(base.stop_tokens(directory, tokenizer, task.stop_names))

    def pairs(text: str | None) -> list[tuple[str | None, str]]:
        if like is None or not encodings.is_older(like.encoding):
            return [(text, encodings.digest(task, base.tokenizer_files(directory), text, stops, row_rules))]
        # Older code read the file of a template with its byte-order mark and its line ends: try these too.
        texts = encodings.older_texts(text)
        return [(each, encodings.older_digest(task, directory, each, stops, row_rules)) for each in texts]

    def is_known(text: str) -> bool:
        return like is not None and like.encoding in [digest for _, digest in pairs(text)]

    template_of = TASKS[task.name].template_of
    found = pairs(template_of(tokenizer, task, is_known) if template_of else None)
    # The form that gives the plan's own digest, or a resume would be refused for the same template.
    return next((pair for pair in found if like and pair[1] == like.encoding), found[0])


def in_force(plan: Plan, directory: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that a plan trains with, for the tokenizer in a directory; what is there where rows are not conversations.

    DataError where that tokenizer and no template at hand are what the rows were encoded with.
    """
    task, template = plan.recipe.task, templates.default(tokenizer.chat_template)
    has_template = TASKS[task.name].template_of is not None
    # The tokenizer of a checkpoint carries the run's template. That of the base may need `task.template`.
    tries = [task.model_copy(update={"template": None}), task] if has_template else [task]
    for settings in tries:
        if has_template and settings.template_file is None and template is None:
            continue
        found, encoding = template_and_encoding(settings, directory, tokenizer, plan.row_rules, plan)
        if encoding == plan.encoding:
            return template if found is None else found
    message = "the tokenizer or the chat template is not the one that the rows were encoded with"
    raise DataError(message, hint="restore the file that task.template names")
