"""From a recipe file to a checked `Recipe`, or to all its problems, each with its line."""

import difflib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ruamel.yaml import YAML

from finetune.errors import Problem, RecipeError
from finetune.recipe.check import check
from finetune.recipe.schema import Recipe
from finetune.recipe.secret_forms import secrets_of
from finetune.recipe.yaml_nodes import MAX_BYTES, override, parse, plain, shown, where

SHOWN = 5  # of the recipes in a hint
SECRET_HINT = "keep it in your environment, and replace it by a new one: it was written to a file"


@dataclass(frozen=True)
class LoadedRecipe:
    """A checked recipe, its verbatim text, and the line of every key that is written; line 0 is `--set`."""

    recipe: Recipe
    text: str
    file: str
    lines: Mapping[str, int]

    def problem(self, key: str, message: str, hint: str | None = None) -> Problem:
        """What was found later about a key; one that is not written counts at its nearest parent's line."""
        return Problem(where(self.file, _line(self.lines, key)), key, message, hint)


def load(path: Path | str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Reads and checks a recipe file with `--set` overrides like `optimizer.learning_rate=1e-4`; raises RecipeError."""
    file = str(path)
    try:
        with open(path, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        _refuse(file, "no such file", _hint_for(Path(path)))
    except IsADirectoryError:
        _refuse(file, "is a directory, not a recipe", "name a `.yaml` file in it")
    except OSError as error:
        _refuse(file, f"cannot be read: {error.strerror}", f"let user {os.geteuid()} read it")
    try:
        text = content.decode("utf-8", errors="strict" if len(content) <= MAX_BYTES else "replace")
    except UnicodeDecodeError as error:
        _refuse(where(file, content.count(b"\n", 0, error.start) + 1), "is not UTF-8 text", "save the file as UTF-8")
    return loads(text, file, overrides)


def _hint_for(path: Path) -> str:
    """The recipes that may be meant by a name that is not there."""
    files = {file.stem: str(file) for pattern in ("*.yml", "*.yaml") for file in path.parent.glob(pattern)}
    # by the part that differs: every ending is alike
    if near := difflib.get_close_matches(path.stem, files, n=1):
        return f"did you mean `{files[near[0]]}`?"
    there = sorted(files.values())
    named = ", ".join(f"`{file}`" for file in there[:SHOWN])
    more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
    if there:
        return f"there are {named}{more}" if len(there) > 1 else f"there is {named}"
    return f"write it, or copy one from recipes/; `{path.parent}` has no .yaml file"


def loads(text: str, file: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Checks a recipe's text; `file` is what its problems call it."""
    document = parse(text, file)
    root, found = document.root, document.repeated
    if root is None or root.value is None:
        _refuse(file, "is empty", "a recipe needs `base`, `task`, `data`, `optimizer` and `train`")
    if not isinstance(root.value, dict):
        _refuse(
            where(file, root.line),
            f"must be a section with keys, not {shown(plain(root, {}))}",
            "a recipe starts like `base:`",
        )
    for setting in overrides:
        try:
            found += override(root, setting)
        except RecipeError as error:
            found += [(0, problem) for problem in error.problems]
    lines: dict[str, int] = {}
    data = plain(root, lines)
    if "trackers" in lines:  # the older key
        lines.setdefault("track", lines["trackers"])
    for key, kind in secrets_of(data):
        line = _line(lines, key)
        found.append((line, Problem(where(file, line), key, f"holds {kind}; a recipe takes no secrets", SECRET_HINT)))
    checked = check(data if isinstance(data, dict) else {})
    if isinstance(checked, Recipe) and not found:
        return LoadedRecipe(checked, text, file, lines)
    if not isinstance(checked, Recipe):
        for key, message, hint in checked:
            line = _line(lines, key)
            found.append((line, Problem(where(file, line), key, message, hint)))
    raise RecipeError([problem for _, problem in sorted(found, key=lambda item: (item[0] == 0, item[0]))])


def dumps(recipe: Recipe) -> str:
    """A recipe as YAML that is loaded to the same one."""
    return to_yaml(recipe.model_dump(mode="json", exclude_defaults=True))


def to_yaml(value: object) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment] # its class has None there
    yaml.allow_unicode = True
    yaml.width = 4096
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


def _refuse(place: str, message: str, hint: str | None = None) -> NoReturn:
    raise RecipeError([Problem(place, "", message, hint)])


def _line(lines: Mapping[str, int], key: str) -> int:
    while key not in lines:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return lines[key]
