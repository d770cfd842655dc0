"""Bases whose embeddings and tokenizer differ in size, or whose head is tied: trained, committed, packaged, and opened by plain transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.errors import RecipeError
from finetune.package import export, proof
from finetune.package.verify.verify import verify
from finetune.recipe.load import load
from finetune.training.opened import open_model
from finetune.training.resolve import resolve

LORA = {"name": "lora", "rank": 2, "alpha": 4}


def made(base: Path, target: Path, rows: int, is_tied: bool = True, added: int = 0) -> Path:
    """A copy of a base with so many rows of embeddings, and so many added tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<extra_{number}>" for number in range(added)])
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=is_tied)
    torch.manual_seed(1)
    model.resize_token_embeddings(rows)
    if not is_tied:
        torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def stored_twice(directory: Path, factor: float = 1.0) -> None:
    """The head beside the embeddings that the config ties it to."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize(
    ("rows", "is_tied", "added"),
    [
        pytest.param(320, True, 0, id="padded"),
        pytest.param(305, True, 5, id="resized"),
        pytest.param(312, False, 5, id="resized and padded, untied"),
    ],
)
def test_every_row_of_the_embeddings_is_kept(trained, tiny_base, tmp_path, adapter, rows, is_tied, added) -> None:
    base = made(tiny_base, tmp_path / "base", rows, is_tied, added)
    train = {"steps": 2, "batch_size": 6, "precision": "fp32"}
    run = trained("fp32", base={"checkpoint": str(base)}, adapter=adapter, train=train, checkpoint={})
    package = run.parent / "package"
    export.package(f"{run}@last", package, load=proof.load_here)
    assert verify(str(package))["ok"]
    places = [package] if adapter else [package, run / "checkpoints/step-00000002"]
    for directory in places:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
        assert len(model.get_input_embeddings().weight) == len(model.lm_head.weight) == rows
        assert json.loads((directory / "config.json").read_text())["vocab_size"] == rows
        assert len(tokenizer) == 300 + added
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
    assert torch.equal(
        model.get_input_embeddings().weight, open_model(f"{run}@last").model.get_input_embeddings().weight
    )


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 2.0], ids=["equal", "different"])
def test_a_head_that_is_tied_and_stored_too_is_packaged_as_transformers_opens_it(
    trained, tiny_base, tmp_path, factor
) -> None:
    base = made(tiny_base, tmp_path / "base", 300)
    stored_twice(base, factor)
    opened = AutoModelForCausalLM.from_pretrained(base)
    is_tied = opened.lm_head.weight is opened.get_input_embeddings().weight
    train = {"steps": 2, "batch_size": 6, "precision": "fp32"}
    run = trained("fp32", base={"checkpoint": str(base)}, adapter=LORA, train=train, checkpoint={})
    package = run.parent / "package"
    export.package(f"{run}@last", package, load=proof.load_here)
    model = AutoModelForCausalLM.from_pretrained(package)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied == (factor == 1.0)


def problem(recipe: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        resolve(load(recipe))
    return str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_base, tmp_path, recipe_file) -> None:
    base = made(tiny_base, tmp_path / "base", 300, added=5)
    assert "its tokenizer has 305 tokens, its model only 300" in problem(recipe_file(base={"checkpoint": str(base)}))


def test_a_token_beyond_the_embeddings_is_refused_however_few_tokens_there_are(
    tiny_base, tmp_path, recipe_file
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    record = json.loads((base / "tokenizer.json").read_text())
    words = record["model"]["vocab"]
    word = max(words, key=words.get)
    words[word] += 7
    (base / "tokenizer.json").write_text(json.dumps(record))
    assert "its model only 300" in problem(recipe_file(base={"checkpoint": str(base)}))
