"""Renders messages by a chat template.

A template is another author's program: any exception becomes a DataError. It prints the day of the plan.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.data.conversation import Message, Tool
from finetune.errors import DataError

if TYPE_CHECKING:
    import jinja2
    from transformers import PreTrainedTokenizerBase

    from finetune.plan.plan import Plan

TEMPLATE_HINT = "give a chat template of your own with task.template: FILE"
# What a template raises by itself; `raise_exception` in it raises a TemplateError of jinja2.
FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError)


class TemplateError(DataError):
    """A template refused a conversation, or failed on it."""

    def __init__(self, about: Callable[[str], str], place: str | None, hint: str, field: str = "the row"):
        super().__init__(about(field), where=place, hint=hint)
        self._about = about

    def at(self, field: str) -> "TemplateError":
        """The same error about one message of the row."""
        return TemplateError(self._about, self.where, self.hint or "", f"`{field}`")


class Renderer(NamedTuple):
    """How conversations become text."""

    tokenizer: "PreTrainedTokenizerBase"
    template: str
    date: str | None = None
    """The day for a template that prints one, as YYYY-MM-DD; None is today."""

    def text(
        self,
        messages: list[Message],
        place: str | None = None,
        tools: Sequence[Tool] | None = None,
        with_header: bool = False,
    ) -> str:
        """The text of some messages; `with_header` it ends with what an answer follows."""
        with _failures(place), _on(self.date, self.template):
            text: Any = self.tokenizer.apply_chat_template(
                messages,
                tools=None if tools is None else [*tools],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=with_header,
            )
            text.encode()  # half of a pair of surrogates, which JSON can spell, is no text for a tokenizer
            return str(text)

    def marks(
        self, messages: list[Message], place: str | None = None, tools: Sequence[Tool] | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and what of it the template marks with `{% generation %}`, in characters."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with _failures(place), _on(self.date, self.template):
            special: Mapping[str, Any] = self.tokenizer.special_tokens_map
            found: Any = render_jinja_template(
                [messages],
                tools=None if tools is None else [*tools],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **special,
            )
        [text], [marks] = found
        return text, marks


@contextmanager
def _failures(place: str | None) -> Iterator[None]:
    """Whatever a template raises is a DataError."""
    import jinja2

    try:
        yield
    except jinja2.TemplateError as error:
        if type(error) is jinja2.TemplateError:
            said, hint = str(error), "look at the order of roles in it"
            raise TemplateError(lambda field: f"the chat template refuses {field}: {said}", place, hint) from None
        raise _failure(error, place) from error
    except FAILURES as error:
        raise _failure(error, place) from error


@contextmanager
def _on(day: str | None, template: str) -> Iterator[None]:
    """Within it, templates print this day; None is today."""
    if day is None:
        yield
        return
    # Not a variable: transformers passes none that is a function. It keeps the compiled template for all who render the same text.
    globals_of = _compiled(template).globals
    globals_of["strftime_now"] = datetime.fromisoformat(day).strftime
    try:
        yield
    finally:
        # transformers shares the compiled template: others must get the clock's day again.
        globals_of.pop("strftime_now", None)


def dates(
    template: str | None, earlier: "Plan | None", like: "Plan | None", today: date | None
) -> tuple[str | None, str | None]:
    """The day in a plan and the day for its template; None if the template prints none. Prints a line if an older plan has no day."""
    if template is None or not prints_date(template):
        return None, None
    now = (today or date.today()).isoformat()
    if earlier is None:
        day = (like.date if like else None) or now
        return day, day
    # One rank says it for all.
    if earlier.date is None and os.environ.get("RANK", "0") == "0":
        said = f"the chat template prints the date, and this run's plan has none: rows are rendered with {now}"
        print(said, file=sys.stderr, flush=True)
    return earlier.date, earlier.date or now


def prints_date(template: str) -> bool:
    """Whether a template may print the day it is rendered on."""
    import jinja2

    try:
        tree = _compiled(template).environment.parse(template)
    except jinja2.TemplateError:
        return False  # rendering it reports the error
    return any(name.name == "strftime_now" for name in tree.find_all(jinja2.nodes.Name))


def names_read(template: str) -> set[str]:
    """The variables that a template reads, without functions. Empty for a damaged one: rendering it reports the error."""
    import jinja2
    from jinja2.meta import find_undeclared_variables

    environment = _compiled("").environment
    try:
        return find_undeclared_variables(environment.parse(template)) - environment.globals.keys()
    except jinja2.TemplateError:
        return set()


def _compiled(template: str) -> "jinja2.Template":
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


def _failure(error: Exception, place: str | None) -> "TemplateError":
    said = " ".join(str(error).split())[:200]
    cause = f"{type(error).__name__}: {said}" if said else type(error).__name__
    hint = f"look at what this row has that others have not, or {TEMPLATE_HINT}"
    return TemplateError(lambda field: f"the chat template fails on {field}: {cause}", place, hint)
