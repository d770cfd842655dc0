"""Quantized checkpoints are read as the numbers that they stand for, to the bit; damaged ones are refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import BaseError
from finetune.model import base
from finetune.recipe.schema import Base
from tests.model.quantizing import KINDS, edit, quantize


def opened(directory, with_weights=True):
    named = Base(checkpoint=str(directory))
    return base.directory(named, base.pin(named), with_weights)


def tensors_of(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_numbers_that_the_files_stand_for(kind, tiny_base, tmp_path):
    numbers = quantize(tiny_base, tmp_path / "small", kind)
    directory = opened(tmp_path / "small")
    found = tensors_of(directory)
    assert found.keys() == numbers.keys()
    assert {name for name in numbers if not torch.equal(found[name], numbers[name])} == set()
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    model = base.load_model(directory)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, numbers["model.layers.0.mlp.up_proj.weight"].float())


def changed(directory, change):
    """The files at `directory` with tensors that `change` edits in a dict."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def of_config(**said):
    def change(directory):
        config = json.loads((directory / "config.json").read_text())
        edit(directory, quantization_config=config["quantization_config"] | said)

    return change


def of_tensor(end, edited):
    def change(directory):
        def one(tensors):
            name = next(name for name in sorted(tensors) if name.endswith(end))
            if (tensor := edited(tensors.pop(name))) is not None:
                tensors[name] = tensor

        changed(directory, one)

    return change


def filled(value):
    return lambda tensor: torch.full_like(tensor, value)


