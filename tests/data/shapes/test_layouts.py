"""The layouts of published data sets: which format their first row has, or how it is refused."""

from typing import get_args

import pytest

from finetune.data.conversation import conversation_of
from finetune.data.shapes import SHAPES
from finetune.data.shapes.choice import choice_of
from finetune.errors import DataError
from finetune.recipe.schema import Source
from finetune.recipe.schema.data import Format

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARE = [{"from": "human", "value": "a", "weight": 0.0}, {"from": "gpt", "value": "b", "weight": 1.0}]

LAYOUTS = {
    "messages": [
        {"prompt": "a", "prompt_id": "1", "messages": CHAT},
        {"source": "s", "problem": "a", "solution": "b", "messages": CHAT},
        {"id": "1", "messages": CHAT, "source": "s"},
        {"messages": CHAT, "tools": "[]", "chat_template_kwargs": {}},
    ],
    "sharegpt": [
        {"conversations": SHARE},
        {"id": "1", "items": SHARE},
        {"conversations": SHARE, "source": "s", "system_prompt": None, "category": None, "language": None},
        {"conversation": [{"input": "a", "output": "b"}], "source": "s"},
        {"conversation_id": 1, "conversation": [{"human": "a", "assistant": "b"}], "category": "c"},
        {"conversations": ["a", "b"], "source": "s"},
    ],
    "alpaca": [
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "output": "b", "text": "Below is an instruction"},
        {"instruction": "a", "input": "", "output": "b", "file": "f"},
    ],
    "prompt": [
        {"instruction": "a", "context": "", "response": "b", "category": "c"},
        {"question": "a", "answer": "b"},
        {"id": "1", "system_prompt": "s", "question": "a", "response": "b"},
        {"type": "t", "query": "a", "original_question": "q", "response": "b"},
        {"lang": "py", "seed": "s", "problem": "a", "solution": "b"},
        {"inputs": "a", "targets": "b", "language": "l", "user_id": "u"},
        {"kind": "k", "input": "a", "target": "b"},
    ],
    "text": [
        {"text": "a", "meta": {"source": "s"}},
        {"id": "1", "url": "u", "title": "t", "text": "a"},
        {"content": "a", "path": "p", "size": 3},
    ],
    "tokens": [{"input_ids": [1, 2], "attention_mask": [1, 1]}, {"input_ids": [1, 2], "labels": [-100, 2]}],
}
REFUSED = [
    {"id": "1", "context": "c", "question": "a", "answers": {"text": ["b"], "answer_start": [0]}},
    {"id": "1", "dialogue": "a: hi", "summary": "b"},
    {"article": "a", "highlights": "b", "id": "1"},
    {"ctx": "a", "endings": ["b", "c"], "label": "1"},
    {"instruction": "a", "input": "c", "response": "b"},
    {"system": "s", "chat": "USER: a ASSISTANT: b"},
]


def chosen(row: dict, form: str):
    return choice_of(Source(path="rows"), form, [(row, "rows:1")])


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, some in LAYOUTS.items() for row in some])
def test_the_layout_of_a_published_data_set_is_recognised(name, row) -> None:
    assert chosen(row, SHAPES[name].form).name == name


@pytest.mark.parametrize("row", REFUSED)
def test_a_layout_with_several_readings_asks_for_a_pattern(row) -> None:
    with pytest.raises(DataError, match=r"hint: .*pattern"):
        conversation_of(chosen(row, "conversation").shape.canonical(row, "rows:1"), "rows:1")


def test_every_format_of_the_recipe_is_a_shape() -> None:
    assert {*get_args(Format)} == {"auto", *SHAPES}
