"""The loop of `finetune chat`: lines of a terminal or of a file in, answers out as they are written."""

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from finetune.errors import DataError, FinetuneError

if TYPE_CHECKING:
    from finetune.compare.chat import Chat

HELP = "/reset forgets all turns, /undo the last one, /save FILE adds the conversation to a file of rows; ctrl-D ends"


def converse(chat: "Chat") -> None:
    """Answers until the input ends. On a terminal an error ends no conversation, and ctrl-C no more than an answer."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        click.echo(HELP, err=True)
    for line in _typed() if is_terminal else _given():
        try:
            _turn(chat, line)
        except FinetuneError as error:
            if not is_terminal:
                raise
            click.echo(str(error), err=True)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            click.echo()


def _turn(chat: "Chat", line: str) -> None:
    """A command, or a question. One that begins with a blank is a question always."""
    name, _, rest = line.strip().partition(" ")
    if not line.startswith("/"):
        if line.strip():
            _ask(chat, line.strip())
        return
    commands: dict[str, Callable[[], None]] = {"/reset": chat.reset, "/undo": chat.undo}
    if name == "/save" and rest.strip():
        chat.save(rest.strip())
    elif name in commands and not rest:
        commands[name]()
    else:
        raise FinetuneError(
            f"`{line.strip()}` is no command", hint=f"{HELP}; a blank before the `/` makes it a question"
        )


def _ask(chat: "Chat", question: str) -> None:
    from finetune.compare.side_by_side import shown

    chat.answer(question, lambda piece: click.echo(shown(piece), nl=False))
    click.echo()


def _typed() -> Iterator[str]:
    """The lines of a terminal, which can be edited there."""
    import readline  # noqa: F401 `input` uses it once it is imported

    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return
        except UnicodeDecodeError:
            click.echo("this is not UTF-8 text", err=True)


def _given() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise DataError("is not UTF-8 text", where=f"line {number} of the input") from None