def first(value):
    """The tensor with another first element."""

    def edited(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return edited


FIRST = "model.layers.0.mlp.down_proj"
DAMAGES = [
    ("fp8", of_tensor("weight_scale_inv", lambda _: None), f"lacks `{FIRST}.weight_scale_inv`, without which"),
    ("fp8", of_tensor("weight_scale_inv", first(float("nan"))), f"`{FIRST}.weight`: a weight is NaN or infinite"),
    ("fp8", of_tensor("weight_scale_inv", first(float("inf"))), f"`{FIRST}.weight`: a weight is NaN or infinite"),
    ("fp8", of_tensor("weight_scale_inv", first(0.0)), f"`{FIRST}.weight`: a scale is zero under weights that are not"),
    (
        "fp8",
        of_tensor("weight_scale_inv", lambda t: t.T.contiguous()),
        "scales of the shape [3, 2] do not fit a weight",
    ),
    ("fp8", of_tensor("weight_scale_inv", lambda t: t.int()), "its scales are int32, and are floats"),
    ("fp8", of_config(weight_block_size=[128, 128]), "do not fit a weight of [32, 64]: [1, 1] would"),
    ("fp8", of_config(weight_block_size=[0, 1e9]), "`weight_block_size` is [0, 1000000000.0]"),
    ("fp8", of_config(quant_method="__import__('os')"), "is quantized already (__import__('os')), and such weights"),
    ("fp8", of_config(quant_method=["fp8"]), "is quantized already (['fp8']), and such weights cannot be trained"),
    (
        "fp8",
        of_config(quant_method="gptq", bits=4),
        "says in its config that it is quantized (GPTQ with 4 bits), and no",
    ),
    ("GPTQ", of_config(bits="4; import os"), "`bits` is 4; import os, not 2 or 3 or 4 or 8"),
    ("GPTQ", of_config(bits=8), "4 words of 32 bits hold other than 32 codes of 8 bits"),
    ("GPTQ", of_config(checkpoint_format="marlin"), "`checkpoint_format` is marlin, not gptq or gptq_v2"),
    ("GPTQ", of_tensor("g_idx", first(99)), "g_idx does not name one of 2 groups for each of 64 inputs"),
    ("GPTQ", of_tensor("qzeros", lambda t: t[:1].contiguous()), "do not fit codes of [64, 32]"),
    ("GPTQ", of_tensor("scales", first(float("nan"))), "a weight is NaN or infinite"),
    ("AWQ", of_config(version="gemv"), "`version` is gemv, not gemm"),
    (
        "AWQ",
        of_tensor("qweight", lambda t: t[:, :2].contiguous()),
        "2 words of 32 bits hold other than 32 codes of 4 bits",
    ),
    ("nf4", of_tensor("absmax", lambda t: t[:5].contiguous()), "5 scales for 2048 codes, which have blocks of 64"),
    ("nf4", of_tensor("__nf4", first(0)), "its quant_state cannot be read (JSONDecodeError)"),
    ("LLM.int8()", of_tensor("weight_format", filled(3)), "its weight_format is not by rows"),
    ("HQQ", of_tensor("packing", lambda _: torch.tensor(list(b"eval(x)"), dtype=torch.uint8)), "packed as `eval(x)`"),
    ("HQQ", of_tensor("shape", lambda t: t * 10**6), "codes do not hold a weight of [32000000, 64000000]"),
    ("NVFP4", of_config(config_groups={}), "it has no config_groups"),
    ("NVFP4", of_config(format="sparse-24-bitmask"), "a group of its weights has the format sparse-24-bitmask"),
    (
        "NVFP4",
        of_tensor("weight_global_scale", lambda t: t.expand(3).contiguous()),
        "is one number for the whole weight",
    ),
    (
        "int4 of compressed-tensors",
        of_tensor("weight_shape", lambda t: t * 10**9),
        "weight_shape [32000000000, 6400000",
    ),
]


@pytest.mark.parametrize(("kind", "damage", "said"), DAMAGES, ids=[said[:50] for _, _, said in DAMAGES])
def test_what_does_not_fit_together_is_refused_by_name(kind, damage, said, tiny_base, tmp_path):
    quantize(tiny_base, tmp_path / "small", kind)
    damage(tmp_path / "small")
    with pytest.raises(BaseError) as caught:
        opened(tmp_path / "small")
    assert said in caught.value.message and caught.value.where == "small" and caught.value.hint


def test_a_plan_refuses_shapes_that_do_not_fit_without_reading_a_weight(tiny_base, tmp_path):
    quantize(tiny_base, tmp_path / "small", "fp8")
    of_tensor("weight_scale_inv", lambda t: t.T.contiguous())(tmp_path / "small")
    with pytest.raises(BaseError, match="do not fit a weight of"):
        opened(tmp_path / "small", with_weights=False)


def test_keys_that_only_other_programs_read_change_nothing(tiny_base, tmp_path):
    numbers = quantize(tiny_base, tmp_path / "small", "fp8")
    of_config(modules_to_not_convert=["(a+)+$"] * 100_000, modules_to_convert={"x": "os.system"}, kernel="/bin/sh")(
        tmp_path / "small"
    )
    found = tensors_of(opened(tmp_path / "small"))
    assert all(torch.equal(found[name], tensor) for name, tensor in numbers.items())


def test_a_tensor_of_codes_that_no_layout_knows_is_refused(tiny_base, tmp_path):
    quantize(tiny_base, tmp_path / "small", "AWQ")
    changed(tmp_path / "small", lambda tensors: tensors.update({"model.extra": torch.zeros(3, dtype=torch.int8)}))
    with pytest.raises(BaseError, match=r"not part of a weight in AWQ with 4 bits: `model.extra` \(I8\)"):
        opened(tmp_path / "small")


def test_scales_in_another_shard_are_found(tiny_base, tmp_path):
    numbers = quantize(tiny_base, tmp_path / "small", "fp8")
    tensors = load_file(tmp_path / "small/model.safetensors")
    (tmp_path / "small/model.safetensors").unlink()
    shards = {name: f"model-0000{1 + name.endswith('_inv')}-of-00002.safetensors" for name in tensors}
    for file in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == file}, tmp_path / "small" / file)
    (tmp_path / "small/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    found = tensors_of(opened(tmp_path / "small"))
    assert all(torch.equal(found[name], tensor) for name, tensor in numbers.items())


def test_large_bases_are_written_in_shards(tiny_base, tmp_path, monkeypatch):
    from finetune.model.base.dequantized import files

    numbers = quantize(tiny_base, tmp_path / "small", "fp8")
    edit(tmp_path / "small", comment="another digest")
    monkeypatch.setattr(files, "SHARD_BYTES", 10_000)
    directory = opened(tmp_path / "small")
    assert len(list(directory.glob("model-*.safetensors"))) > 3
    assert tensors_of(directory).keys() == numbers.keys()
    base.load_model(directory)


def test_a_base_of_fp16_stays_in_fp16(tiny_base, tmp_path):
    quantize(tiny_base, tmp_path / "small", "GPTQ")
    edit(tmp_path / "small", dtype="float16")
    assert tensors_of(opened(tmp_path / "small"))[f"{FIRST}.weight"].dtype == torch.float16


def test_the_config_of_model_opt_may_lie_beside(tiny_base, tmp_path):
    numbers = quantize(tiny_base, tmp_path / "small", "NVFP4 of ModelOpt")
    edit(tmp_path / "small", quantization_config=None)
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}}
    (tmp_path / "small/hf_quant_config.json").write_text(json.dumps(said))
    directory = opened(tmp_path / "small")
    assert torch.equal(tensors_of(directory)[f"{FIRST}.weight"], numbers[f"{FIRST}.weight"])
    assert not (directory / "hf_quant_config.json").exists()
