"""Bases whose files are quantized: they are trained and packaged as the numbers that they stand for; unknown kinds are refused."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.cli import cli
from finetune.errors import BaseError
from finetune.model import base
from finetune.model.base.damaged import name_of
from finetune.package import export, proof
from finetune.package.verify.verify import folder_findings, verify
from finetune.recipe.load import load
from finetune.recipe.schema import Base
from finetune.store.run import journal
from finetune.training.resolve import resolve
from tests.model.quantizing import edit, quantize
from tests.stories.same_run import assert_same_run
from tests.stories.workers import Killed, killed

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16}
SIZES |= {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 128}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory, tiny_tokenizer):
    """A tiny gpt-oss whose experts are stored as gpt-oss's are."""
    directory = tmp_path_factory.mktemp("bases") / "gpt_oss"
    config = AutoConfig.for_model("gpt_oss", vocab_size=300, pad_token_id=0, eos_token_id=2, **SIZES)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, width, height = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, height, width // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 122, (experts, height, width // 32), dtype=torch.uint8)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    edit(directory, quantization_config=MXFP4)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, {"name": "lora", "rank": 2}])
def test_what_mxfp4_stands_for_is_trained_and_packaged(trained, mxfp4, adapter):
    run = trained(
        "fp32",
        base={"checkpoint": str(mxfp4)},
        task={"name": "chat", "max_length": 64},
        train={"steps": 2, "batch_size": 6, "precision": "fp32"},
        optimizer={"learning_rate": 0.001},
        checkpoint={},
        adapter=adapter,
    )
    package = run.parent / "package"
    export.package(f"{run}@last", package, load=proof.load_here)
    for directory in (package, *([] if adapter else [run / "checkpoints/step-00000002"])):
        assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    tensors = load_file(package / "model.safetensors")
    assert not any(name.endswith(("_blocks", "_scales")) for name in tensors)
    experts = AutoModelForCausalLM.from_pretrained(mxfp4, dtype=torch.float32).model.layers[0].mlp.experts
    is_equal = torch.equal(tensors["model.layers.0.mlp.experts.down_proj"], experts.down_proj)
    assert is_equal == bool(adapter), "without an adapter experts are trained too"
    assert folder_findings(package)[1] == []


@pytest.mark.parametrize("method", ["aqlm", "torchao", "quanto", "spqr", "unheard-of"])
@pytest.mark.parametrize("place", ["config", "text_config"])
def test_other_kinds_are_refused_before_a_weight_is_read(recipe_file, tiny_base, tmp_path, method, place):
    directory = shutil.copytree(tiny_base, tmp_path / "small")
    said = {"quantization_config": {"quant_method": method, "bits": 4}}
    edit(directory, **(said if place == "config" else {"text_config": said}))
    with pytest.raises(BaseError) as caught:
        resolve(load(recipe_file(base={"checkpoint": str(directory)})))
    assert caught.value.message == f"is quantized already ({method}), and such weights cannot be trained"
    assert "the checkpoint that it was made from" in caught.value.hint


def test_a_base_is_not_quantized_twice(mxfp4):
    with pytest.raises(BaseError, match=r"base\.quantization: `nf4` cannot be made of a base that is quantized"):
        base.check_quantization(mxfp4, "nf4")


LORA = {"name": "lora", "rank": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "adapter"), [("fp8", LORA), ("fp8", None), ("GPTQ", LORA), ("nf4", LORA)])
def test_others_are_trained_resumed_and_packaged_as_plain_weights(
    kind, adapter, recipe_file, train, tiny_base, tmp_path
):
    numbers = quantize(tiny_base, tmp_path / "small", kind)
    train_section = {"steps": 4, "batch_size": 6, "precision": "fp32"}
    small = {"checkpoint": str(tmp_path / "small"), "quantization": "dequantized"}
    written = recipe_file(base=small, adapter=adapter, train=train_section)
    run = train(written, tmp_path / "run")
    with killed(after=3), pytest.raises(Killed):
        train(written, tmp_path / "interrupted")
    assert_same_run(run, train(written, tmp_path / "interrupted"))
    plain = shutil.copytree(tiny_base, tmp_path / "plain")
    save_file(numbers, plain / "model.safetensors", {"format": "pt"})
    same = recipe_file("plain", base={"checkpoint": str(plain)}, adapter=adapter, train=train_section)
    assert losses(train(same, tmp_path / "same")) == losses(run), "it is the training of the plain numbers"

    package = export.package(f"{run}@last", tmp_path / "package", load=proof.load_here)
    config = json.loads((tmp_path / "package/config.json").read_text())
    tensors = load_file(tmp_path / "package/model.safetensors")
    assert "quantization_config" not in config and tensors.keys() == numbers.keys()
    checks = {check["name"]: check["message"] for check in package["checks"]}
    assert checks["base"].startswith("it lies on the dequantized weights (")
    assert "small with the digest blake3:" in checks["base"]
    assert checks["base"].removeprefix("it lies on ") in (tmp_path / "package/README.md").read_text()
    report = verify(str(tmp_path / "package"))
    assert report["ok"] and f"it lies on {report['lies_on']}" == checks["base"]


