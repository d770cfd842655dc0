"""Templates may mark what the assistant writes with `{% generation %}`. What is learnt must be what they mark."""

import re
from collections.abc import Sequence
from functools import lru_cache

from finetune.data.conversation import Message, Tool
from finetune.errors import DataError
from finetune.tasks.rendering import Renderer

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
SHOWN = 40  # characters of a text in a message


@lru_cache(maxsize=16)
def has_marks(template: str) -> bool:
    return MARK.search(template) is not None


def refuse_other(
    renderer: Renderer,
    messages: list[Message],
    tools: Sequence[Tool] | None,
    *,
    written: str,
    field: str,
    place: str,
) -> None:
    """Raises DataError if the template marks something else of the last message than `written`, blanks at the ends aside.

    A mark may begin with the header, as SmolLM3's do: the model is given that. One without the stop token is refused: a model that
    learns by it never stops.
    """
    text, marks = renderer.marks(messages, place, tools)
    begin = len(text) - len(written)
    marked = "".join(text[max(first, begin) : last] for first, last in marks if last > begin)
    if marked.strip() != written.strip():
        message = f"the chat template marks {_short(marked)} of `{field}` as generated, but the model writes {_short(written)}"
        raise DataError(message, where=place, hint="correct its {% generation %} marks, or remove them all")


def _short(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}…{text[-SHOWN // 2 :]}")
