"""The chat template in force: the base's own, one of several that it has, a built-in one, or a file; with the recipe's variables.

Variables become the first line of the template. So checkpoints, `generate` and packages render as training did.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune.errors import DataError
from finetune.model.base import named, templates
from finetune.model.base.files import TEMPLATE
from finetune.recipe.schema import ChatTask
from finetune.recipe.schema.tasks import RESERVED
from finetune.store import places
from finetune.tasks.rendering import TEMPLATE_HINT, names_read

OF_BASE = "base:"
"""Before the name of one of the base's own templates."""


def template_of(
    tokenizer: PreTrainedTokenizerBase, task: ChatTask, is_known: Callable[[str], bool] = lambda text: False
) -> str:
    """The chat template in force. Of a file that is gone, a copy elsewhere that `is_known`."""

    def is_it(text: str) -> bool:
        return is_known(with_variables(text, task.template_variables))

    return with_variables(_template(tokenizer, task.template, is_it), task.template_variables)


def with_variables(template: str, variables: Mapping[str, object]) -> str:
    """A template in which these variables have these values, unless the caller gives others."""
    line = _line(variables)
    return template if template.startswith(line) else line + template


def refuse_unread(template: str, variables: Mapping[str, object]) -> None:
    """Raises DataError for a variable that the template does not read: a misspelt one would change nothing, in silence."""
    read = names_read(template.removeprefix(_line(variables))) if variables else set()
    if unread := [name for name in variables if name not in read]:
        others = ", ".join(f"`{name}`" for name in sorted(read - RESERVED))
        message = f"the chat template reads no variable `{unread[0]}`"
        hint = f"it reads {others}" if others else "it has no switches: remove the key"
        raise DataError(message, where="task.template_variables", hint=hint)


def _line(variables: Mapping[str, object]) -> str:
    # Lines of blocks alone leave nothing in the text, and the template's own beginning stays as it is.
    return "".join(
        f"{{%- set {name} = {name} if {name} is defined else {_literal(variables[name])} %}}\n" for name in variables
    )


def _literal(value: object) -> str:
    """A value of a recipe as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def _template(tokenizer: PreTrainedTokenizerBase, name: str | None, is_known: Callable[[str], bool]) -> str:
    if name is None:
        return _own(tokenizer, "default")
    if name.startswith(OF_BASE):
        return _own(tokenizer, name.removeprefix(OF_BASE))
    if name in named.NAMES:
        named.refuse_missing(tokenizer, name)
        return named.text_of(name)
    template = _in_file(name, is_known)
    if problem := templates.problem(template):
        raise DataError(f"the template {problem}", where=name, hint="fix it, or use the base's own")
    return template


def _own(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    given = tokenizer.chat_template
    if own := templates.default(given, name):
        return own
    if names := templates.names(given):
        message = f"the base has several chat templates, and none is called `{name}`: {', '.join(names)}"
        raise DataError(message, hint=f"choose one with task.template: {OF_BASE}{names[0]}")
    if given and name != "default":
        raise DataError(
            f"the base has one chat template, without a name, and none called `{name}`", hint="remove task.template"
        )
    raise DataError("the base has no chat template", hint=TEMPLATE_HINT)


def _in_file(name: str, is_known: Callable[[str], bool]) -> str:
    try:
        return _text_of(name)
    except FileNotFoundError as error:
        copy = _copy_of(name, is_known)
        if copy is None:
            raise _unreadable(name, error) from None
        return copy
    except OSError as error:
        raise _unreadable(name, error) from None


def _text_of(name: str) -> str:
    try:
        return templates.decoded(Path(name).read_bytes())
    except ValueError as error:
        raise DataError(f"the template {error}", where=name, hint="save it as UTF-8") from None


def _copy_of(name: str, is_known: Callable[[str], bool]) -> str | None:
    """The text of a template file that was moved, or that the checkpoints of its run alone still have."""
    for place in (*places.around(name), *places.in_checkpoints(TEMPLATE)):
        if Path(place).is_file() and is_known(text := _text_of(place)):
            places.found(name, place, "template")
            return text
    return None


def _unreadable(name: str, error: OSError) -> DataError:
    known = ", ".join(named.NAMES)
    return DataError(
        f"cannot be read: {error.strerror}", where=name, hint=f"task.template names a file, or one of: {known}"
    )