def losses(run):
    return [step["loss"] for step in journal.steps(journal.read(run)).values()]


@pytest.mark.slow
def test_plan_says_what_is_trained(recipe_file, tiny_base, tmp_path):
    quantize(tiny_base, tmp_path / "small", "fp8")
    result = CliRunner().invoke(cli, ["plan", str(recipe_file(base={"checkpoint": str(tmp_path / "small")}))])
    said = "base: its files are quantized (fp8); you train the numbers that they stand for, written once to the cache"
    assert said in result.output
    plan = resolve(load(recipe_file(base={"checkpoint": str(tmp_path / "small")}))).plan
    assert plan.base.dequantized == "fp8"
    assert b"dequantized" not in resolve(load(recipe_file(base={"checkpoint": str(tiny_base)}))).plan.dump({})


BITS = "bitsandbytes, nf4"


@pytest.mark.slow
def test_files_of_bitsandbytes_stay_as_they_are_under_lora_alone(recipe_file, tiny_base, tmp_path):
    quantize(tiny_base, tmp_path / "small", "nf4")

    def pinned(adapter, **asked):
        return resolve(load(recipe_file(base={"checkpoint": str(tmp_path / "small"), **asked}, adapter=adapter))).plan

    kept = pinned(LORA)
    assert (kept.base.dequantized, kept.base.stored, kept.quantization) == (BITS, "nf4", "nf4")
    assert kept.base.notes == (f"its files are quantized ({BITS}), and stay so under the adapter",)
    for asked in ("stored", "nf4"):
        assert pinned(LORA, quantization=asked).base == kept.base
    for adapter, asked in ((None, {}), (LORA, {"quantization": "dequantized"})):
        plan = pinned(adapter, **asked)
        assert (plan.base.dequantized, plan.base.stored, plan.quantization) == (BITS, None, None)
        assert b"stored" not in plan.base.model_dump_json().encode()
    again = pinned(LORA, quantization="int8")
    assert (again.base.stored, again.quantization) == (None, "int8")
    # a run of older code goes on with the numbers
    older = kept.model_copy(update={"base": kept.base.model_copy(update={"stored": None})})
    assert resolve(load(recipe_file(base={"checkpoint": str(tmp_path / "small")}, adapter=LORA)), older).plan == older


@pytest.mark.parametrize("kind", ["fp8", None])
def test_only_files_of_bitsandbytes_are_kept_as_stored(kind, recipe_file, tiny_base, tmp_path):
    directory = tmp_path / "small"
    quantize(tiny_base, directory, kind) if kind else shutil.copytree(tiny_base, directory)
    with pytest.raises(BaseError, match="base.quantization: `stored` keeps the bits of a checkpoint of bitsandbytes"):
        resolve(load(recipe_file(base={"checkpoint": str(directory), "quantization": "stored"}, adapter=LORA)))


def test_errors_name_a_quantized_base_as_its_user_does(tiny_base, tmp_path):
    quantize(tiny_base, tmp_path / "small", "nf4")
    named = Base(checkpoint=str(tmp_path / "small"))
    pinned = base.pin(named, is_adapted=True)
    for as_trained in (False, True):
        directory = base.directory(named, pinned, as_trained=as_trained)
        assert name_of(directory) == "small"
        assert "quantization_config" not in json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize(
    ("end", "said"), [("absmax", "5 scales for 2048 codes"), ("quant_map", "a table of 5 numbers do not hold")]
)
def test_stored_weights_are_checked_before_the_first_training(end, said, tiny_base, tmp_path):
    quantize(tiny_base, tmp_path / "small", "nf4")
    tensors = load_file(tmp_path / "small/model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith(f".{end}"))
    save_file(tensors | {name: tensors[name][:5].contiguous()}, tmp_path / "small/model.safetensors", {"format": "pt"})
    named = Base(checkpoint=str(tmp_path / "small"))
    with pytest.raises(BaseError, match=said):
        base.directory(named, base.pin(named, is_adapted=True), as_trained=True)


def test_an_adapter_on_a_quantized_base_is_merged_onto_its_numbers(tiny_base, tmp_path):
    import peft

    numbers = quantize(tiny_base, tmp_path / "small", "nf4")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base.load_model(tiny_base), config)
    torch.nn.init.normal_(adapted.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "small")
    adapted.save_pretrained(tmp_path / "adapter")
    named = Base(checkpoint=str(tmp_path / "adapter"))
    merged = load_file(base.directory(named, base.pin(named)) / "model.safetensors")
    name = "model.layers.0.{}.weight"
    assert torch.equal(merged[name.format("mlp.up_proj")], numbers[name.format("mlp.up_proj")].float())
    assert not torch.equal(merged[name.format("self_attn.q_proj")], numbers[name.format("self_attn.q_proj")].float())
