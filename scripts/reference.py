"""Writes the generated part of the documentation: every recipe key from the schema, every help text from click.

`python scripts/reference.py DIR` writes DIR/recipe.md and renews the help texts in DIR/commands.md. A value is described in the
words that the recipe's error messages use. `tests/test_docs.py` fails when either file is not what this script writes.
"""

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import click
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from finetune.cli import cli
from finetune.recipe.schema import Recipe, Section

EXAMPLE = Path(__file__).parents[1] / "recipes/smollm2-135m/chat-lora.yaml"
HELP = re.compile(r"<!-- help: ?(?P<command>[\w ]*?) -->\n```text\n.*?```\n", re.DOTALL)
WORDS = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`", dict[str, str]: "pairs of names"}
BOUNDS = {"gt": "over", "ge": "at least", "lt": "under", "le": "at most"}

INTRODUCTION = """# Recipe

<!-- scripts/docs writes this file from finetune/recipe/schema -->

A recipe is one YAML file: you say what to train, on which rows, and how. This one is
[{path}](../{path}).
You find more in [recipes/](../recipes/).

```yaml
{example}```

You find every key below, in the order of the schema. `data.train[]` stands for each item of the
list. If you use an unknown key, a repeated key, a wrong type, or keys that do not fit together, the
recipe is refused. You see all mistakes at once, each with its line and the nearest right key.
`2e-4` is a number. Only `true` and `false` are booleans. You cannot use anchors, aliases and tags.

With `--set KEY=VALUE` on the command line you override a key; it is checked in the same way. If
your recipe has the first line as above, an editor with a YAML language server completes and checks
keys while you type.
"""


def recipe_page() -> str:
    introduction = INTRODUCTION.format(path=EXAMPLE.relative_to(EXAMPLE.parents[2]), example=EXAMPLE.read_text())
    return "\n".join([introduction, *(_section(model, key, field) for model, (key, field) in sections().items())])


@cache
def sections() -> dict[type[Section], tuple[str, FieldInfo]]:
    """Every section that a recipe can have: its dotted key, and the field that holds it. One that stands twice counts where it is first."""
    found: dict[type[Section], tuple[str, FieldInfo]] = {}
    for model, key, field in _walk("", Recipe):
        found.setdefault(model, (key, field))
    return found


def _walk(key: str, model: type[Section]) -> Iterator[tuple[type[Section], str, FieldInfo]]:
    for name, field in model.model_fields.items():
        for below, suffix in _inside(field.annotation):
            place = f"{key}.{name}{suffix}".removeprefix(".")
            yield below, place, field
            yield from _walk(place, below)


def _inside(annotation: object, suffix: str = "") -> Iterator[tuple[type[Section], str]]:
    """The sections inside a type; those in a list have the suffix `[]`."""
    if _is_section(annotation):
        yield annotation, suffix
    for argument in get_args(annotation):
        yield from _inside(argument, "[]" if get_origin(annotation) is list else suffix)


def _is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _section(model: type[Section], key: str, field: FieldInfo) -> str:
    tag = _tag(model)
    lines = [f"## {key}: {tag}" if tag else f"## {key}", "", _wrapped(model.__doc__.strip() + _presence(field)), ""]
    lines += ["| key | value | default | |", "|---|---|---|---|"]
    for name, item in model.model_fields.items():
        meaning = "Chooses this form of the section." if tag and name == "name" else item.description
        lines.append(f"| `{name}` | {_words(item.annotation, item.metadata)} | {_default(item)} | {meaning} |")
    return "\n".join([*lines, ""])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _tag(model: type[Section]) -> str | None:
    """The `name` that chooses this form of a section that has several."""
    name = model.model_fields.get("name")
    is_tagged = name is not None and name.is_required() and get_origin(name.annotation) is Literal
    return get_args(name.annotation)[0] if is_tagged else None


def _presence(field: FieldInfo) -> str:
    if field.is_required():
        return " Required."
    return f" {field.description}" if field.default is None and field.description else ""


def _words(annotation: object, metadata: list[object]) -> str:
    """What may stand there: the words of a validator's complaint, else those of the type and its bounds."""
    complaint = next((words for words in map(_complaint, _validators_of(metadata)) if words), None)
    origin, arguments = get_origin(annotation), [item for item in get_args(annotation) if item is not NoneType]
    if complaint:
        return complaint
    if _is_section(annotation):
        return f"`{sections()[annotation][0]}`"
    if origin is Annotated:
        return _words(annotation.__origin__, list(annotation.__metadata__))
    if origin is Literal:
        return " or ".join(f"`{word}`" for word in arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(item, metadata) for item in arguments))
    if origin is dict and arguments[1] is not str:
        return f"names, each with {_words(arguments[1], [])}"
    if origin is list:
        listed = _words(arguments[0], [])
        return f"{listed}, or a list of such" if _validators_of(metadata) else f"a list of {listed}"
    bounds = [f"{words} {_number(bound)}" for item in metadata for words, bound in _bounds(item)]
    return " ".join([WORDS[annotation], *bounds[:1], *(f"and {bound}" for bound in bounds[1:])])


def _bounds(constraint: object) -> list[tuple[str, float]]:
    return [(words, getattr(constraint, name)) for name, words in BOUNDS.items() if hasattr(constraint, name)]


def _number(value: float) -> str:
    return f"2^{value.bit_length() - 1}" if isinstance(value, int) and value > 2**53 else f"{value:g}"


def _validators_of(metadata: list[object]) -> list[BeforeValidator]:
    return [item for item in metadata if isinstance(item, BeforeValidator)]


def _complaint(validator: BeforeValidator) -> str | None:
    """What a validator asks for when it is given something impossible: `must be like …`."""
    try:
        validator.func(object())
    except ValueError as error:
        return str(error).removeprefix("must be ")
    return None


def _default(field: FieldInfo) -> str:
    value = (field.json_schema_extra or {}).get("default", field.get_default())
    if field.is_required():
        return "required"
    if value is None or isinstance(value, Section):
        return ""
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def with_help(page: str) -> str:
    """A page with the text under each `<!-- help: COMMAND -->` as click prints it now."""
    return HELP.sub(
        lambda match: f"<!-- help: {match['command']} -->\n```text\n{help_of(match['command'])}\n```\n", page
    )


def help_of(name: str) -> str:
    """What `finetune NAME --help` prints; without a name, what `finetune --help` does."""
    settings = {"terminal_width": 100, "help_option_names": ["-h", "--help"]}
    parent = click.Context(cli, info_name="finetune", **settings)
    context = parent
    for word in name.split():
        command = context.command
        assert isinstance(command, click.Group)
        context = click.Context(command.commands[word], context, word, **settings)
    return context.get_help()


def main(folder: Path) -> None:
    (folder / "recipe.md").write_text(recipe_page())
    commands = folder / "commands.md"
    commands.write_text(with_help(commands.read_text()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/reference.py DIR")
    main(Path(sys.argv[1]))
