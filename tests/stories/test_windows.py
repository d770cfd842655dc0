"""Bases that attend in their own way: within a window, with capped scores. Packing them changes speed, not what is learnt."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from finetune.compare.evaluate import evaluate
from finetune.compare.measure import of_model
from finetune.package import export
from finetune.recipe.load import load
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.training.opened import open_model
from finetune.training.run import train as train_run

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}
KINDS = {"mistral": {}, "gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}}


@pytest.fixture(params=KINDS)
def base(request, tiny_tokenizer, tmp_path: Path) -> Path:
    return made(request.param, KINDS[request.param], tiny_tokenizer, tmp_path / "base")


def made(kind: str, settings: dict, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | settings | own)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_rows_longer_than_the_window_give_the_same_losses_packed_and_padded(base, recipe_file, train, tmp_path) -> None:
    losses = {}
    for packing in (True, False):
        task = {"name": "chat", "max_length": 64, "packing": packing}
        recipe = recipe_file(f"packing-{packing}", base={"checkpoint": str(base)}, task=task, adapter=None)
        run = train(recipe, tmp_path / f"run-{packing}", "train.steps=4")
        losses[packing] = [record["loss"] for record in journal.steps(journal.read(run)).values()]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True][-1] < losses[True][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("phimoe", {"num_local_experts": 2, "num_experts_per_tok": 1}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"], "num_experts": 0}),
    ],
)
def test_a_base_with_modules_that_run_by_row_gives_the_same_losses_packed_and_padded(
    kind, settings, tiny_tokenizer, recipe_file, train, tmp_path
):
    base = {"checkpoint": str(made(kind, settings, tiny_tokenizer, tmp_path / "base"))}
    losses = {}
    for packing in (True, False):
        task = {"name": "chat", "max_length": 64, "packing": packing}
        run = train(
            recipe_file(f"by-row-{packing}", base=base, task=task, adapter=None),
            tmp_path / f"{kind}-{packing}",
            "train.steps=2",
        )
        losses[packing] = [record["loss"] for record in journal.steps(journal.read(run)).values()]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


@pytest.mark.slow
def test_a_packed_run_of_such_a_base_resumes_to_the_bit_and_is_evaluated(tiny_tokenizer, recipe_file, train, tmp_path):
    base = {
        "checkpoint": str(
            made("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}, tiny_tokenizer, tmp_path / "base")
        )
    }
    recipe = recipe_file(base=base, checkpoint={"every": "2 steps"})
    whole = train(recipe, tmp_path / "whole", "train.steps=4", "train.activation_checkpointing=true")
    run = tmp_path / "run"
    train_run(load(recipe, ["train.steps=4"]), run, until=2, is_quiet=True)
    train(recipe, run, "train.steps=4")
    one, two = (journal.steps(journal.read(each)) for each in (whole, run))
    assert all(journal.difference(one[step], two[step]) is None for step in one)
    assert RunDirectory(run).plan()[0].arrangement == "packed"
    packed = evaluate([f"{run}@last"], None, [], is_again=True)[0]["metrics"]["loss"]
    plain = of_model(open_model(f"{run}@last").model, run)["loss"]
    assert packed == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_such_a_base_is_packaged(base, recipe_file, train, tmp_path) -> None:
    run = train(recipe_file(base={"checkpoint": str(base)}), tmp_path / "run", "train.steps=2")
    export.package(f"{run}@last", tmp_path / "package")  # compares the logits of what it wrote
    assert AutoConfig.from_pretrained(tmp_path / "package").sliding_window == 6
