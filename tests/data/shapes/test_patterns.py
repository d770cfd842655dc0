"""A pattern over columns makes a text of each row, and does nothing else."""

import pytest

from finetune.data import preflight
from finetune.data.shapes.patterns import filled, shape_of
from finetune.errors import DataError, RecipeError
from finetune.recipe.load import load
from finetune.recipe.schema.patterns import parsed

ROW = {
    "question": "who?",
    "answers": {"text": ["Ada", "Bob"], "start": [3]},
    "meta": '{"title": "Ages", "tags": ["a", "b"]}',
    "pairs": [["a", 1], ["b", 2.5]],
    "is_good": True,
    "score": 0.1,
    "odd name-1": "odd",
    "a.b": "dotted",
    "list of all": ["one", "two", "three"],
    "label": "1",
    "number": 2,
    "key": "text",
    "nothing": None,
    "empty": "",
    "list": [],
    "nan": float("nan"),
    "infinite": float("inf"),
    "bytes": b"x",
}


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("{question}", "who?"),
        ("Q: {question}\n\nA:", "Q: who?\n\nA:"),
        ("{answers.text[0]} and {answers.text[-1]}", "Ada and Bob"),
        ("{answers.start[0]}", "3"),
        ("{meta.title}: {meta.tags[1]}", "Ages: b"),
        ("{pairs[1][0]}={pairs[1][1]}", "b=2.5"),
        ("{is_good} {score}", "true 0.1"),
        ("{list of all[label]}, {list of all[number]}, {answers[key][0]}", "two, three, Ada"),
        ("{odd name-1}", "odd"),
        ('{["a.b"]} {answers["text"][0]}', "dotted Ada"),
        ("{{question}} {{}} {{{question}}}", "{question} {} {who?}"),
        ("{empty}", ""),
        ("no field: 5% }}{{", "no field: 5% }{"),
    ],
)
def test_a_pattern_is_filled_with_the_values_of_a_row(pattern, text) -> None:
    assert filled(parsed(pattern), "prompt", ROW, "rows:1") == text


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{nothing}", "`nothing` of the pattern `prompt` is null"),
        ("{answer}", "`answer` of the pattern `prompt`: no column `answer`, there is `question`, "),
        (
            "{answers.txt}",
            "`answers.txt` of the pattern `prompt`: `answers` has no field `txt`, there is `text`, `start`",
        ),
        ("{answers.text[2]}", "`answers.text[2]` of the pattern `prompt`: `answers.text` has 2 items, no item 2"),
        ("{answers.text[-3]}", "`answers.text[-3]` of the pattern `prompt`: `answers.text` has 2 items, no item -3"),
        ("{list[0]}", "`list` has 0 items, no item 0"),
        ("{question[0]}", "`question` is text, not a list"),
        ("{question.__class__}", "`question` is text, not an object"),
        ("{answers.__class__}", "`answers` has no field `__class__`"),
        ("{nothing.x}", "`nothing` is null, not an object"),
        ("{answers}", "`answers` of the pattern `prompt` is an object, not text or a number\nhint: name an item"),
        ("{answers.text}", "is a list, not text or a number"),
        ("{list of all[nothing]}", "`nothing` is null, not the number of an item"),
        ("{list of all[other]}", "no column `other`, there is"),
        ("{list of all[key]}", "`list of all` is a list, not an object"),
        ("{nan}", "`nan` of the pattern `prompt` is NaN, not text or a number"),
        ("{infinite}", "is infinite"),
        ("{bytes}", "is bytes, not text or a number"),
    ],
)
def test_a_value_that_is_not_there_is_refused_by_row_and_field(pattern, message) -> None:
    with pytest.raises(DataError) as caught:
        filled(parsed(pattern), "prompt", ROW, "rows:1")
    assert message in str(caught.value) and caught.value.where == "rows:1"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{", "has a `{` without `}` at character 1"),
        ("a}", "has a `}` without `{` at character 2"),
        ("{}", "has an empty field `{}` at character 1"),
        ("{a..b}", "has a field `{a..b}` that cannot be read"),
        ("{a[ x]}", "has a field `{a[ x]}` that cannot be read"),
        ("{a[]}", "has a field `{a[]}` that cannot be read"),
        ("{[x]}", "has a field `{[x]}` that cannot be read"),
        ("{a[1:2]}", "has a field `{a[1:2]}` that cannot be read"),
        ("{[0]}", "has a field `{[0]}` that cannot be read"),
        ("{ a }", "has a field `{ a }` that cannot be read"),
        ("{a.}", "has a field `{a.}` that cannot be read"),
        ("{.a}", "has a field `{.a}` that cannot be read"),
        ("{a{b}}", "has a field `{a{b}` that cannot be read"),
        ("{a[99999999999999999999]}", "that cannot be read"),
    ],
)
def test_a_bad_pattern_is_a_problem_of_the_recipe_with_its_line(recipe_file, pattern, message) -> None:
    with pytest.raises(ValueError, match="character|cannot be read"):
        parsed(pattern)
    source = {"path": "a.jsonl", "prompt": pattern, "completion": "{b}"}
    with pytest.raises(RecipeError) as caught:
        load(recipe_file(data={"train": [source]}))
    [problem] = caught.value.problems
    assert (problem.key, problem.where[-13:-3]) == ("data.train[0].prompt", "/tiny.yaml")
    assert problem.message.startswith(message) or problem.message.endswith(message)
    assert (
        problem.hint
        == "write a field as `{name}`, `{name.field}`, `{name[0]}` or `{name[column]}`, and a brace as `{{` or `}}`"
    )


