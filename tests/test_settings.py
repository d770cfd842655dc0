"""A setting that no code reads is a lie to the person who sets it."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

import pytest

from finetune.recipe.schema import Recipe, Section

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "finetune/recipe"
# These say what a recipe may hold; they act on nothing.
DECLARATIONS = {RECIPE / "check.py", RECIPE / "yaml_nodes.py", *(RECIPE / "schema").glob("*.py")}
SCHEDULES = ROOT / "finetune/plan/schedules.py"  # each gets its keys as keyword-only parameters
READERS = [path for path in (ROOT / "finetune").rglob("*.py") if path not in DECLARATIONS]


def keys(model: type[Section], key: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a recipe: dotted, and its last part."""
    for name, field in model.model_fields.items():
        place = f"{key}.{name}".removeprefix(".")
        yield place, name
        for section in sections(field.annotation):
            yield from keys(section, place)


def sections(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from sections(argument)


def attributes_read(paths: Iterable[Path]) -> set[str]:
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def keywords_taken(path: Path) -> set[str]:
    """Keyword-only parameters that their own function reads."""
    taken = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            body = node.body if isinstance(node.body, list) else [node.body]
            used = {name.id for part in body for name in ast.walk(part) if isinstance(name, ast.Name)}
            taken |= {argument.arg for argument in node.args.kwonlyargs} & used
    return taken


def unread(model: type[Section]) -> list[str]:
    read = attributes_read(READERS) | keywords_taken(SCHEDULES)
    return sorted({place for place, name in keys(model) if name not in read})


def test_every_setting_is_read_by_some_code() -> None:
    assert unread(Recipe) == []


@pytest.mark.slow
def test_a_setting_that_nobody_reads_is_found() -> None:
    class Shelf(Section):
        never_read_by_anyone: int = 0

    class Added(Recipe):
        shelves: list[Shelf] | None = None

    assert {"shelves", "shelves.never_read_by_anyone"} <= set(unread(Added))


def test_a_keyword_that_its_function_ignores_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "schedules.py").write_text("def one(x, *, used, unused):\n    return used\n")
    assert keywords_taken(tmp_path / "schedules.py") == {"used"}
