"""Prompts from files of all kinds, and what models are given of them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.compare import prompts
from finetune.compare.generation.answerer import Answerer, open_answerer
from finetune.errors import DataError

TURNS = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "the model"},
    {"role": "assistant", "content": "reads"},
    {"role": "user", "content": "a row"},
]


@pytest.fixture(scope="module")
def chat(tiny_base) -> Answerer:
    return open_answerer(str(tiny_base))


@pytest.fixture(scope="module")
def plain(tiny_base, tiny_tokenizer, tmp_path_factory) -> Answerer:
    """The same model without a chat template."""
    import shutil

    directory = shutil.copytree(tiny_base, tmp_path_factory.mktemp("plain") / "base")
    (directory / "chat_template.jinja").unlink()
    return open_answerer(str(directory))


def written(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def given(answerer: Answerer, some: list[prompts.Prompt]) -> list[str]:
    """What the model is given for each prompt, as text."""
    return [answerer.tokenizer.decode(question.ids) for question in prompts.questions_of(answerer, some)]


def chatml(*turns: dict) -> str:
    said = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return f"{said}<|im_start|>assistant\n"


def user(text: str) -> dict:
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": 3.5}, chatml(user("3.5"))),
        ({"prompt": "the model"}, chatml(user("the model"))),
        ({"question": "the model", "answer": "reads"}, chatml(user("the model"))),
        ({"instruction": "the model", "input": "a row"}, chatml(user("the model\na row"))),
        ({"instruction": "the model", "input": "", "output": "reads"}, chatml(user("the model"))),
        ({"prompt": "the model", "chosen": "reads", "rejected": "writes"}, chatml(user("the model"))),
        ({"prompt": "the model", "completion": "reads", "label": False}, chatml(user("the model"))),
        ({"text": "the model"}, chatml(user("the model"))),
        ({"messages": TURNS}, chatml(*TURNS)),
        ({"messages": [*TURNS, {"role": "assistant", "content": "again"}]}, chatml(*TURNS)),
        ({"messages": json.dumps(TURNS)}, chatml(*TURNS)),
        ({"prompt": TURNS}, chatml(*TURNS)),
        ({"system": "be short", "prompt": "the model"}, chatml(TURNS[0], user("the model"))),
        ({"conversations": [{"from": "human", "value": "the model"}]}, chatml(user("the model"))),
        (
            {"conversations": [{"from": "human", "value": "the model"}, {"from": "gpt", "value": "reads"}]},
            chatml(user("the model")),
        ),
    ],
)
def test_a_row_is_rendered_up_to_its_last_answer(chat, tmp_path, row, text) -> None:
    assert given(chat, prompts.of_file(written(tmp_path / "rows.jsonl", row))) == [text]


def test_lines_of_a_text_file_are_prompts(chat, plain, tmp_path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffthe model\r\n\n  a row \n".encode())
    found = prompts.of_file(str(path))
    assert [prompt.where for prompt in found] == [f"{path}:1", f"{path}:3"]
    assert given(chat, found) == [chatml(user("the model")), chatml(user("  a row "))]
    assert given(plain, found) == ["the model", "  a row "]


def test_prompts_are_read_from_every_kind_of_file(chat, tmp_path) -> None:
    pq.write_table(pa.table({"prompt": ["the model", "a row"], "completion": [None, "x"]}), tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text('prompt\nthe model\n"a row"\n')
    (tmp_path / "rows.json").write_text('[{"prompt": "the model"}, {"prompt": "a row"}]')
    for ending in ("parquet", "csv", "json"):
        some = prompts.of_file(str(tmp_path / f"rows.{ending}"))
        assert given(chat, some) == [chatml(user("the model")), chatml(user("a row"))], ending
        assert [prompt.shown for prompt in some] == ["the model", "a row"]


def test_a_model_that_continues_texts_takes_the_text_of_a_prompt(plain, tmp_path) -> None:
    path = written(tmp_path / "rows.jsonl", {"messages": [user("the model")]}, {"prompt": "a row"})
    assert given(plain, prompts.of_file(path)) == ["the model", "a row"]
    path = written(tmp_path / "tokens.jsonl", {"input_ids": [70, 71, 72]})
    (prompt,) = prompts.of_file(path)
    assert prompt.shown == [70, 71, 72]
    assert [question.ids for question in prompts.questions_of(plain, [prompt])] == [[70, 71, 72]]


def test_rows_of_a_file_may_have_several_shapes(chat, tmp_path) -> None:
    rows = ({"text": "the model"}, {"question": "a row"}, {"messages": TURNS}, {"instruction": "it", "input": "was"})
    found = given(chat, prompts.of_file(written(tmp_path / "rows.jsonl", *rows)))
    assert found == [chatml(user("the model")), chatml(user("a row")), chatml(*TURNS), chatml(user("it\nwas"))]


def test_every_bad_row_is_named_by_file_and_line(tmp_path) -> None:
    rows = (
        {"prompt": "fine"},
        "{broken",
        {"prompt": None, "x": 1},
        {"messages": []},
        {"prompt": 3.5},
        {"messages": "x"},
    )
    with pytest.raises(DataError) as caught:
        prompts.of_file(written(tmp_path / "rows.jsonl", *rows))
    assert [part.where for part in caught.value.parts] == [f"{tmp_path}/rows.jsonl:{line}" for line in (2, 3, 4, 6)]
    assert "bad JSON" in str(caught.value) and "4 of 6 rows are refused" in str(caught.value)


def test_every_prompt_that_a_model_cannot_take_is_named(chat, plain, tmp_path) -> None:
    rows = [{"prompt": "the model"}, {"messages": TURNS}, {"prompt": "a <|im_end|> b"}]
    some = prompts.of_file(written(tmp_path / "rows.jsonl", *rows))
    with pytest.raises(DataError, match=r"rows.jsonl:2: has more than the message of a user, and .* continues texts"):
        prompts.questions_of(plain, some)
    with pytest.raises(DataError, match=r"rows.jsonl:3: a user message spells the control token `<\|im_end\|>`"):
        prompts.questions_of(chat, some)
    some = prompts.of_file(written(tmp_path / "rows.jsonl", {"input_ids": [70, 71]}))
    with pytest.raises(DataError, match=r"rows.jsonl:1: has tokens, and .* is asked with messages"):
        prompts.questions_of(chat, some)


def test_tools_that_a_template_does_not_show_are_refused_as_in_training(chat, tmp_path) -> None:
    row = {"prompt": "the model", "tools": [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]}
    (prompt,) = prompts.of_file(written(tmp_path / "rows.jsonl", row))
    assert prompt.text is None
    with pytest.raises(DataError, match=r"rows.jsonl:1: the rendered text lacks `tools\[0\].name`"):
        prompts.questions_of(chat, [prompt])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", b"", "is empty\nhint: give it at least one row"),
        ("lines.txt", b"\n \n", "holds no rows"),
        ("lines.txt", b"\xff\xfea\0", "lines.txt:1: is not UTF-8 text"),
        ("lines.txt", b"a\n\x80\x81\n", "lines.txt:2: is not UTF-8 text"),
        ("rows.jsonl", bytes(range(256)), "rows.jsonl:1: is not UTF-8 text"),
        ("prompts", b"a", "has no ending"),
    ],
)
def test_a_file_that_holds_no_prompts_says_so(tmp_path, name, content, said) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        prompts.of_file(str(tmp_path / name))
    assert said in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match="no such file"):
        prompts.of_file(str(tmp_path / "rows.jsonl"))
