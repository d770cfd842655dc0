"""Each shape is read from several spellings of it, and what the rows say is the same for every one."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from finetune.data.conversation import conversation_of
from finetune.data.plain_text import content_of as text_content_of
from finetune.data.shapes import SHAPES
from finetune.data.sources.open import open_source
from finetune.errors import DataError
from finetune.plan.split import content_of
from finetune.recipe.schema import Source
from finetune.tasks.content import of_chat, of_text

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds"}}
CALLING = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}, ANSWER]
HISTORY = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, USER, ANSWER]

SPELLINGS = {
    "messages": [
        ([USER, ANSWER], {"messages": [USER, ANSWER]}),
        ([USER, ANSWER], {"messages": json.dumps([USER, ANSWER])}),
        ([USER, ANSWER], {"prompt": "2 + 2?", "completion": "4"}),
        ([USER, ANSWER], {"prompt": [USER], "completion": [ANSWER]}),
        ([USER, ANSWER], {"messages": [{"role": "human", "content": "2 + 2?"}, {"role": "gpt", "content": "4"}]}),
        ([USER, ANSWER], {"messages": [{"from": "user", "value": "2 + 2?"}, {"from": "assistant", "value": "4"}]}),
        (
            [SYSTEM, USER, ANSWER],
            {
                "messages": [
                    {
                        "role": "developer",
                        "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
                    },
                    {"role": "user", "content": [{"type": "input_text", "text": "2 + 2?"}]},
                    {"role": "assistant", "content": [{"type": "output_text", "text": "4"}]},
                ]
            },
        ),
        (
            CALLING,
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2}'}},
                    {"role": "function", "content": "4"},
                    ANSWER,
                ],
                "functions": [TOOL["function"]],
                "parallel_tool_calls": False,
            },
        ),
        (CALLING, {"messages": CALLING, "tools": [TOOL]}),
    ],
    "sharegpt": [
        (
            [SYSTEM, USER, ANSWER],
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "2 + 2?"},
                    {"from": "gpt", "value": "4"},
                ]
            },
        ),
        (
            [SYSTEM, USER, ANSWER],
            {
                "system": "Be brief.",
                "conversations": [{"from": "Human", "value": "2 + 2?"}, {"from": "bard", "value": "4"}],
            },
        ),
        ([USER, ANSWER], {"system": "", "tools": "", "conversation": [USER, ANSWER]}),
        (HISTORY, {"conversations": ["hi", "hello", "2 + 2?", "4"], "source": "x"}),
        (HISTORY, {"conversation": [{"input": "hi", "output": "hello"}, {"input": "2 + 2?", "output": "4"}]}),
        ([SYSTEM, USER, ANSWER], {"system_prompt": "Be brief.", "items": [USER, ANSWER]}),
        (HISTORY, {"conversation": [{"human": "hi", "assistant": "hello"}, {"human": "2 + 2?", "assistant": "4"}]}),
        ([USER, ANSWER], {"dialog": [{"user": "human", "text": "2 + 2?"}, {"user": "bot", "text": "4"}]}),
        ([USER, ANSWER], {"conversations": '[{"from": "user", "value": "2 + 2?"}, {"from": "model", "value": "4"}]'}),
        (
            CALLING,
            {
                "conversations": [
                    {"from": "human", "value": "2 + 2?"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
                    {"from": "observation", "value": "4"},
                    {"from": "gpt", "value": "4"},
                ],
                "tools": json.dumps([TOOL]),
            },
        ),
        (
            CALLING,
            {
                "conversations": [
                    {"role": "user", "content": "2 + 2?"},
                    {"role": "tool_call", "content": '[{"name": "add", "arguments": "{\\"a\\": 2}"}]'},
                    {"role": "function_response", "content": "4"},
                    {"role": "assistant", "content": "4"},
                ],
                "tools": [TOOL],
            },
        ),
    ],
    "alpaca": [
        ([USER, ANSWER], {"instruction": "2 + 2?", "output": "4"}),
        ([USER, ANSWER], {"instruction": "2 + 2?", "input": "", "output": "4"}),
        ([USER, ANSWER], {"instruction": "2 + 2?", "input": None, "output": "4", "system": None, "history": None}),
        (
            [{"role": "user", "content": "Add.\n2 + 2?"}, ANSWER],
            {"instruction": "Add.", "input": "2 + 2?", "output": "4", "history": []},
        ),
        ([SYSTEM, USER, ANSWER], {"instruction": "2 + 2?", "output": "4", "system": "Be brief."}),
        (HISTORY, {"instruction": "2 + 2?", "output": "4", "history": [["hi", "hello"]]}),
        (HISTORY, {"instruction": "2 + 2?", "output": "4", "history": '[["hi", "hello"]]'}),
    ],
    "prompt": [
        ([USER, ANSWER], {question: "2 + 2?", answer: "4", "id": 7})
        for question, answer in [
            ("question", "answer"),
            ("query", "response"),
            ("instruction", "response"),
            ("input", "output"),
            ("prompt", "response"),
        ]
    ]
    + [
        ([USER, ANSWER], {"question": "2 + 2?", "answer": 4, "system": ""}),
        (HISTORY, {"query": "2 + 2?", "response": "4", "history": [["hi", "hello"]]}),
        ([SYSTEM, USER, ANSWER], {"system_prompt": "Be brief.", "question": "2 + 2?", "response": "4"}),
        ([SYSTEM, USER, ANSWER], {"query": "2 + 2?", "response": "4", "history": [], "system": "Be brief."}),
    ],
}


@pytest.fixture
def opened(tmp_path):
    """A function from rows to the source that reads them, from JSON Lines or from Parquet."""

    def opened(rows: list[dict], kind="jsonl", form="conversation", **keys):
        path = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            names = dict.fromkeys(name for row in rows for name in row)
            parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), path)
        return open_source(Source(path=str(path), **keys), form=form)

    return opened


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json-in-parquet"])
@pytest.mark.parametrize(
    ("name", "expected", "row"), [(name, *each) for name, some in SPELLINGS.items() for each in some]
)
def test_a_spelling_of_a_shape_is_recognised_and_says_the_same(opened, kind, name, expected, row) -> None:
    if kind == "json-in-parquet":
        row = {name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
        if "prompt" in row and row["prompt"][0] == "[":
            return  # a prompt is text, whatever it spells
    rows = opened([row], kind.rpartition("-")[2])
    assert rows.choice.name == name
    conversation = conversation_of(rows[0], "rows:1")
    without_empty = [{k: v for k, v in message.items() if v != ""} for message in conversation.messages]
    assert without_empty == expected
    assert content_of(of_chat(rows[0])) == content_of(expected)
    assert conversation.tools == ([TOOL] if expected == CALLING and ("tools" in row or "functions" in row) else None)


def test_rows_that_say_the_same_in_different_shapes_are_on_one_side(opened) -> None:
    same = [row for some in SPELLINGS.values() for expected, row in some if expected == [USER, ANSWER]]
    assert len({content_of(of_chat(opened([row])[0])) for row in same}) == 1 and len(same) > 10


TEXTS = [
    ("a text", {"text": "a text"}),
    ("a text", {"content": "a text", "id": 1}),
    ("a text", {"document": "a text"}),
    ("a text", {"text": "a text", "content": "another", "input_ids": [1]}),
    ("a text", {"text": "a text", "messages": [USER, ANSWER]}),
]
TOKENS = [
    (([5, 6, 7], [True] * 3), {"input_ids": [5, 6, 7]}),
    (([5, 6, 7], [True] * 3), {"input_ids": "[5, 6, 7]", "attention_mask": "[1, 1, 1]"}),
    (([5, 6, 7], [False, True, True]), {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}),
    (([5, 6, 7], [False, True, True]), {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}),
    (([5, 6, 7], [False, True, True]), {"input_ids": [5, 6, 7], "assistant_masks": [False, True, True]}),
    (
        ([5, 6, 7], [False, True, True]),
        {"input_ids": [0, 5, 6, 7, 0], "labels": [-100, -100, 6, 7, -100], "attention_mask": [0, 1, 1, 1, 0]},
    ),
    (([5, 6, 7], [True] * 3), {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "token_type_ids": [0, 0, 0]}),
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("name", "expected", "row"), [("text", *each) for each in TEXTS] + [("tokens", *each) for each in TOKENS]
)
def test_a_spelling_of_text_and_of_tokens_is_recognised(opened, kind, name, expected, row) -> None:
    rows = opened([row], kind, "text")
    assert rows.choice.name == name
    assert text_content_of(rows[0], "rows:1") == expected


def test_tokens_with_equal_masks_are_on_one_side(opened) -> None:
    same = [row for expected, row in TOKENS if expected[1][0] is False]
    assert len({content_of(of_text(opened([row], form="text")[0])) for row in same}) == 1


def test_a_text_row_without_text_is_not_taken_for_tokens(opened) -> None:
    rows = opened([{"text": "a"}, {"text": None, "input_ids": [1, 2]}], form="text")
    with pytest.raises(DataError, match="`text` must be text, not null"):
        text_content_of(rows[1], "rows:2")


def test_structs_of_datasets_with_nulls_are_read_as_absent_fields(opened) -> None:
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "hi", "weight": None},
                {"from": "gpt", "value": "ho", "weight": 1},
            ]
        },
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "Be brief."},
    ]
    [first, second] = [conversation_of(row, "rows") for row in opened(rows, "parquet")]
    assert first.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert second.messages == [SYSTEM, *first.messages]


def test_a_row_with_two_shapes_is_refused_with_both_named(opened) -> None:
    row = {"conversations": [USER, ANSWER], "instruction": "2 + 2?", "output": "4"}
    with pytest.raises(DataError, match="has the shape of `sharegpt` and of `alpaca`\nhint: say which: "):
        opened([row])
    assert conversation_of(opened([row], format="alpaca", skip=["conversations"])[0], "").messages == [USER, ANSWER]


def test_two_columns_that_could_be_the_answer_are_refused(opened) -> None:
    row = {"question": "2 + 2?", "answer": "4", "response": "four"}
    for form in ("auto", "prompt"):
        with pytest.raises(
            DataError, match="has `answer` and `response`: each could be the answer\nhint: say which, with"
        ):
            opened([row], format=form)
    rows = opened([row], skip=["response"])
    assert rows.choice.name == "prompt"


def test_the_first_row_that_has_a_shape_decides_and_others_are_refused_with_what_they_have(opened) -> None:
    rows = opened([{"instruction": "a", "output": "b"}, {"question": "a", "answer": "b"}])
    assert rows.choice.name == "alpaca"
    with pytest.raises(DataError) as caught:
        rows[1]
    assert str(caught.value).endswith(
        "rows.jsonl:2: does not fit the format `alpaca`: it has no `instruction`; its columns are: answer, question\n"
        "hint: name another shape with data.train[].format, or write a pattern"
    )


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("sharegpt", {"conversations": None}, "`conversations` is null"),
        ("sharegpt", {"text": "a"}, "it has no `conversations`"),
        ("alpaca", {"instruction": "a", "output": None}, "`output` is null"),
        ("prompt", {"question": None, "answer": "a"}, "`question` is null"),
        ("prompt", {"text": "a"}, "no column is known as the question"),
    ],
)
def test_a_row_of_another_shape_is_refused_with_what_it_has(name, row, message) -> None:
    with pytest.raises(DataError) as caught:
        SHAPES[name].canonical(row, "rows:1")
    assert str(caught.value).startswith(
        f"rows:1: does not fit the format `{name}`: {message}; its columns are: {', '.join(sorted(row))}\nhint: "
    )


def test_two_shapes_are_refused_at_once_where_bad_rows_are_skipped(opened, tmp_path) -> None:
    row = {"conversations": [USER, ANSWER], "instruction": "2 + 2?", "output": "4"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="has the shape of"):
        open_source(Source(path=str(tmp_path / "rows.jsonl")), form="conversation", skips_bad=True)


def test_what_a_shape_makes_is_skipped_by_its_name(tmp_path) -> None:
    turns = [
        ("human", "2 + 2?"),
        ("function_call", '{"name": "add", "arguments": {}}'),
        ("observation", "4"),
        ("gpt", "4"),
    ]
    row = {"conversations": [{"from": who, "value": said} for who, said in turns], "tools": "[{}]", "system": "Add."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    source = Source(path=str(tmp_path / "rows.jsonl"), skip=["tools", "tool_calls", "system"])
    [made] = open_source(source, form="conversation")
    assert made.keys() == {"messages"} and made["messages"][1] == {"role": "assistant"}


def test_columns_without_a_use_stay_and_those_with_one_go(opened) -> None:
    row = opened([{"instruction": "a", "input": "", "output": "b", "id": 3}])[0]
    assert row == {"prompt": "a", "completion": "b", "id": 3}


def test_numbers_as_labels_are_answers_under_every_name(opened) -> None:
    for name in ("answer", "completion"):
        assert opened([{"prompt": "a", name: 1}])[0] == {"prompt": "a", "completion": "1"}


def test_a_turn_of_calls_with_other_calls_beside_them_is_refused(opened) -> None:
    call = {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {}})}
    rows = opened([{"conversations": [USER, call | {"tool_calls": None}, ANSWER]}])
    assert rows[0]["messages"][1]["tool_calls"][0]["function"]["name"] == "f"
    with pytest.raises(DataError, match=r"`conversations\[1\]` has calls in `value` and beside it"):
        opened([{"conversations": [USER, call | {"tool_calls": [{"name": "g", "arguments": {}}]}, ANSWER]}])[0]


def test_functions_that_a_message_shows_already_are_not_given_twice(opened) -> None:
    shown = {"role": "system", "content": f"You may call {json.dumps(TOOL['function'])}"}
    for row in ({"messages": [shown, USER, ANSWER]}, {"messages": [USER, ANSWER], "system": shown["content"]}):
        row["functions"] = [TOOL["function"]]
        assert opened([row])[0] == row


def test_rows_of_runs_that_exist_stay_as_they_were(opened) -> None:
    for row in (
        {"messages": [{"role": "developer", "content": "x"}, USER, ANSWER], "conversations": []},
        {"messages": [USER, ANSWER], "question": "a", "answer": "b", "instruction": "c", "output": "d"},
        {"prompt": "a", "completion": "b", "question": "c"},
        {"prompt": '[{"role": "user"}]', "completion": "[1]"},
    ):
        assert opened([row])[0] == row
    row = {"text": "a", "content": "b", "document": "c", "input_ids": [1]}
    assert opened([row], form="text")[0] == row


def test_a_field_of_messages_is_skipped_in_json_text_too(opened) -> None:
    turns = [{"from": "human", "value": "2 + 2?", "mood": "x"}, {"from": "gpt", "value": "4"}]
    for value in (turns, json.dumps(turns)):
        assert opened([{"conversations": value}], skip=["mood"])[0] == {"messages": [USER, ANSWER]}
    row = {"prompt": '[{"mood": 1}]', "completion": "4"}
    assert opened([row], skip=["mood"])[0] == row
