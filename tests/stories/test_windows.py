"""Bases that attend in their own way: within a window, with capped scores. Packing them changes speed, not what is learnt."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from finetune.errors import FinetuneError
from finetune.package import export
from finetune.store.run import journal

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


def test_rows_longer_than_the_window_give_the_same_losses_packed_and_padded(base, recipe_file, train, tmp_path) -> None:
    losses = {}
    for packing in (True, False):
        task = {"name": "chat", "max_length": 64, "packing": packing}
        recipe = recipe_file(f"packing-{packing}", base={"checkpoint": str(base)}, task=task, adapter=None)
        run = train(recipe, tmp_path / f"run-{packing}", "train.steps=4")
        losses[packing] = [record["loss"] for record in journal.steps(journal.read(run)).values()]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True][-1] < losses[True][0]


def test_a_base_whose_window_is_in_the_mask_alone_is_padded_and_refused_where_packing_is_named(
    tiny_tokenizer, recipe_file, train, tmp_path, capsys
):
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    base = {"checkpoint": str(made("phimoe", experts, tiny_tokenizer, tmp_path / "base"))}
    recipe = recipe_file(base=base, adapter=None)
    with pytest.raises(FinetuneError, match="task.packing: packed, this base would mix them"):
        train(recipe, tmp_path / "run", "train.steps=1", "task.packing=true")
    train(recipe, tmp_path / "padded", "train.steps=1")
    assert "rows are padded: packed, this base would mix them" in capsys.readouterr().err


@pytest.mark.slow
def test_such_a_base_is_packaged(base, recipe_file, train, tmp_path) -> None:
    run = train(recipe_file(base={"checkpoint": str(base)}), tmp_path / "run", "train.steps=2")
    export.package(f"{run}@last", tmp_path / "package")  # compares the logits of what it wrote
    assert AutoConfig.from_pretrained(tmp_path / "package").sliding_window == 6
