"""Answers do not depend on what they are written with, and end where they should."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from finetune.compare.generation.answerer import Answerer, open_answerer
from finetune.compare.generation.answers import Generated, Question, generated
from finetune.compare.generation.sampling import Sampler, seed_of
from finetune.compare.generation.settings import Settings
from finetune.errors import BaseError, DataError, FinetuneError

TEXTS = ["the model", "a", "it has said what was asked of it and writes", "row", "an answer that ends"]
SAMPLED = Settings(max_new_tokens=8, temperature=1.5, samples=3)


@pytest.fixture(scope="module")
def answerer(tiny_base) -> Answerer:
    return open_answerer(str(tiny_base))


@pytest.fixture(scope="module")
def questions(answerer) -> list[Question]:
    return [Question(answerer.go_on({"text": text}, text), text) for text in TEXTS]


def found(answerer: Answerer, questions: Sequence[Question], settings: Settings) -> dict[tuple[str, int], Generated]:
    answers = generated(answerer, questions, settings)
    return {(questions[one.question].where, one.sample): one._replace(question=0) for one in answers}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [Settings(max_new_tokens=8), SAMPLED], ids=["likeliest", "sampled"])
def test_an_answer_does_not_depend_on_what_is_beside_it(answerer, questions, settings) -> None:
    together = found(answerer, questions, settings)
    assert len(together) == len(TEXTS) * settings.samples
    for size in (1, 2, 4):
        assert found(answerer, questions[::-1], replace(settings, batch_size=size)) == together
    for question in questions:
        alone = found(answerer, [question], settings)
        assert alone == {key: one for key, one in together.items() if key[0] == question.where}


def test_samples_are_those_of_the_seed(answerer, questions) -> None:
    first = found(answerer, questions, SAMPLED)
    assert found(answerer, questions, SAMPLED) == first
    assert found(answerer, questions, replace(SAMPLED, seed=1)) != first
    assert len({one.text for one in first.values()}) == len(first), "neither questions nor samples share their noise"


def test_without_a_temperature_each_token_is_the_likeliest_whatever_the_files_say(tiny_base, tmp_path) -> None:
    directory = shutil.copytree(tiny_base, tmp_path / "base")
    said = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0, "suppress_tokens": [5, 6, 7], "top_k": 1}
    (directory / "generation_config.json").write_text(json.dumps(said))
    answerer = open_answerer(str(directory))
    ids = answerer.go_on({"text": "the model"}, "")
    (one,) = generated(answerer, [Question(ids, "")], Settings(max_new_tokens=12))
    expected = list(ids)
    with torch.inference_mode():
        while len(expected) < len(ids) + 12 and expected[-1] not in answerer.stops:
            expected.append(int(answerer.model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    assert one.tokens == len(expected) - len(ids)
    assert one.text == answerer.tokenizer.decode(expected[len(ids) :], skip_special_tokens=True)


def test_samples_are_drawn_from_the_softmax_of_the_logits() -> None:
    count, logits = 4000, torch.tensor([2.0, 1.0, 0.0, -1.0, -4.0])
    sampler = Sampler(Settings(temperature=2.0), range(count), torch.device("cpu"))
    drawn = sampler(torch.zeros(count, 1, dtype=torch.long), logits.repeat(count, 1)).argmax(dim=-1)
    expected = torch.softmax(logits / 2, dim=-1)
    error = (torch.bincount(drawn, minlength=5) / count - expected).abs()
    assert (error < 4 * (expected * (1 - expected) / count).sqrt()).all()
    narrow = Sampler(Settings(temperature=2.0, top_p=0.5), range(count), torch.device("cpu"))
    kept = narrow(torch.zeros(count, 1, dtype=torch.long), logits.repeat(count, 1)).argmax(dim=-1)
    assert set(kept.tolist()) == {0, 1}


def test_the_seed_of_an_answer_is_that_of_its_question_and_sample() -> None:
    seeds = {
        seed_of(Settings(seed=seed), sample, ids) for seed in (0, 1) for sample in (0, 1) for ids in ([1, 2], [12])
    }
    assert len(seeds) == 8


def forced(monkeypatch: pytest.MonkeyPatch, answerer: Answerer, text: str, has_stop: bool = True) -> None:
    """Makes the model write a text, whatever it is asked."""
    ids = answerer.tokenizer(text, add_special_tokens=False)["input_ids"] + [*answerer.stops] * has_stop
    forward = LlamaForCausalLM.forward
    state = {"written": 0}

    def writes(self, *arguments, **named):
        output = forward(self, *arguments, **named)
        output.logits[:, -1, ids[min(state["written"], len(ids) - 1)]] = 1e9
        state["written"] += 1
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", writes)


def test_a_stop_token_ends_an_answer_and_is_counted_but_not_shown(answerer, questions, monkeypatch) -> None:
    forced(monkeypatch, answerer, "the model")
    (one,) = generated(answerer, questions[:1], Settings(max_new_tokens=50))
    count = len(answerer.tokenizer("the model", add_special_tokens=False)["input_ids"])
    assert one == Generated(0, 0, "the model", count + 1, True)


def test_an_answer_is_cut_at_the_most_tokens(answerer, questions, monkeypatch) -> None:
    forced(monkeypatch, answerer, "the model", has_stop=False)
    (one,) = generated(answerer, questions[:1], Settings(max_new_tokens=1))
    assert (one.tokens, one.is_stopped) == (1, False)


def test_a_stop_text_ends_an_answer_and_its_beginning_is_never_shown(answerer, questions, monkeypatch) -> None:
    forced(monkeypatch, answerer, "the row END of it")
    heard: list[str] = []
    settings = Settings(max_new_tokens=50, stop=("zzz", " END"))
    answers = generated(answerer, questions[:1], settings, lambda question, sample, text: heard.append(text))
    (one,) = answers
    assert (one.text, one.is_stopped) == ("the row", True)
    assert all("the row".startswith(text) for text in heard) and heard[-1] == "the row"


def test_a_listener_gets_whole_characters(answerer, questions, monkeypatch) -> None:
    forced(monkeypatch, answerer, "né 日本")
    heard: list[str] = []
    (one,) = generated(answerer, questions[:1], Settings(max_new_tokens=50), lambda *told: heard.append(told[2]))
    assert one.text == "né 日本" and all("né 日本".startswith(text) for text in heard)
    assert "né 日" in heard


def test_all_answers_end_when_it_is_over(answerer, questions) -> None:
    heard: list[str] = []
    settings = Settings(max_new_tokens=50, batch_size=2, temperature=1.0)
    answers = list(
        generated(answerer, questions, settings, lambda *told: heard.append(told[2]), lambda: len(heard) >= 6)
    )
    assert len(answers) == len(TEXTS) and sum(one.tokens for one in answers) <= 12


def test_what_writing_to_the_listener_raises_is_not_explained_by_the_model(answerer, questions) -> None:
    def broken(question: int, sample: int, text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        list(generated(answerer, questions, Settings(max_new_tokens=4), broken))


def test_a_question_that_leaves_no_room_is_refused_with_its_length(answerer) -> None:
    ids = [5] * answerer.positions
    with pytest.raises(DataError, match=r"^p:3: the prompt has 128 tokens, and .* has 128 positions\nhint: shorten"):
        generated(answerer, [Question(ids[:-1], "p:1"), Question(ids, "p:3")], Settings())
    with pytest.raises(DataError, match=r"p:4: the prompt is empty\n2 of 2 rows are refused"):
        generated(answerer, [Question(ids, "p:3"), Question([], "p:4")], Settings())


def test_an_answer_has_the_positions_that_its_question_leaves(answerer, questions) -> None:
    endless = replace(answerer, stops=frozenset())
    long = Question([5, 6] * 62, "long")
    settings = Settings(max_new_tokens=10)
    answers = found(endless, [*questions, long], settings)
    assert answers["long", 0].tokens == 4
    assert {one.tokens for (where, _), one in answers.items() if where != "long"} == {10}
    (huge,) = generated(endless, [long], Settings(max_new_tokens=10**12))
    assert huge.tokens == 4


def test_what_transformers_raises_while_it_generates_is_one_error(answerer, questions, monkeypatch) -> None:
    """Families without attention have caches that some versions of transformers cannot count."""

    def fails(model: LlamaForCausalLM, **settings: object) -> None:
        raise ValueError("`get_seq_length` can only be called on Attention layers")

    monkeypatch.setattr(LlamaForCausalLM, "generate", fails)
    with pytest.raises(BaseError, match=r"cannot generate with it \(ValueError: `get_seq_length` can only"):
        list(generated(answerer, questions, Settings(max_new_tokens=8)))


def test_too_many_answers_for_the_memory_say_so(answerer, questions, monkeypatch) -> None:
    def fails(model: LlamaForCausalLM, **settings: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LlamaForCausalLM, "generate", fails)
    with pytest.raises(FinetuneError, match=r"5 answers at once do not fit.*\nhint: lower --batch-size"):
        list(generated(answerer, questions, Settings(max_new_tokens=8)))
