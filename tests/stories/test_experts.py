"""Bases with experts: trained, resumed, replayed, packaged and loaded by other programs."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.debug.replay import replay
from finetune.errors import BaseError
from finetune.hosts import health
from finetune.model.base import refuse_unquantized
from finetune.package import export, proof
from finetune.package.verify.verify import verify
from finetune.recipe.load import load
from finetune.store.run import journal
from finetune.store.run.inspect import log
from finetune.store.run.row_losses import Reader
from finetune.training import build, starving
from finetune.training.preview import preview
from finetune.training.run import train as train_run
from tests import forks
from tests.stories.same_run import assert_same_run
from tests.stories.test_processes import wait_for_step

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
    def recipe(
        kind: str = "qwen3_moe", name: str = "tiny", train: dict | None = None, top_k: int = 2, **sections
    ) -> Path:
        train = {"steps": 3, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128, **(train or {})}
        sections = {"adapter": FUSED, "checkpoint": {"every": "2 steps"}, **sections}
        base = {"checkpoint": str(random_base(kind, num_experts_per_tok=top_k)), "origin": "owner/tiny"}
        return recipe_file(name, **{"base": base, "train": train, **sections})

    return recipe


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe"])
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


@pytest.mark.slow
def test_the_balance_of_a_step_does_not_depend_on_processes_and_resumes_exactly(recipe, finetune, tmp_path):
    path = recipe(adapter=None, train={"router_loss": 0.1, "batch_size": 9, "micro_batch_tokens": 64})
    train_run(load(path), tmp_path / "whole", is_quiet=True)
    train_run(load(path), tmp_path / "cut", is_quiet=True, until=2)
    train_run(load(path), tmp_path / "cut", is_quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    result = finetune("launch", "--nproc-per-node", "2", path, "--run", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    one, two = (journal.steps(journal.read(tmp_path / name)) for name in ("whole", "two"))
    columns, others = (Reader(tmp_path / name) for name in ("whole", "two"))
    for step in (1, 2, 3):
        for name in ("loss", "router_loss", "grad_norm"):
            assert two[step][name] == pytest.approx(one[step][name], rel=1e-4), name
        assert one[step]["router_loss"] > 1, "what it is when all experts are loaded alike is 2, for two of four"
        load_of_step = columns.experts(step)
        assert list(load_of_step) == ["layers.0", "layers.1"]
        assert all(sum(each) == 2 * one[step]["tokens"] for each in load_of_step.values())
    assert columns.experts(1) == others.experts(1)
    plain = recipe(name="plain", adapter=None, train={"batch_size": 9, "micro_batch_tokens": 64})
    train_run(load(plain), tmp_path / "plain", is_quiet=True)
    bare = journal.steps(journal.read(tmp_path / "plain"))
    assert bare[1]["loss"] == one[1]["loss"] and bare[1]["grad_norm"] != one[1]["grad_norm"]
    assert "router_loss" not in bare[1]
    evaluated = [journal.evaluations(journal.read(tmp_path / name))[0] for name in ("plain", "whole")]
    assert evaluated[0] == evaluated[1], "held-out loss is without the balance"


@pytest.mark.slow
def test_a_planted_starving_expert_is_named(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(starving, "EVEN", 50)
    path = recipe(name="starving", train={"steps": 2, "batch_size": 9}, top_k=1)
    base = Path(load(path).recipe.base.checkpoint)
    tensors = stored(base)
    name = "model.layers.1.mlp.gate.weight"
    tensors[name][1], tensors[name][2] = -tensors[name][0], 0  # one of two opposite logits is above 0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    train_run(load(path), tmp_path / "run", is_quiet=True)
    told = capsys.readouterr().err
    assert "experts starve, with tokens of an even share: layers.1: expert 2 (" in told
    (incident,) = log(tmp_path / "run")["incidents"]
    assert incident["kind"] == "starving_experts" and "layers.1: expert 2" in incident["message"]
    facts = health.look(tmp_path / "run", 300)
    assert facts["ok"] and facts["warnings"] == [f"step {incident['step']}: {incident['message']}"]
    assert f"\n  warning: step {incident['step']}: experts starve" in health.listing({"ok": True, "runs": [facts]})


def test_a_planted_module_without_gradient_is_named(recipe_file, tmp_path, capsys, monkeypatch):
    made = build.trained_model

    def planted(*arguments: object) -> torch.nn.Module:
        model = made(*arguments)
        model.model.layers[1].mlp.planted = torch.nn.Linear(16, 16)
        return model

    monkeypatch.setattr(build, "trained_model", planted)
    path = recipe_file(adapter=None, train={"steps": 2, "batch_size": 6, "precision": "fp32"})
    train_run(load(path), tmp_path / "run", is_quiet=True)
    told = capsys.readouterr().err
    names = "model.layers.1.mlp.planted.weight, model.layers.1.mlp.planted.bias"
    assert "warning: step 1: 2 trained tensors got no gradient, 0.009" in told and names in told
    assert told.count("no gradient") == 1
    (incident,) = log(tmp_path / "run")["incidents"]
    assert incident["kind"] == "no_gradient" and names in incident["message"]
    assert health.look(tmp_path / "run", 300)["warnings"] == [f"step 1: {incident['message']}"]


def test_plan_counts_what_a_token_uses_and_forecasts_experts_in_their_type(recipe, random_base, tmp_path):
    def facts(**sections):
        return preview(load(recipe(**sections)), tmp_path / "run", lambda _: None)

    experts = 2 * 4 * 3 * 32 * 16
    whole = facts(adapter=None)
    assert whole.facts["total_parameters"] - whole.facts["active_parameters"] == experts // 2
    assert f"{whole.facts['active_parameters']:,} are used by a token" in whole.text
    halved = {"precision": "bf16"}
    lora, on_experts = facts(adapter={"name": "lora", "targets": ["q_proj"]}, train=halved), facts(train=halved)
    shown = lora.facts["weights"]["experts"]
    assert shown["bytes"] == 4 * shown["parameters"] == 4 * experts
    assert (lora.facts["memory"]["sums"], on_experts.facts["memory"]["sums"]) == (0, 4 * experts * 3 // 2)
    saved = facts(train=halved | {"activation_checkpointing": True})
    assert saved.facts["memory"]["sums"] == 4 * experts
    assert lora.facts["memory"]["weights"] >= 4 * experts
    plan = whole.resolved.plan
    older = plan.model_copy(update={"active_parameters": 0})
    assert plan.active_parameters and older.plan_id == plan.plan_id, "it decides nothing"
    assert b"active_parameters" not in older.dump({})


def test_a_balance_that_the_base_lacks_is_refused_in_the_plan(recipe_file, finetune, tmp_path):
    path = recipe_file(train={"steps": 2, "batch_size": 6, "precision": "fp32", "router_loss": "base"})
    result = finetune("plan", path, "--run", tmp_path / "run")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "train.router_loss: LlamaForCausalLM has no load-balancing loss" in result.stderr


def test_nf4_that_leaves_experts_as_they_are_is_refused_with_its_list(random_base, tiny_base):
    with pytest.raises(BaseError) as caught:
        refuse_unquantized(random_base("qwen3_moe"), "nf4")
    assert "would leave 33% of qwen3_moe as it is: experts 32%, mlp 1%" in str(caught.value)
    assert caught.value.where == "base.quantization"
    refuse_unquantized(tiny_base, "nf4")


@pytest.mark.slow
def test_a_kill_leaves_no_trace_in_the_run_or_in_the_load_of_its_experts(recipe, tmp_path):
    path = recipe(train={"steps": 40, "router_loss": 0.1})
    train_run(load(path), tmp_path / "whole", is_quiet=True)
    command = ["-m", "finetune", "train", str(path), "--run", str(tmp_path / "killed")]
    process = forks.Popen([sys.executable, *command])
    wait_for_step(tmp_path / "killed", 7)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    train_run(load(path), tmp_path / "killed", is_quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    whole, killed = (Reader(tmp_path / name) for name in ("whole", "killed"))
    assert all(whole.experts(step) and whole.experts(step) == killed.experts(step) for step in range(1, 41))
