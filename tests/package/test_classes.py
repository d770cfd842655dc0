"""Packages of models that keep weights in fp32, or that are more than their language model: loaded as their configs declare. In this process."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from finetune.errors import PackageError
from finetune.model import tiny
from finetune.model.base import load_model, outline
from finetune.package import classes, export, in_small, preflight, proof, weights
from finetune.package.verify.contents import Finding
from finetune.package.verify.verify import folder_findings, verify
from finetune.recipe.load import load
from finetune.training.resolve import resolve

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.1}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_routed_experts": 4, "num_experts": 4}
EXPERTS |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
EXPERTS |= {"num_dense_layers": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
DELTA |= {"layer_types": ["linear_attention", "full_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
QWEN_VISION |= {"patch_size": 4, "num_position_embeddings": 16}
CONFIGS = {
    "deepseek_v3": {**TEXT, **EXPERTS, **LATENT, "num_key_value_heads": 4},
    "glm4_moe": {**TEXT, **EXPERTS},
    "dots1": {**TEXT, **EXPERTS},
    "lfm2_moe": {**TEXT, **EXPERTS, "layer_types": ["conv", "full_attention"]},
    "ernie4_5_moe": {**TEXT, **EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "olmo_hybrid": {**TEXT, **DELTA},
    "falcon_h1": {**TEXT, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "nemotron_h": {
        **{**TEXT, **EXPERTS, "layers_block_type": ["mamba", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 8},
        **{"ssm_state_size": 8, "n_groups": 1, "chunk_size": 16, "moe_shared_expert_intermediate_size": 16},
    },
    "xlstm": {"hidden_size": 32, "num_heads": 4, "num_blocks": 2, "num_hidden_layers": 2, "chunk_size": 16},
    "qwen3_5": {"text_config": {**TEXT, **DELTA}, "vision_config": QWEN_VISION},
    "llama4": {
        "text_config": {**TEXT, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 32},
        "vision_config": {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "laguna": {
        **TEXT,
        **EXPERTS,
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "rembert": {**TEXT, "is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 48},
    "gemma3": {"text_config": {**TEXT, "sliding_window": 16}, "vision_config": VISION, "mm_tokens_per_image": 4},
}
KEPT = {
    "deepseek_v3": "e_score_correction_bias",
    "glm4_moe": "e_score_correction_bias",
    "dots1": "e_score_correction_bias",
    "lfm2_moe": "expert_bias",
    "ernie4_5_moe": "gate.weight",
    "olmo_hybrid": "A_log",
    "nemotron_h": "e_score_correction_bias",
}
HYBRID = (
    "xlstm",
    "lfm2_moe",
    "olmo_hybrid",
    "falcon_h1",
    "nemotron_h",
    "qwen3_5",
)  # states pass from row to row: not packed
PROCESSORS = {"preprocessor_config.json": {"image_processor_type": "Gemma3ImageProcessor"}, "processor_config.json": {}}


@pytest.fixture(scope="module")
def random_base(tmp_path_factory, tiny_tokenizer) -> Callable[[str], Path]:
    """A function that writes a random model of a type, with what is beside it on the Hub."""

    def random_base(kind: str) -> Path:
        directory = tmp_path_factory.mktemp("bases") / kind
        settings = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
        config = CONFIGS[kind]
        if "text_config" in config:
            config = {**config, "text_config": {**settings, **config["text_config"]}, "image_token_id": 299}
            names = {"image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297}
            made = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **config, **names))
            for name, content in PROCESSORS.items():
                directory.mkdir(exist_ok=True)
                (directory / name).write_text(json.dumps(content))
        else:
            made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings, **config))
        torch.manual_seed(0)
        for name, tensor in made.state_dict().items():
            if "correction_bias" in name or "expert_bias" in name:
                tensor.normal_(0, 0.1)  # bf16 has no place for these
        made.save_pretrained(directory)
        tiny_tokenizer.save_pretrained(directory)
        return directory

    return random_base


@pytest.fixture(scope="module")
def packaged(trained, random_base) -> Callable[..., Path]:
    """A function that trains a base for two steps in bf16, and packages it."""

    def packaged(kind: str, base: Path | None = None, **sections: object) -> Path:
        base = base or random_base(kind)
        task = {"name": "chat", "max_length": 64, "packing": kind not in HYBRID}
        train = {"steps": 2, "batch_size": 6, **sections.pop("train", {})}
        sections = {"checkpoint": {}, "optimizer": {"learning_rate": 0.001}, **sections}
        run = trained("bf16", base={"checkpoint": str(base)}, task=task, train=train, **sections)
        export.package(f"{run}@last", run.parent / "package", load=proof.load_here)
        return run.parent / "package"

    return packaged


def problems(directory: Path) -> list[Finding]:
    """What `verify` finds without starting a process."""
    return [*folder_findings(directory)[1], *classes.findings(directory)]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in directory.glob("*.safetensors") for name, one in load_file(file).items()}


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KEPT if kind not in ("deepseek_v3", "olmo_hybrid")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deepseek_v3", "olmo_hybrid", *SLOW])
def test_what_a_model_keeps_in_fp32_is_in_the_package_as_it_was_trained(packaged, kind) -> None:
    package = packaged(kind)
    tensors = stored(package)
    kept = [name for name, tensor in tensors.items() if tensor.dtype == torch.float32]
    assert any(name.endswith(KEPT[kind]) for name in kept), kept
    assert any((tensors[name].bfloat16().float() != tensors[name]).any() for name in kept)
    loaded = AutoModelForCausalLM.from_pretrained(package, output_loading_info=True)
    assert loaded[0].dtype == torch.bfloat16 and not loaded[1]["unexpected_keys"]
    assert problems(package) == []


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, {"name": "lora", "rank": 2}])
def test_in_bf16_weights_it_stays_in_fp32_through_training_and_checkpoints(packaged, adapter) -> None:
    package = packaged("deepseek_v3", train={"weights": "bf16"}, adapter=adapter)
    if adapter is None:
        checkpoint = stored(package.parent / "run/checkpoints/step-00000002")
        assert checkpoint["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
        assert checkpoint["lm_head.weight"].dtype == torch.bfloat16
    assert stored(package)["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


@pytest.mark.slow
def test_what_is_computed_and_not_stored_is_compared_in_the_type_of_the_package(packaged) -> None:
    package = packaged("falcon_h1")
    buffers = dict(AutoModelForCausalLM.from_pretrained(package).named_buffers())
    assert buffers["model.layers.0.mamba.mup_vector"].dtype == torch.bfloat16


def test_parts_attend_in_the_package_as_they_do_in_training(tmp_path) -> None:
    """got-ocr2's vision attends eagerly, and its text by sdpa; in bf16 that is not the same to the bit."""
    tiny.model_like(AutoConfig.for_model("got_ocr2"), 64).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    before = [model.config._attn_implementation, model.config.get_text_config()._attn_implementation]
    assert before == ["eager", "sdpa"]
    cast = weights.as_loaded(model, torch.bfloat16)
    assert [cast.config._attn_implementation, cast.config.get_text_config()._attn_implementation] == before


