"""Whatever a row holds, it is read or refused with its place: a traceback is never the answer."""

import json
from contextlib import suppress

import pyarrow
import pytest
from pyarrow import parquet

from finetune.data.preflight import FORMS
from finetune.data.shapes import SHAPES
from finetune.data.shapes.choice import choice_of
from finetune.data.shapes.patterns import shape_of
from finetune.data.sources.open import open_source
from finetune.errors import DataError
from finetune.plan.split import content_of
from finetune.recipe.schema import Source
from finetune.tasks.content import of_chat, of_text

DEEP = "[" * 500 + "]" * 500
HOSTILE = [
    None,
    "",
    " ",
    0,
    -1,
    2**70,
    1.5,
    float("nan"),
    float("inf"),
    True,
    [],
    {},
    [[]],
    [{}],
    [None],
    [[None, None]],
    [["a"]],
    [{"role": []}],
    [{"role": {}, "content": []}],
    [{"role": "assistant"}],
    [{"role": "assistant", "content": 5}],
    [{"role": "assistant", "content": [[]]}],
    [{"role": "assistant", "content": [{"type": {}, "text": 5}]}],
    [{"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}],
    [{"role": "assistant", "content": [{"type": "text", "text": "a", "cache": 1}]}],
    [{"role": "assistant", "content": None, "function_call": []}],
    [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "[1"}}],
    [{"role": "assistant", "content": None, "function_call": {"name": "f"}, "tool_calls": [1]}],
    [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": {}}}]}],
    [{"from": "function_call", "value": "{"}],
    [{"from": "function_call", "value": "[]"}],
    [{"from": "function_call", "value": None}],
    [{"from": "gpt", "value": "a", "text": "b"}],
    [{"from": "gpt", "user": "a", "value": "b"}],
    [{"from": None, "value": "b"}],
    [{"from": "narrator", "value": "b"}],
    [{"role": "user", "content": "a"}] * 20_000,
    list(range(10_000)),
    [2**40, -5],
    [1.0, 2.0],
    [float("nan")],
    DEEP,
    "[1",
    '["\\ud800"]',
    '[{"from": "human", "from": "gpt", "value": "a"}]',
    '{"$ref": "#"}',
    "[NaN]",
    "\ud800",
    "\0",
    b"\xff",
    {"self": {"self": {"self": []}}},
]
COLUMNS = {
    "messages": ("messages", "prompt", "completion", "tools", "functions"),
    "sharegpt": ("conversations", "conversation", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt": ("question", "answer"),
    "text": ("text", "content", "document"),
    "tokens": ("input_ids", "labels", "loss_mask", "attention_mask"),
}
GOOD = {
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "a", "output": "b"},
    "prompt": {"question": "a", "answer": "b"},
    "text": {"text": "a"},
    "tokens": {"input_ids": [1, 2]},
}


def read(shape, row: dict) -> None:
    """Reads a row as a source and its task do."""
    canonical = shape.canonical(row, "rows:1")
    FORMS[shape.form][1](canonical, "rows:1")
    content_of((of_chat if shape.form == "conversation" else of_text)(canonical))


@pytest.mark.parametrize(("name", "column"), [(name, column) for name, some in COLUMNS.items() for column in some])
def test_any_value_in_any_column_is_read_or_refused_with_its_place(name, column) -> None:
    shape = SHAPES[name]
    for value in HOSTILE:
        for row in ({column: value}, GOOD[name] | {column: value}):
            assert shape.fits(row) in (True, False)
            with suppress(DataError):
                choice_of(Source(path="rows"), shape.form, [(row, "rows:1")])
            try:
                read(shape, row)
            except DataError as error:
                assert error.where == "rows:1" and len(str(error)) < 1500, str(error)[:2000]


def test_any_value_in_a_pattern_is_read_or_refused_with_its_place() -> None:
    for pattern in ("{a}", "{a.b}", "{a[0]}", "{a[-1].b[2]}", "{a[0][0][0]}"):
        shape = shape_of({"prompt": "q", "completion": pattern}, "conversation")
        for value in HOSTILE:
            try:
                read(shape, {"a": value})
            except DataError as error:
                assert error.where == "rows:1"


@pytest.mark.parametrize("name", COLUMNS)
def test_the_good_row_of_these_tests_is_read(name) -> None:
    read(SHAPES[name], GOOD[name])


def test_hostile_files_are_read_or_refused(tmp_path) -> None:
    lines = [
        '{"messages": ' + DEEP + "}",
        '{"messages": "\\ud800"}',
        '{"messages": 1e999}',
        '{"messages": ' + "9" * 5000 + "}",
    ]
    for line in lines:
        (tmp_path / "rows.jsonl").write_text(line)
        with pytest.raises(DataError):
            open_source(Source(path=str(tmp_path / "rows.jsonl")), form="conversation")
    column = pyarrow.array([[{"from": "human", "value": None}], None])
    parquet.write_table(pyarrow.table({"conversations": column}), tmp_path / "rows.parquet")
    with pytest.raises(DataError):
        FORMS["conversation"][1](open_source(Source(path=str(tmp_path / "rows.parquet")), form="conversation")[0], "x")


def test_a_large_row_of_json_text_is_read(tmp_path) -> None:
    turns = [{"from": ("human", "gpt")[number % 2], "value": str(number)} for number in range(20_000)]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversations": json.dumps(turns)}))
    rows = open_source(Source(path=str(tmp_path / "rows.jsonl")), form="conversation")
    assert len(rows[0]["messages"]) == 20_000
