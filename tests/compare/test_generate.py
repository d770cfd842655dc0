"""Answers to a prompt, on whatever machine."""

import json
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from finetune.compare.generate import generate
from finetune.errors import BaseError


def test_a_build_of_torch_for_gpus_answers_on_a_machine_without_one(tiny_base, monkeypatch) -> None:
    def named(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", named)
    (answer,) = generate([str(tiny_base)], ["hello"], max_new_tokens=3, temperature=0.0, seed=0)
    assert answer["prompt"] == "hello" and isinstance(answer["text"], str)


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt(
    tiny_base, tiny_tokenizer, tmp_path, monkeypatch
) -> None:
    directory = shutil.copytree(tiny_base, tmp_path / "base")
    (directory / "chat_template.jinja").unlink()
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
    prompts = []
    monkeypatch.setattr(LlamaForCausalLM, "generate", lambda model, ids, **settings: prompts.append(ids) or ids)
    generate([str(directory)], ["the row"], max_new_tokens=3, temperature=0.0, seed=0)
    assert prompts[0].tolist() == [tiny_tokenizer("the row", add_special_tokens=False)["input_ids"]]


def test_what_transformers_raises_while_it_generates_is_one_error(tiny_base, monkeypatch) -> None:
    """Families without attention have caches that some versions of transformers cannot count."""

    def fails(model: LlamaForCausalLM, ids: torch.Tensor, **settings: object) -> None:
        raise ValueError("`get_seq_length` can only be called on Attention layers")

    monkeypatch.setattr(LlamaForCausalLM, "generate", fails)
    with pytest.raises(
        BaseError, match=r"transformers cannot generate with it \(ValueError: `get_seq_length` can only"
    ):
        generate([str(tiny_base)], ["the row"], max_new_tokens=3, temperature=0.0, seed=0)
