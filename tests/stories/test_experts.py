"""Bases with experts: trained, resumed, replayed, packaged and loaded by other programs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.debug.replay import replay
from finetune.package import export, proof
from finetune.package.verify.verify import verify
from finetune.recipe.load import load
from finetune.training.run import train as train_run
from tests.stories.same_run import assert_same_run

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4}
SIZES |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
SIZES |= {"max_position_embeddings": 128, "initializer_range": 0.1, "vocab_size": 300, "eos_token_id": 2}
FUSED = {"name": "lora", "rank": 4, "alpha": 6, "targets": ["q_proj"], "parameters": ["experts.*"]}


@pytest.fixture(scope="session")
def random_base(tmp_path_factory, tiny_tokenizer):
    """A function that writes a random model of a family with experts."""

    def random_base(kind: str, **settings: object) -> Path:
        directory = tmp_path_factory.mktemp("experts") / kind
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings}))
        made.save_pretrained(directory)
        tiny_tokenizer.save_pretrained(directory)
        return directory

    return random_base


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in directory.glob("*.safetensors") for name, one in load_file(file).items()}


@pytest.fixture
def recipe(recipe_file, random_base):
    def recipe(kind: str = "qwen3_moe", name: str = "tiny", train: dict | None = None, **sections: object) -> Path:
        train = {"steps": 3, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128, **(train or {})}
        sections = {"adapter": FUSED, "checkpoint": {"every": "2 steps"}, **sections}
        base = {"checkpoint": str(random_base(kind)), "origin": "owner/tiny"}
        return recipe_file(name, **{"base": base, "train": train, **sections})

    return recipe


def test_lora_on_experts_resumes_exactly_replays_and_merges_expert_by_expert(recipe, tmp_path):
    path = recipe()
    train_run(load(path), tmp_path / "whole", is_quiet=True)
    train_run(load(path), tmp_path / "cut", is_quiet=True, until=2)
    train_run(load(path), tmp_path / "cut", is_quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert replay(tmp_path / "whole", 3, 3)["identical"]
    export.package(f"{tmp_path}/whole@last", tmp_path / "package", load=proof.load_here)
    assert verify(str(tmp_path / "package"))["problems"] == []
    checkpoint = tmp_path / "whole/checkpoints/step-00000003"
    adapter, merged = stored(checkpoint), stored(tmp_path / "package")
    base = stored(Path(load(path).recipe.base.checkpoint))
    prefix = "model.layers.1.mlp.experts"
    left, right = (adapter[f"base_model.model.{prefix}.lora_{each}.weight"] for each in "BA")
    assert left.abs().max() > 0
    for expert in range(4):  # of peft's layout: A (experts * rank, in), B (out, rank * experts)
        change = 6 / 4 * left.reshape(32, 4, 4)[:, :, expert] @ right.reshape(4, 4, 16)[expert]
        name = f"{prefix}.{expert}.down_proj.weight"
        torch.testing.assert_close(merged[name], base[name] + change, rtol=0, atol=1e-7)
        assert not torch.equal(merged[name], base[name])


@pytest.mark.parametrize("kind", ["qwen3_moe", pytest.param("glm4_moe", marks=pytest.mark.slow)])
def test_an_adapter_on_experts_alone_is_loaded_by_peft_in_plain_transformers(kind, recipe, tmp_path):
    import peft

    path = recipe(kind, adapter={"name": "lora", "rank": 2}, package={"form": "adapter"})
    train_run(load(path), tmp_path / "run", is_quiet=True)
    export.package(f"{tmp_path}/run@last", tmp_path / "adapter", load=proof.load_here)
    base = load(path).recipe.base.checkpoint
    whole = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    export.package(f"{tmp_path}/run@last", tmp_path / "merged", load=proof.load_here, dtype="fp32")
    tokens = torch.arange(2, 40)[None]
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_parameters"]
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        logits, merged, before = (
            model(tokens, use_cache=False).logits for model in (whole, whole.merge_and_unload(), plain)
        )
    torch.testing.assert_close(logits, merged, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits, before, atol=1e-3)