@pytest.mark.slow
def test_what_the_base_stores_in_fp32_beside_bf16_is_packaged_so(packaged, tiny_base, tmp_path) -> None:
    base, name = shutil.copytree(tiny_base, tmp_path / "mixed"), "model.layers.0.input_layernorm.weight"
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors | {name: torch.full((32,), 1.001)}, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    for kind in ("fp32", "bf16"):
        package = packaged("llama", base, train={"weights": kind})
        assert [key for key, one in stored(package).items() if one.dtype == torch.float32] == [name]
        assert (stored(package)[name].bfloat16().float() != stored(package)[name]).all()
        assert problems(package) == []
    checkpoint = stored(package.parent / "run/checkpoints/step-00000002")
    assert checkpoint[name].dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("qwen3_5", None),
        pytest.param("gemma3", {"name": "lora", "rank": 2}, marks=pytest.mark.slow),
        pytest.param("gemma3", None, marks=pytest.mark.slow),
    ],
)
def test_a_model_with_images_is_packaged_whole_and_its_declared_class_finds_all(
    packaged, random_base, kind, adapter
) -> None:
    base = random_base(kind)
    package = packaged(kind, base, adapter=adapter)
    before, after = stored(base), stored(package)
    assert before.keys() == after.keys()
    untouched = [name for name in before if "visual" in name or "vision_tower" in name or "projector" in name]
    assert untouched and all(torch.equal(after[name], before[name].to(after[name].dtype)) for name in untouched)
    if kind == "qwen3_5":
        assert all(after[name].dtype == before[name].dtype for name in untouched)
    assert any(not torch.equal(after[name].float(), before[name].bfloat16().float()) for name in before)
    for name in PROCESSORS:
        assert (package / name).read_bytes() == (base / name).read_bytes()
    declared = getattr(transformers, json.loads((package / "config.json").read_text())["architectures"][0])
    model, info = declared.from_pretrained(package, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    text = AutoModelForCausalLM.from_pretrained(package)
    tokens = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        assert torch.equal(model(input_ids=tokens).logits, text(input_ids=tokens).logits)
    assert problems(package) == []


@pytest.fixture
def unpackageable(recipe_file) -> Callable[..., str | None]:
    """A function that asks what is wrong with a package of a base, before anything is trained."""

    def unpackageable(base: Path, **sections: object) -> str | None:
        task = {"name": "chat", "max_length": 64}
        recipe = recipe_file(
            base={"checkpoint": str(base), "origin": "owner/base"}, task=task, train={"steps": 2}, **sections
        )
        return in_small.problem(resolve(load(recipe, ())))

    return unpackageable


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_5", "llama4", "gemma3"])
def test_a_package_of_a_small_model_of_its_kind_is_made_before_a_base_is_trained(
    unpackageable, random_base, kind
) -> None:
    assert unpackageable(random_base(kind), adapter=None) is None


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_adapters_of_families_whose_layers_peft_renames_are_merged_or_refused_before_the_training(
    unpackageable, random_base, form
) -> None:
    """peft takes `shared_experts` of Laguna for an older name, so it loads no adapter of it."""
    told = unpackageable(random_base("laguna"), adapter={"name": "lora"}, package={"form": form})
    assert told is None if form == "merged" else told.startswith("weights: 3 of 63 are not as trained")


def test_a_head_by_another_name_is_one_and_another_matrix_is_none(random_base, tmp_path) -> None:
    directory = random_base("rembert")
    assert json.loads((directory / "config.json").read_bytes())["tie_word_embeddings"] is False
    assert problems(directory) == []
    tensors = load_file(directory / "model.safetensors")
    del tensors["cls.predictions.decoder.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert "ties no embeddings" in problems(directory)[0].message


@pytest.mark.slow
def test_what_a_package_would_lack_is_found_before_the_training(unpackageable, random_base, monkeypatch) -> None:
    monkeypatch.setattr(outline, "not_of", lambda model, path, written: [])
    told = unpackageable(random_base("qwen3_5"), adapter=None)
    assert "weights of Qwen3_5ForConditionalGeneration are missing" in told


def test_verify_finds_missing_weights_of_the_declared_class_and_missing_processor_files(random_base, tmp_path) -> None:
    whole = random_base("qwen3_5")
    assert problems(whole) == []
    broken = shutil.copytree(whole, tmp_path / "broken")
    tensors = stored(whole)
    save_file({k: t for k, t in tensors.items() if "visual" not in k}, broken / "model.safetensors", {"format": "pt"})
    found = verify(str(broken))["problems"]
    assert {problem["check"] for problem in found} == {"class"}
    assert {problem["tensor"] for problem in found} == {name for name in tensors if "visual" in name}
    for name in PROCESSORS:
        (broken / name).unlink()
    (problem,) = verify(str(broken))["problems"]
    assert (problem["check"], problem["file"]) == ("processor", "preprocessor_config.json")


@pytest.mark.slow
def test_a_run_that_has_ended_is_packaged_in_another_type_on_request(packaged, tmp_path) -> None:
    run = packaged("falcon_h1").parent / "run"
    facts = export.package(f"{run}@last", tmp_path / "fp32", load=proof.load_here, dtype="fp32")
    assert {tensor.dtype for tensor in stored(tmp_path / "fp32").values()} == {torch.float32}
    assert "cast" not in [check["name"] for check in facts["checks"]]
    assert "dtype: fp32" in (tmp_path / "fp32/training/recipe.yaml").read_text()
    assert problems(tmp_path / "fp32") == []


@pytest.mark.slow
def test_what_transformers_cannot_run_in_the_type_of_the_package_is_told_before_and_in_one_error_after(
    unpackageable, packaged, random_base, monkeypatch
) -> None:
    """xLSTM's states are in fp32, and torch multiplies no two types."""
    told = "transformers cannot run it in bfloat16 (RuntimeError: "
    assert unpackageable(random_base("xlstm"), adapter=None).startswith(told)
    with pytest.raises(PackageError) as caught:
        packaged("xlstm", random_base("xlstm"))
    assert caught.value.message.startswith(told) and caught.value.hint == "set package.dtype: fp32"


@pytest.mark.slow
def test_where_no_small_model_can_be_made_or_written_it_is_said_that_nothing_was_tried(
    recipe_file, tiny_base, monkeypatch, capsys
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    resolved = resolve(load(recipe_file(package={"license": "mit"}, train={"steps": 3}), ()))
    for module, name, fails in ((tiny, "shrunk", KeyError), (weights, "write", full)):
        monkeypatch.setattr(module, name, fails)
        preflight.refuse_unpackageable(resolved)
        assert "whether this run can be packaged could not be tried in small: " in capsys.readouterr().err
        monkeypatch.undo()
    preflight.refuse_unpackageable(resolved)
    assert capsys.readouterr().err == ""
