"""A conversation with a model: what it is given each time, and what it is not given any more."""

import json
import shutil

import pytest

from finetune.compare import chat as chatting
from finetune.compare.chat import Chat
from finetune.compare.generation.answerer import Answerer, open_answerer
from finetune.compare.generation.answers import Generated
from finetune.compare.generation.settings import Settings
from finetune.errors import BaseError, DataError, FinetuneError


@pytest.fixture(scope="module")
def answerer(tiny_base) -> Answerer:
    return open_answerer(str(tiny_base))


@pytest.fixture
def given(answerer, monkeypatch) -> list[str]:
    """What the model is given, as text; it answers ` first `, ` second ` and so on."""
    found: list[str] = []
    words = iter(["first", "second", "third", "fourth"])

    def generated(answerer, questions, settings, listen):
        found.append(answerer.tokenizer.decode(questions[0].ids))
        word = next(words)
        listen(0, 0, f" {word[:2]}")
        yield Generated(0, 0, f" {word} ", 3, True)

    monkeypatch.setattr(chatting, "generated", generated)
    return found


def test_a_turn_follows_all_turns_before_it(answerer, given) -> None:
    chat, heard = Chat(answerer, "be short", Settings()), []
    for text in ("the model", "a row"):
        chat.answer(text, heard.append)
    assert "".join(heard) == " first  second "
    system = "<|im_start|>system\nbe short<|im_end|>\n"
    assert given[0] == f"{system}<|im_start|>user\nthe model<|im_end|>\n<|im_start|>assistant\n"
    assert given[1] == f"{given[0]}first<|im_end|>\n<|im_start|>user\na row<|im_end|>\n<|im_start|>assistant\n"
    chat.undo()
    chat.answer("again", heard.append)
    assert given[2] == given[1].replace("a row", "again")
    chat.reset()
    chat.answer("the model", heard.append)
    assert given[3] == given[0]


def test_a_question_that_is_refused_is_forgotten(answerer, given) -> None:
    chat = Chat(answerer, None, Settings())
    with pytest.raises(DataError, match=r"the conversation: a user message spells the control token `<\|im_end\|>`"):
        chat.answer("<|im_end|>", print)
    assert chat.messages == []
    with pytest.raises(FinetuneError, match="nothing to undo"):
        chat.undo()


def test_a_conversation_beyond_the_positions_is_refused_with_its_length(answerer) -> None:
    chat = Chat(answerer, None, Settings())
    with pytest.raises(DataError, match=r"the conversation: the prompt has \d\d\d tokens, and .* has 128 positions"):
        chat.answer("model " * 100, print)


def test_what_an_interrupt_leaves_of_an_answer_is_kept(answerer, monkeypatch) -> None:
    said = iter(["", "the model"])

    def interrupted(answerer, questions, settings, listen):
        listen(0, 0, next(said))
        raise KeyboardInterrupt

    monkeypatch.setattr(chatting, "generated", interrupted)
    chat = Chat(answerer, None, Settings())
    for kept in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            chat.answer("a", print)
        assert len(chat.messages) == kept
    assert chat.messages[1] == {"role": "assistant", "content": "the model"}


def test_an_empty_answer_does_not_end_a_conversation(answerer, monkeypatch) -> None:
    monkeypatch.setattr(chatting, "generated", lambda *_: iter([Generated(0, 0, "", 1, True)]))
    chat = Chat(answerer, None, Settings())
    chat.answer("a", print)
    chat.answer("a", print)
    assert [message["content"] for message in chat.messages] == ["a", "", "a", ""]


def test_samples_are_those_of_the_seed_and_the_turn(answerer) -> None:
    def session() -> list[str]:
        chat, heard = Chat(answerer, None, Settings(max_new_tokens=8, temperature=1.5)), []
        for _ in range(2):
            chat.answer("the model", heard.append)
            heard.append("|")
            chat.undo()
        return "".join(heard).split("|")[:2]

    first, again = session()
    assert first != again and session() == [first, again]


def test_a_saved_conversation_is_a_row_after_those_that_are_there(answerer, given, tmp_path) -> None:
    chat = Chat(answerer, "be short", Settings())
    with pytest.raises(FinetuneError, match="nothing to save"):
        chat.save(str(tmp_path / "rows.jsonl"))
    chat.answer("né", print)
    chat.save(str(tmp_path / "new.jsonl"))
    (tmp_path / "rows.jsonl").write_text('{"messages": []}')
    chat.save(str(tmp_path / "rows.jsonl"))
    chat.save(str(tmp_path / "rows.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    turns = [("system", "be short"), ("user", "né"), ("assistant", "first")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert rows == [{"messages": []}, row, row]
    assert json.loads((tmp_path / "new.jsonl").read_text()) == row
    with pytest.raises(FinetuneError, match=r"nowhere/rows.jsonl: cannot be written: No such file"):
        chat.save(str(tmp_path / "nowhere/rows.jsonl"))


def test_a_model_without_a_chat_template_is_refused_with_what_to_do_instead(tiny_base, tmp_path) -> None:
    directory = shutil.copytree(tiny_base, tmp_path / "base")
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(BaseError, match=r"has no chat template\nhint: .*`finetune generate .* --prompt TEXT`"):
        Chat(open_answerer(str(directory)), None, Settings())
