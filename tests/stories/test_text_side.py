"""A base that also reads images: the class of its config is loaded, its text is trained, and all else stays as in its files, to the byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from finetune.compare import prompts
from finetune.compare.evaluate import evaluate
from finetune.compare.generate import generate
from finetune.compare.generation.settings import Settings
from finetune.debug.replay import replay
from finetune.errors import BaseError, RecipeError
from finetune.package import classes, export, proof
from finetune.package.verify.verify import folder_findings
from finetune.recipe.load import load
from finetune.store.run.directory import RunDirectory
from finetune.training.preview import preview
from finetune.training.resolve import resolve
from tests.stories.same_run import assert_same_run

ASKED = [prompts.of_text("the model", "")]
TEXT = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.1}
TEXT |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8, "head_dim": 8}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
QWEN_VISION |= {"patch_size": 4, "num_position_embeddings": 16, "fullatt_block_indexes": [0], "window_size": 8}
SHARES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
DELTA |= {"layer_types": ["linear_attention", "full_attention"]}
CONFIGS = {
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral"},
    },
    "qwen2_5_vl": {"text_config": TEXT | SHARES, "vision_config": QWEN_VISION},
    "qwen3_5": {"text_config": TEXT | DELTA, "vision_config": QWEN_VISION},
}
DECLARED = {
    "mistral3": "Mistral3ForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
}
PROCESSORS = {
    "preprocessor_config.json": {"image_processor_type": "PixtralImageProcessor"},
    "processor_config.json": {"processor_class": "PixtralProcessor"},
    "video_preprocessor_config.json": {"fps": 2},
}
LORA = {"name": "lora", "rank": 2, "alpha": 4}


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory, tiny_tokenizer) -> Callable[..., Path]:
    """A function that writes a random base of a type with images, in bf16; what is beside text has its own shard, and perhaps type."""
    made: dict[tuple, Path] = {}

    def write(kind: str = "mistral3", is_tied: bool = False, beside: torch.dtype = torch.bfloat16) -> Path:
        if (kind, is_tied, beside) in made:
            return made[kind, is_tied, beside]
        directory = tmp_path_factory.mktemp("wide") / "base"
        config = AutoConfig.for_model(
            kind, **CONFIGS[kind], image_token_index=299, image_token_id=299, tie_word_embeddings=is_tied
        )
        config.get_text_config().tie_word_embeddings = is_tied
        torch.manual_seed(0)
        getattr(transformers, DECLARED[kind])(config).to(torch.bfloat16).save_pretrained(directory)
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        images = {name: tensor.to(beside) for name, tensor in tensors.items() if is_beside(name)}
        shards = {"model-1.safetensors": {name: tensors[name] for name in tensors.keys() - images}}
        shards["model-2.safetensors"] = images
        for file, shard in shards.items():
            save_file(shard, directory / file, {"format": "pt"})
        named = {name: file for file, shard in shards.items() for name in shard}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))
        tiny_tokenizer.save_pretrained(directory)
        for name, content in PROCESSORS.items():
            (directory / name).write_text(json.dumps(content, indent=3))
        made[kind, is_tied, beside] = directory
        return directory

    return write


def is_beside(name: str) -> bool:
    return any(part in name for part in ("vision_tower", "projector", "visual"))


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in directory.glob("*.safetensors") for name, one in load_file(file).items()}


@pytest.fixture
def recipe_on(recipe_file) -> Callable[..., Path]:
    def write(base: Path, **sections: object) -> Path:
        train = {"steps": 2, "batch_size": 6, "precision": "bf16", "micro_batch_tokens": 128}
        changes = {"adapter": None, "train": train, "checkpoint": {"every": "1 steps"}, "package": {"license": "mit"}}
        return recipe_file(base={"checkpoint": str(base)}, **changes | sections)

    return write


def packaged_as_declared(run: Path, base: Path, package: Path) -> dict[str, torch.Tensor]:
    """Packages a run, checks all that must be as in the base, and returns the tensors."""
    facts = export.package(f"{run}@last", package, load=proof.load_here)
    before, after = stored(base), stored(package)
    assert before.keys() == after.keys()
    images = [name for name in before if is_beside(name)]
    assert images and any("to the byte" in check["message"] for check in facts["checks"])
    for name in images:
        assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]), name
    assert any(not torch.equal(after[name], before[name].to(after[name].dtype)) for name in before)
    for name in PROCESSORS:
        assert (package / name).read_bytes() == (base / name).read_bytes()
    declared = getattr(transformers, json.loads((package / "config.json").read_text())["architectures"][0])
    _, info = declared.from_pretrained(package, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert [*folder_findings(package)[1], *classes.findings(package)] == []
    return after


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
def test_the_text_of_a_declared_class_is_trained_and_all_else_is_packaged_to_the_byte(
    wide_base, recipe_on, train, tmp_path, adapter, capsys
) -> None:
    base = wide_base(beside=torch.float16)
    recipe = recipe_on(base, adapter=adapter)
    run = train(recipe, tmp_path / "run")
    told = "trains the text side of Mistral3ForConditionalGeneration; model.vision_tower, model.multi_modal_projector ("
    assert told in capsys.readouterr().err
    plan, _ = RunDirectory(run).plan()
    beside = sum(tensor.numel() for name, tensor in stored(base).items() if is_beside(name))
    assert (plan.text_of, plan.parameters_beside_text) == (DECLARED["mistral3"], beside)
    assert plan.trainable_parameters <= plan.total_parameters - beside
    checkpoint = stored(run / "checkpoints/step-00000002")
    if adapter:
        assert checkpoint and not any(is_beside(name) for name in checkpoint)
    else:
        files = [run / f"checkpoints/step-0000000{step}/model-frozen.safetensors" for step in (1, 2)]
        assert {is_beside(name) for name in load_file(files[0])} == {True} and files[0].samefile(files[1])
        getattr(transformers, DECLARED["mistral3"]).from_pretrained(files[0].parent)
    packaged_as_declared(run, base, tmp_path / "package")


@pytest.mark.slow
def test_without_its_base_a_full_run_is_packaged_with_what_is_beside_text_unrounded(
    wide_base, recipe_on, train, tmp_path
) -> None:
    base = Path(shutil.copytree(wide_base(beside=torch.float32), tmp_path / "base"))
    tensors = load_file(base / "model-2.safetensors")
    finer = {name: tensor + torch.randn_like(tensor) / 1e4 for name, tensor in tensors.items()}
    save_file(finer, base / "model-2.safetensors", {"format": "pt"})
    run = train(recipe_on(base), tmp_path / "run")
    shutil.rmtree(base)
    export.package(f"{run}@last", tmp_path / "package", load=proof.load_here)
    after = stored(tmp_path / "package")
    assert all(torch.equal(after[name], tensor) for name, tensor in finer.items())
    assert folder_findings(tmp_path / "package")[1] == []


@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["mistral3", "qwen2_5_vl", "qwen3_5"])
@pytest.mark.slow
def test_every_command_takes_a_run_on_a_declared_class(wide_base, recipe_on, train, tmp_path, kind, adapter) -> None:
    recipe = recipe_on(wide_base(kind), adapter=adapter)
    facts = preview(load(recipe, ()), tmp_path / "unused", lambda _: None).facts
    assert any("the text side of" in note for note in facts["base_notes"])
    run, whole = tmp_path / "run", train(recipe, tmp_path / "whole")
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints/step-00000002")
    assert_same_run(train(recipe, run), whole)
    assert replay(whole, 1, 2)["identical"]
    refs = [f"{whole}@0", f"{whole}@last", str(whole / "checkpoints/step-00000002")]
    results = evaluate(refs[:2], None, [], is_again=True)
    assert results[1]["metrics"]["loss"] < results[0]["metrics"]["loss"]
    assert len(generate(refs, ASKED, Settings(max_new_tokens=4))) == 3
    packaged_as_declared(whole, wide_base(kind), tmp_path / "package")
    assert len(generate([str(tmp_path / "package")], ASKED, Settings(max_new_tokens=4))) == 1


@pytest.mark.slow
def test_an_adapter_alone_is_one_of_the_declared_class_and_names_only_its_text(
    wide_base, recipe_on, train, tmp_path
) -> None:
    import peft

    base = wide_base("qwen3_5", is_tied=True)
    recipe = recipe_on(base, adapter=LORA, package={"form": "adapter", "license": "mit"})
    recipe.write_text(recipe.read_text().replace("base:", "base:\n  origin: owner/base"))
    run = train(recipe, tmp_path / "run")
    export.package(f"{run}@last", tmp_path / "package", load=proof.load_here)
    names = list(stored(tmp_path / "package"))
    assert names and all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    config = json.loads((tmp_path / "package/adapter_config.json").read_text())
    assert config["exclude_modules"] == r"(?:lm_head|model\.visual)(?:\..*)?"
    whole = getattr(transformers, DECLARED["qwen3_5"]).from_pretrained(base, dtype=torch.float32)
    tokens = torch.arange(3, 20)[None]
    with torch.inference_mode():
        before = whole(input_ids=tokens).logits
        after = peft.PeftModel.from_pretrained(whole, tmp_path / "package")(input_ids=tokens).logits
    assert not torch.equal(before, after)


def test_targets_reach_the_text_alone_and_a_name_of_the_images_is_no_target(wide_base, recipe_on) -> None:
    resolved = resolve(load(recipe_on(wide_base(), adapter={**LORA, "targets": ["q_proj"]}), ()))
    assert resolved.plan.trainable_parameters == 2 * (32 * 2 + 2 * 32)
    beside = resolved.kinds["beside text"]
    assert beside["parameters"] == resolved.plan.parameters_beside_text
    assert beside["trained"] == beside["under_adapter"] == beside["linear"] == 0
    with pytest.raises(RecipeError) as caught:
        resolve(load(recipe_on(wide_base(), adapter={**LORA, "targets": ["linear_1"]}), ()))
    assert "no linear layer is called `linear_1`" in str(caught.value)


def test_nothing_beside_text_is_quantized(wide_base) -> None:
    from finetune.model.base import class_of, empty_model, load_config
    from finetune.model.base.load import _bits

    for kind, part in (("mistral3", "model.vision_tower"), ("qwen3_5", "model.visual")):
        base = wide_base(kind)
        skipped = _bits("nf4", torch.bfloat16, empty_model(base, class_of(load_config(base)))).llm_int8_skip_modules
        assert part in skipped and "lm_head" in skipped and not any("language_model" in name for name in skipped)


def test_a_lost_shard_and_a_lost_weight_of_the_images_are_named_before_anything_is_trained(
    wide_base, recipe_on, train, tmp_path
) -> None:
    base = shutil.copytree(wide_base(), tmp_path / "broken")
    (base / "model-2.safetensors").rename(tmp_path / "kept")
    with pytest.raises(BaseError, match="broken: lacks its weight file model-2.safetensors"):
        train(recipe_on(base), tmp_path / "run")
    tensors = load_file(tmp_path / "kept")
    lost = min(tensors)
    save_file({name: each for name, each in tensors.items() if name != lost}, base / "model-2.safetensors")
    with pytest.raises(
        BaseError, match=r"broken: lacks weights of its own config \(missing keys\): .*vision_tower|projector"
    ):
        train(recipe_on(base), tmp_path / "run")


@pytest.mark.slow
def test_a_run_of_older_code_goes_on_with_the_class_that_it_trained(
    wide_base, recipe_on, train, tmp_path, monkeypatch
) -> None:
    """It took the text class alone of such a base, and its checkpoints hold that one's weights by its names."""
    from finetune.training import counted

    base, older, new = wide_base("qwen3_5", is_tied=True), tmp_path / "older", tmp_path / "new"
    for adapter in (LORA, None):
        recipe = recipe_on(base, adapter=adapter)
        with monkeypatch.context() as patched:
            patched.setattr(counted.base, "wide_class", lambda config: None)
            patched.setattr(counted.cache, "found", lambda kind, facts, find: find())  # not what is kept of new code
            train(recipe, older)
        shutil.copytree(older, new)
        shutil.rmtree(new / "checkpoints/step-00000002")
        assert_same_run(train(recipe, new), older)
        assert RunDirectory(new).plan()[0].text_of is None
        assert any("model.layers.0." in name for name in stored(new / "checkpoints/step-00000002"))
        alone = shutil.copytree(new / "checkpoints/step-00000002", tmp_path / "alone")
        if adapter is None:
            assert generate([str(alone)], ASKED, Settings(max_new_tokens=2))[0]["ref"] == str(alone)
        packaged_as_declared(new, base, tmp_path / "package")
        for made in (older, new, alone, tmp_path / "package"):
            shutil.rmtree(made)


def test_an_encoder_with_a_decoder_that_reads_images_is_refused_in_a_line(tmp_path) -> None:
    from finetune.model.base import load_config

    config = AutoConfig.for_model("florence2")
    config.architectures = ["Florence2ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(BaseError, match="is not a language model: it is an encoder with a decoder"):
        load_config(tmp_path)
