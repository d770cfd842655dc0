"""Checks the local sources of a recipe before anything heavy is imported: are the files there, and do their first rows fit?

It must not open Hub data sets.
"""

import difflib
from collections.abc import Callable, Iterator

from finetune.data import conversation, plain_text
from finetune.data.example import Row
from finetune.data.refusals import together
from finetune.data.sources.kept import AbsentColumnError
from finetune.data.sources.open import Rows, first_rows
from finetune.errors import DataError, Problem, RecipeError
from finetune.recipe.load import LoadedRecipe
from finetune.recipe.schema import Source, Task

FIRST_ROWS = 64
MOST_ROWS = 20_000  # checked if one of the first is bad, to report the bad ones together
# a kind of rows -> its fields, and the function that reads such a row
FORMS: dict[str, tuple[tuple[str, ...], Callable[[Row, str], object]]] = {
    "conversation": (conversation.FIELDS, conversation.conversation_of),
    "text": (plain_text.FIELDS, plain_text.text_of),
}


def check(loaded: LoadedRecipe) -> None:
    """Raises RecipeError for fields unknown to the task, DataError for files and first rows; all problems at once."""
    sources = dict(_sources(loaded))
    problems = [problem for key, source in sources.items() for problem in _problems(loaded, key, source)]
    if problems:
        raise RecipeError(problems)
    refused: list[DataError] = []
    for key, source in sources.items():
        if source.path is not None:
            try:
                _look(source, loaded.recipe.task)
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


def ignored_columns(source: Source, columns: list[str], task: Task) -> list[str]:
    """Columns without a field of the task that the recipe does not skip."""
    known = {*_fields(task), *source.skip}
    return [column for column in columns if column not in known]


def _sources(loaded: LoadedRecipe) -> Iterator[tuple[str, Source]]:
    data = loaded.recipe.data
    for part, sources in (("train", data.train), ("holdout", data.holdout)):
        for number, source in enumerate(sources if isinstance(sources, list) else []):
            yield f"data.{part}[{number}]", source


def _problems(loaded: LoadedRecipe, key: str, source: Source) -> Iterator[Problem]:
    task = loaded.recipe.task
    fields = _fields(task)
    listed = ", ".join(f"`{field}`" for field in fields)
    for field in source.columns:
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"the fields are {listed}"
            yield loaded.problem(f"{key}.columns.{field}", f"is no field of {task.name} rows", hint)
    for column in sorted({*source.columns.values()} & {*source.skip}):
        yield loaded.problem(f"{key}.skip", f"skips `{column}`, which `columns` reads")


def _fields(task: Task) -> tuple[str, ...]:
    return (*FORMS[task.row_form][0], *task.more_fields)


def _look(source: Source, task: Task) -> None:
    if _refused(first_rows(source, FIRST_ROWS), task):
        rows = first_rows(source, MOST_ROWS)
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