@pytest.mark.parametrize(
    ("keys", "task", "message"),
    [
        ({"prompt": "{a}"}, "chat", "data.train[0]: `prompt` and `completion` go together"),
        ({"prompt": "{a}", "completion": "yes"}, "chat", "data.train[0].completion: names no column, so it would be "),
        ({"prompt": "{a}", "completion": "{b}", "text": "{a}"}, "chat", "has both `prompt` and `text`; give one"),
        ({"text": "{a}", "format": "text"}, "text", "so `format` does not go with it"),
        ({"format": "sharegtp"}, "chat", "data.train[0].format: must be"),
        ({"format": "tokens"}, "chat", "data.train[0].format: `tokens` is no format of chat rows"),
        ({"format": "alpaca"}, "text", "`alpaca` is no format of text rows\nhint: those are `text`, `tokens`"),
        ({"text": "{a}"}, "chat", "data.train[0].text: chat rows have no `text`"),
        ({"prompt": "{a}", "completion": "{b}"}, "text", "data.train[0].prompt: text rows have no `prompt`"),
        ({"prompt": "{a}", "completion": "{b}", "skip": ["a"]}, "chat", "skips `a`, which the pattern `prompt` reads"),
        (
            {"prompt": "{a}", "completion": "{b}", "columns": {"prompt": "c"}},
            "chat",
            "data.train[0].prompt: `columns.prompt` makes it as well; give one",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_a_problem_of_the_recipe(recipe_file, keys, task, message) -> None:
    with pytest.raises(RecipeError) as caught:
        file = recipe_file(data={"train": [{"path": "a.jsonl", **keys}]}, task={"name": task, "max_length": 64})
        preflight.check(load(file))
    assert message in str(caught.value)


def test_a_pattern_uses_its_columns_and_leaves_the_others() -> None:
    shape = shape_of({"prompt": "{context}\n\n{question}", "completion": "{answers.text[0]}"}, "conversation")
    row = {"id": 1, "context": "c", "question": "q", "answers": {"text": ["a"]}, "history": "h"}
    assert shape.canonical(row, "rows:1") == {"prompt": "c\n\nq", "completion": "a", "id": 1, "history": "h"}


def test_a_column_that_would_be_read_in_place_of_the_pattern_is_refused() -> None:
    shape = shape_of({"prompt": "{question}", "completion": "{answer}"}, "conversation")
    row = {"question": "q", "answer": "a"}
    for column in ("messages", "prompt", "completion"):
        with pytest.raises(DataError, match=rf"has a column `{column}` beside .*\nhint: name the one to drop"):
            shape.canonical(row | {column: "x"}, "rows:1")
        assert shape.canonical(row | {column: None}, "rows:1") == {"prompt": "q", "completion": "a"}
    assert shape_of({"prompt": "{prompt}!", "completion": "{answer}"}, "conversation").canonical(
        {"prompt": "q", "answer": "a"}, ""
    ) == {"prompt": "q!", "completion": "a"}
