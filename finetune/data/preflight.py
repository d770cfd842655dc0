"""Checks the local sources of a recipe before anything heavy is imported: are the files there, and do their first rows fit?

It must not open Hub data sets.
"""

import difflib
from collections.abc import Callable, Iterator

from finetune.data import conversation, plain_text
from finetune.data.example import Row
from finetune.data.refusals import together
from finetune.data.shapes import SHAPES, alpaca
from finetune.data.shapes.choice import patterns_of
from finetune.data.sources.kept import AbsentColumnError
from finetune.data.sources.open import Rows, first_rows
from finetune.errors import DataError, Problem, RecipeError
from finetune.recipe.load import LoadedRecipe
from finetune.recipe.schema import Source, Task
from finetune.recipe.schema.patterns import fields

FIRST_ROWS = 64
MOST_ROWS = 20_000  # checked if one of the first is bad, to report the bad ones together
# a kind of rows -> its fields, and the function that reads such a row
FORMS: dict[str, tuple[tuple[str, ...], Callable[[Row, str], object]]] = {
    "conversation": (conversation.FIELDS, conversation.conversation_of),
    "text": (plain_text.FIELDS, plain_text.content_of),
}


def check(loaded: LoadedRecipe) -> None:
    """Raises RecipeError for fields unknown to the task, DataError for files and first rows; all problems at once."""
    check_fields(loaded)
    problems: list[Problem] = []
    refused: list[DataError] = []
    # Hub data sets are not opened here: that would need the network and heavy imports.
    for key, source in named_sources(loaded):
        if source.path is not None:
            try:
                _look(source, loaded.recipe.task, loaded.recipe.data.on_bad_row == "skip")
            except AbsentColumnError as error:
                problems.append(loaded.problem(f"{key}.where", error.message))
            except DataError as error:
                refused.append(error)
    if problems:
        raise RecipeError(problems)
    if len(refused) == 1:
        raise refused[0]
    if refused:
        raise together([part for error in refused for part in error.parts or [error]])


def check_fields(loaded: LoadedRecipe) -> None:
    """The part about the recipe: RecipeError for fields unknown to the task. Reads no file."""
    problems = [problem for key, source in named_sources(loaded) for problem in _problems(loaded, key, source)]
    if problems:
        raise RecipeError(problems)


def ignored_columns(source: Source, columns: list[str], task: Task) -> list[str]:
    """Columns without a field of the task that the recipe does not skip."""
    known = {*_fields(task), *source.skip}
    if "text" in columns:  # rows that have both are read as text
        known -= {*plain_text.FIELDS} - {"text"}
    return [column for column in columns if column not in known]


def named_sources(loaded: LoadedRecipe) -> Iterator[tuple[str, Source]]:
    """Each source with its key, like `data.train[0]`; the training sources first."""
    data, sets = loaded.recipe.data, loaded.recipe.evaluate.sets
    rows_of = [(f"evaluate.sets.{name}.rows", each.rows) for name, each in sets.items()]
    for part, sources in (("data.train", data.train), ("data.holdout", data.holdout), *rows_of):
        for number, source in enumerate(sources if isinstance(sources, list) else []):
            yield f"{part}[{number}]", source


def _problems(loaded: LoadedRecipe, key: str, source: Source) -> Iterator[Problem]:
    task = loaded.recipe.task
    known = (*_fields(task), *(alpaca.COLUMNS if task.row_form == "conversation" else ()))
    listed = ", ".join(f"`{field}`" for field in dict.fromkeys(known))
    for field in source.columns:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"the fields are {listed}"
            yield loaded.problem(f"{key}.columns.{field}", f"is no field of {task.name} rows", hint)
    for column in sorted({*source.columns.values()} & {*source.skip}):
        yield loaded.problem(f"{key}.skip", f"skips `{column}`, which `columns` reads")
    yield from _shape_problems(loaded, key, source)


def _shape_problems(loaded: LoadedRecipe, key: str, source: Source) -> Iterator[Problem]:
    """Of the keys that say which shape rows have."""
    task = loaded.recipe.task
    if source.format != "auto" and SHAPES[source.format].form != task.row_form:
        names = ", ".join(f"`{name}`" for name, shape in SHAPES.items() if shape.form == task.row_form)
        yield loaded.problem(
            f"{key}.format", f"`{source.format}` is no format of {task.name} rows", f"those are {names}"
        )
    for column, pattern in patterns_of(source).items():
        if column not in _fields(task):
            yield loaded.problem(f"{key}.{column}", f"{task.name} rows have no `{column}`")
        if column in source.columns:
            yield loaded.problem(f"{key}.{column}", f"`columns.{column}` makes it as well; give one")
        for used in sorted({used for field in fields(pattern) for used in field.columns} & {*source.skip}):
            yield loaded.problem(f"{key}.skip", f"skips `{used}`, which the pattern `{column}` reads")


def _fields(task: Task) -> tuple[str, ...]:
    return (*FORMS[task.row_form][0], *task.more_fields)


def _look(source: Source, task: Task, skips_bad: bool) -> None:
    # A few rows first: a good file costs milliseconds.
    first = first_rows(source, FIRST_ROWS, task.row_form)
    if first.choice and not skips_bad and _refused(first, task):  # `choice` refuses rows that could have two shapes
        rows = first_rows(source, MOST_ROWS, task.row_form)
        raise together(_refused(rows, task), len(rows))


def _refused(rows: Rows, task: Task) -> list[DataError]:
    _, parse = FORMS[task.row_form]
    refused = []
    for index in range(len(rows)):
        try:
            parse(rows[index], rows.where(index))
        except DataError as error:
            refused.append(error)
    return refused
