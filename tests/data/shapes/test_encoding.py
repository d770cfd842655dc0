"""Rows of any shape become the tokens that the same rows as messages become, and nothing in them is lost in silence."""

import json

import pytest

from finetune.errors import DataError
from finetune.recipe.load import load
from finetune.training.resolve import resolve

ALPACA = [{"instruction": f"say {number}", "input": "", "output": f"it is {number}"} for number in range(8)]
MESSAGES = [
    {"messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]}
    for row in ALPACA
]
SHAREGPT = [
    {
        "conversations": [
            {"from": "human", "value": row["instruction"]},
            {"from": "gpt", "value": row["output"]},
        ]
    }
    for row in ALPACA
]


@pytest.fixture
def resolved(recipe_file, tmp_path):
    """A function from rows to what their recipe resolves to."""

    def resolved(rows, task="chat", holdout=3, **source):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"train": [{"path": str(file), **source}], "holdout": holdout}
        return resolve(load(recipe_file(data=data, task={"name": task, "max_length": 64})))

    return resolved


def sides(resolved) -> list[list[tuple[bytes, bytes]]]:
    parts = (resolved.train, resolved.holdout)
    return [[(bytes(part[n].tokens), bytes(part[n].supervised)) for n in range(len(part))] for part in parts]


def test_every_shape_becomes_the_same_tokens_on_the_same_sides(resolved) -> None:
    expected = resolved(MESSAGES)
    patterns = {"prompt": "{instruction}", "completion": "{output}", "skip": ["input"]}
    for rows, source in ((ALPACA, {}), (SHAREGPT, {}), (ALPACA, patterns)):
        other = resolved(rows, **source)
        assert sides(other) == sides(expected)
        assert other.held_out.digest == expected.held_out.digest


def test_a_column_that_the_shape_does_not_use_is_refused_or_named(resolved) -> None:
    rows = [{"question": f"say {n}", "answer": "yes", "context": f"in {n}", "id": n} for n in range(4)]
    with pytest.raises(
        DataError, match=r"(?s)lacks `context`\n.*\nhint: put it into a message, or into a pattern, or train"
    ):
        resolved(rows)
    assert resolved(rows, skip=["context"], holdout=0).train.columns == [["id", "prompt", "completion"]]
    resolved(rows, holdout=0, prompt="{context}: {question}", completion="{answer}")


def test_rows_of_tokens_are_trained_on_as_they_are(resolved) -> None:
    rows = [{"input_ids": [5, 6, 7, n], "labels": [-100, 6, -100, n]} for n in range(8, 12)]
    [train, _] = sides(resolved(rows, "text", holdout=1))
    assert len(train) == 3 and all(supervised == b"\0\1\0\1" for _, supervised in train)
    with pytest.raises(DataError, match=r"rows.jsonl:2: `input_ids\[0\]` is 99999999, and the base's tokenizer has"):
        resolved([rows[0], {"input_ids": [99999999, 5]}], "text", holdout=0)
