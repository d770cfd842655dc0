"""Bases whose files are quantized: MXFP4 is trained and packaged as the numbers that it stands for, other kinds are refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.errors import BaseError
from finetune.model import base
from finetune.package import export, proof
from finetune.package.verify.verify import folder_findings
from finetune.recipe.load import load
from finetune.training.resolve import resolve

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


def edit(directory, **changes):
    said = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(said | changes))


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


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes", "gptq", "awq", "compressed-tensors", "unheard-of"])
@pytest.mark.parametrize("place", ["config", "text_config"])
def test_other_kinds_are_refused_before_a_library_asks_for_their_kernels(
    recipe_file, tiny_base, tmp_path, method, place
):
    directory = shutil.copytree(tiny_base, tmp_path / "small")
    said = {"quantization_config": {"quant_method": method, "bits": 4}}
    edit(directory, **(said if place == "config" else {"text_config": said}))
    with pytest.raises(BaseError) as caught:
        resolve(load(recipe_file(base={"checkpoint": str(directory)})))
    assert caught.value.message == f"is quantized already ({method}), and such weights cannot be trained"
    assert "the checkpoint that it was made from" in caught.value.hint


def test_a_base_is_not_quantized_twice(mxfp4):
    with pytest.raises(BaseError, match=r"base\.quantization: `nf4` cannot be made of a base that is quantized"):
        base.check_quantization(mxfp4)
