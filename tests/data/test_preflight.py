"""Files, fields and first rows are looked at before anything heavy is imported, and all that is wrong is told at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.data import preflight
from finetune.data.refusals import together
from finetune.errors import DataError, FinetuneError, RecipeError
from finetune.recipe.load import load
from finetune.recipe.schema import ChatTask, TextTask

GOOD = {"prompt": "ask", "completion": "yes"}


@pytest.fixture
def refusal(recipe_file, tmp_path):
    """A function from rows of some files to what the check says of them."""

    def refusal(error=DataError, task="chat", options=None, **files) -> str:
        sources = []
        for name, rows in files.items():
            path = tmp_path / f"{name}.jsonl"
            if rows is not None:
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            sources.append({"path": str(path), **(options or {})})
        with pytest.raises(error) as caught:
            preflight.check(load(recipe_file(data={"train": sources}, task={"name": task, "max_length": 64})))
        return str(caught.value).replace(f"{tmp_path}/", "")

    return refusal


def test_all_files_that_are_not_there_are_told_at_once(refusal) -> None:
    assert refusal(a=None, b=[GOOD], c=None) == (
        "a.jsonl: no such file\n  also c.jsonl\nhint: a path is seen from the working directory"
    )


def test_a_good_recipe_passes_and_its_rows_beyond_the_first_are_not_read(recipe_file, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(GOOD)}\n" * 64 + "{\n")
    preflight.check(load(recipe_file(data={"train": [{"path": str(tmp_path / "rows.jsonl")}]})))


def test_bad_rows_of_all_kinds_are_told_at_once_with_their_count(refusal) -> None:
    empty, null = GOOD | {"completion": ""}, GOOD | {"completion": None}
    assert refusal(a=[GOOD, empty, null] * 30) == (
        "a.jsonl:2: has an empty assistant turn\n"
        "  also a.jsonl:5, a.jsonl:8, a.jsonl:11, a.jsonl:14, a.jsonl:17 and 24 more\n"
        "a.jsonl:3: `completion` is null\n"
        "  also a.jsonl:6, a.jsonl:9, a.jsonl:12, a.jsonl:15, a.jsonl:18 and 24 more\n"
        "60 of 90 rows are refused\n"
        "hint: remove the row"
    )


def test_a_column_that_is_not_there_is_told(refusal) -> None:
    assert "a.jsonl:1: no column `body`, there is `prompt`, `completion`" in refusal(
        a=[GOOD], options={"columns": {"prompt": "body"}}
    )


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        ("chat", {"promt": "a"}, "data.train[0].columns.promt: is no field of chat rows\nhint: did you mean `prompt`?"),
        (
            "text",
            {"body": "a"},
            "data.train[0].columns.body: is no field of text rows\nhint: the fields are `text`, `input_ids`, `labels`, `attention_mask`, `loss_mask`",
        ),
    ],
)
def test_a_field_that_the_task_does_not_have_is_a_problem_of_the_recipe(refusal, task, columns, message) -> None:
    assert refusal(RecipeError, task, {"columns": columns}, a=[GOOD]).endswith(message)


def test_a_column_that_is_read_cannot_be_skipped(refusal) -> None:
    options = {"columns": {"prompt": "question"}, "skip": ["question"]}
    assert "data.train[0].skip: skips `question`, which `columns` reads" in refusal(RecipeError, options=options, a=[])


def test_columns_that_no_field_takes_are_the_ignored_ones(recipe_file) -> None:
    source = load(recipe_file()).recipe.data.train[0].model_copy(update={"skip": ["b"]})
    assert preflight.ignored_columns(source, ["prompt", "tools", "id", "b"], ChatTask(name="chat")) == ["id"]
    assert preflight.ignored_columns(source, ["text", "prompt"], TextTask(name="text")) == ["prompt"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "train", "launch"])
def test_a_missing_file_is_told_before_torch_is_imported(command, recipe_file, tmp_path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('torch is imported')")
    recipe = recipe_file(data={"train": [{"path": "nowhere.jsonl"}]})
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    # a new interpreter: a fork would have torch already
    words = [sys.executable, "-m", "finetune", command, recipe, "--run", tmp_path / "run"]
    env = os.environ | {"PYTHONPATH": paths}
    said = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert (said.returncode, said.stderr) == (
        1,
        "nowhere.jsonl: no such file\nhint: a path is seen from the working directory\n",
    )


def test_one_error_stays_as_it_is_and_many_kinds_are_cut() -> None:
    [one] = together([DataError("is bad", where="a:1", hint="mend it")]).parts
    assert str(together([one])) == "a:1: is bad\nhint: mend it"
    many = together([DataError(f"is bad {number}", where=f"a:{number}") for number in range(20)])
    assert str(many).splitlines()[-2:] == ["a:7: is bad 7", "and 12 more messages"] and len(many.parts) == 20
    assert isinstance(many, FinetuneError) and many.hint is None
