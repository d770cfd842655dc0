"""Answers of several models to the same prompts, on whatever machine."""

import gc
import json
import shutil
import weakref

import pytest
import torch

from finetune.compare import generate as generation
from finetune.compare import prompts
from finetune.compare.generate import generate
from finetune.compare.generation.answerer import open_answerer
from finetune.compare.generation.settings import Settings

FEW = Settings(max_new_tokens=3)
HELLO = prompts.of_text("hello", "prompt 1")


def without_template(base, to):
    directory = shutil.copytree(base, to)
    (directory / "chat_template.jinja").unlink()
    return directory


def test_a_build_of_torch_for_gpus_answers_on_a_machine_without_one(tiny_base, monkeypatch) -> None:
    def named(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", named)
    (answer,) = generate([str(tiny_base)], [HELLO], FEW)
    assert answer["prompt"] == "hello" and isinstance(answer["text"], str)


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt(tiny_base, tiny_tokenizer, tmp_path) -> None:
    directory = without_template(tiny_base, tmp_path / "base")
    content = json.loads((directory / "tokenizer.json").read_text())
    end = tiny_tokenizer.eos_token
    special = {end: {"id": end, "ids": [tiny_tokenizer.eos_token_id], "tokens": [end]}}
    parts = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": parts,
        "special_tokens": special,
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (question,) = prompts.questions_of(open_answerer(str(directory)), [prompts.of_text("the row", "")])
    assert question.ids == tiny_tokenizer("the row", add_special_tokens=False)["input_ids"]


@pytest.mark.slow
def test_answers_come_by_prompt_then_ref_then_sample(tiny_base, tmp_path) -> None:
    plain = without_template(tiny_base, tmp_path / "plain")
    some = [prompts.of_text("it has said what was asked of it", "p:1"), prompts.of_text("a", "p:2")]
    settings = Settings(max_new_tokens=4, temperature=1.0, samples=2)
    results = generate([str(tiny_base), str(plain)], some, settings)
    keys = [(one["where"], one["ref"], one["sample"]) for one in results]
    assert keys == [(f"p:{at}", str(ref), sample) for at in (1, 2) for ref in (tiny_base, plain) for sample in (0, 1)]
    alone = generate([str(plain)], some[1:], settings)
    assert alone == results[-2:], "neither other prompts nor other refs change an answer"


@pytest.mark.slow
def test_one_model_is_in_memory_at_a_time(tiny_base, tmp_path, monkeypatch) -> None:
    opened: list[weakref.ref] = []

    def opening(ref: str):
        assert not [model for model in opened if model() is not None]
        answerer = open_answerer(ref)
        opened.append(weakref.ref(answerer.model))
        return answerer

    monkeypatch.setattr(generation, "open_answerer", opening)
    gc.unfreeze()
    generate([str(tiny_base), str(shutil.copytree(tiny_base, tmp_path / "other"))], [HELLO], FEW)
    assert len(opened) == 2


def test_a_run_of_texts_continues_them_on_a_base_with_a_chat_template(recipe_file, train, tiny_base, tmp_path) -> None:
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the model reads a row {number}"}) + "\n" for number in range(8)))
    recipe = recipe_file(
        task={"name": "text", "max_length": 64},
        data={"train": [{"path": str(rows)}]},
        train={"steps": 1, "batch_size": 2, "precision": "fp32", "micro_batch_tokens": 128},
    )
    run = train(recipe, tmp_path / "run")
    for ref in (f"{run}@1", f"{run}@0"):
        answerer = open_answerer(ref)
        (question,) = prompts.questions_of(answerer, [prompts.of_text("the model", "")])
        assert answerer.tokenizer.decode(question.ids) == "the model"
        assert answerer.converse is not None, "you can still talk to it"


@pytest.mark.slow
def test_what_continues_a_text_keeps_its_blanks(tiny_base, tmp_path, monkeypatch) -> None:
    plain = without_template(tiny_base, tmp_path / "plain")
    monkeypatch.setattr(generation, "generated", lambda *_: iter([generation.Generated(0, 0, " a row\n", 3, True)]))
    texts = [generate([str(base)], [HELLO], FEW)[0]["text"] for base in (plain, tiny_base)]
    assert texts == [" a row\n", "a row"]
