"""A base that transformers knows and whose config names its own code: the code is never run, and nothing that is made of the base names it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.compare import prompts
from finetune.compare.evaluate import evaluate
from finetune.compare.generate import generate
from finetune.compare.generation.settings import Settings
from finetune.errors import BaseError
from finetune.model import base
from finetune.model.base.remote_code import asked_by
from finetune.package import export, proof
from finetune.package.publish import to_folder
from finetune.package.verify.contents import files_of
from finetune.package.verify.verify import verify
from finetune.recipe.load import load
from finetune.recipe.schema import Base
from finetune.training.resolve import resolve
from tests.model.quantizing import quantize

LORA = {"name": "lora", "rank": 2, "alpha": 4}
MODEL = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
TOKENIZER = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}


def edit(path: Path, **changes: object) -> None:
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(said | changes))


@pytest.fixture
def traps(tmp_path: Path, monkeypatch) -> Path:
    """A file that code of a base would write. Nothing may ask transformers for such code either."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield tmp_path / "it-was-run"
    assert not (tmp_path / "it-was-run").exists() and not (tmp_path / "modules").exists()
    assert not any("own" in name for name in sys.modules if "transformers_modules" in name)


@pytest.fixture
def mapped(tiny_base: Path, tmp_path: Path, traps: Path) -> Path:
    """The tiny base, with a mapping in each of its configs to code beside them."""
    directory = shutil.copytree(tiny_base, tmp_path / "mapped")
    for name in ("modeling_own.py", "tokenization_own.py", "__init__.py"):
        (directory / name).write_text(f"open({str(traps)!r}, 'w').close()\nraise SystemExit('it was run')\n")
    edit(directory / "config.json", auto_map=MODEL, rope_scaling=None)
    edit(directory / "tokenizer_config.json", auto_map=TOKENIZER, tokenizer_class="OwnTokenizer")
    edit(directory / "generation_config.json", auto_map={"AutoConfig": "modeling_own.OwnConfig"})
    edit(
        directory / "preprocessor_config.json", auto_map={"AutoProcessor": "modeling_own.Own"}, nested=[{"auto_map": 1}]
    )
    return directory


def assert_names_no_code(directory: Path) -> None:
    """Neither in a config nor in a file."""
    for path in directory.rglob("*"):
        assert path.suffix != ".py", path
        if path.suffix == ".json":
            assert not list(asked_by(json.loads(path.read_text()))), path


def recipe_of(directory: Path, **sections: object) -> dict:
    return {
        "base": {"checkpoint": str(directory)},
        "train": {"steps": 2, "batch_size": 6, "precision": "fp32"},
        **sections,
    }


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [LORA, None])
def test_the_mapping_is_in_no_checkpoint_and_no_package_and_no_code_is_run(
    trained, mapped, tiny_base, adapter, tmp_path
) -> None:
    run = trained("fp32", **recipe_of(mapped, adapter=adapter, checkpoint={}))
    assert_names_no_code(run / "checkpoints/step-00000002")
    package, other = tmp_path / "package", tmp_path / "other"
    export.package(f"{run}@last", package, load=proof.load_here)
    assert_names_no_code(package)
    if adapter:  # the same weights as of a base that names no code
        own = trained("fp32", **recipe_of(tiny_base, adapter=adapter, checkpoint={}))
        export.package(f"{own}@last", other, load=proof.load_here)
        assert (package / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    report = verify(str(package))
    assert report["ok"] and {"remote_code", "load", "logits"} <= set(report["checks"])
    to_folder.publish(files_of(package), tmp_path / "published", is_dry_run=False)
    assert_names_no_code(tmp_path / "published")
    for options in ({}, {"trust_remote_code": True}):
        model = AutoModelForCausalLM.from_pretrained(package, **options)
        assert type(model).__module__.startswith("transformers.models.")
        assert AutoTokenizer.from_pretrained(package, **options)("the model")["input_ids"]


@pytest.mark.slow
def test_the_base_is_evaluated_and_generated_with_by_the_native_class(mapped, tiny_base, recipe_file) -> None:
    texts = [str(mapped), str(tiny_base)]
    own, plain = evaluate(texts, recipe_file(), ())
    assert own["metrics"] == plain["metrics"]
    one, other = generate(texts, [prompts.of_text("the model", "")], Settings(max_new_tokens=3))
    assert one["text"] == other["text"]


@pytest.mark.slow
def test_plan_says_once_that_the_code_is_ignored(mapped, recipe_file) -> None:
    resolved = resolve(load(recipe_file(base={"checkpoint": str(mapped)})))
    said = [note for note in resolved.notes if "own code" in note]
    drawn = resolve(load(recipe_file(base={"checkpoint": str(mapped), "random_weights": 0}, adapter=None)))
    assert [note for note in drawn.notes if "own code" in note] == said
    assert_names_no_code(drawn.base_directory)
    files = "config.json, generation_config.json, preprocessor_config.json, tokenizer_config.json"
    assert said == [f"the base's own code (`auto_map` in {files}) is ignored: transformers has `llama` itself"]


def directory_of(path: Path) -> Path:
    named = Base(checkpoint=str(path))
    return base.directory(named, base.pin(named))


def refused(path: Path) -> str:
    with pytest.raises(BaseError) as caught:
        base.load_tokenizer(directory_of(path))
    return str(caught.value)


def test_what_transformers_lacks_is_refused_with_its_name(mapped) -> None:
    edit(mapped / "config.json", architectures=["OwnForCausalLM"])
    asked = "mapped: needs its own code (`auto_map` in config.json), which is never run, and transformers has no "
    assert refused(mapped).startswith(f"{asked}class `OwnForCausalLM`\nhint: ")
    edit(mapped / "config.json", model_type="chatglm")
    assert refused(mapped).startswith(f"{asked}type `chatglm`\nhint: ")
    edit(mapped / "config.json", model_type=None, architectures=["LlamaForCausalLM"])
    assert refused(mapped).startswith(f"{asked}type `None`\nhint: ")


@pytest.mark.slow
def test_a_tokenizer_that_is_only_code_is_refused(mapped) -> None:
    (mapped / "tokenizer.json").unlink()
    (mapped / "own.tiktoken").write_text("AA== 0\n")
    assert refused(mapped) == (
        "mapped: has a tokenizer of its own code (`OwnTokenizer`), which is never run\n"
        "hint: add a tokenizer.json, which needs no code"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [{"trust_remote_code": True}, {"_attn_implementation": "somebody/kernel"}, {"custom_pipelines": {"own": {}}}],
)
def test_other_ways_to_code_stay_refused(mapped, config) -> None:
    edit(mapped / "config.json", **config)
    assert f"needs its own code (`{next(iter(config))}` in config.json)" in refused(mapped)


@pytest.mark.slow
def test_a_word_of_a_vocabulary_is_no_mapping(mapped, tiny_base) -> None:
    record = json.loads((mapped / "tokenizer.json").read_text())
    record["added_tokens"].append({**record["added_tokens"][-1], "id": 300, "content": "auto_map"})
    (mapped / "tokenizer.json").write_text(json.dumps(record))
    view = directory_of(mapped)
    assert (view / "tokenizer.json").read_text() == (mapped / "tokenizer.json").read_text()
    assert base.load_tokenizer(view).convert_tokens_to_ids("auto_map") == 300
    assert directory_of(tiny_base) == tiny_base, "a base without a mapping is used where it is"


@pytest.mark.slow
def test_the_base_itself_is_left_alone_and_a_change_of_it_is_seen(mapped) -> None:
    before = {file.name: (file.read_bytes(), file.stat().st_mode) for file in mapped.iterdir()}
    view = directory_of(mapped)
    assert {file.name: (file.read_bytes(), file.stat().st_mode) for file in mapped.iterdir()} == before
    assert not list(view.glob("*.py")) and (view / "model.safetensors").resolve() == mapped / "model.safetensors"
    edit(mapped / "config.json", rms_norm_eps=0.5)
    assert base.load_config(directory_of(mapped)).rms_norm_eps == 0.5
    (mapped / "model.safetensors").rename(mapped / "model-00001-of-00001.safetensors")
    with pytest.raises(BaseError, match="lacks its weight file model.safetensors"):
        base.load_model(directory_of(mapped))


@pytest.mark.slow
def test_the_tokenizer_of_an_adapter_names_no_code_either(mapped, trained, tiny_base, tmp_path) -> None:
    base_of = {"checkpoint": str(tiny_base), "origin": "owner/tiny"}
    run = trained("fp32", **recipe_of(tiny_base, adapter=LORA, checkpoint={}) | {"base": base_of})
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "checkpoints/step-00000002", adapter)
    (adapter / "manifest.json").unlink()
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(mapped))
    edit(adapter / "tokenizer_config.json", auto_map=TOKENIZER)
    edit(adapter / "config.json", auto_map=MODEL)
    assert_names_no_code(directory_of(adapter))
    assert torch.isfinite(base.load_model(directory_of(adapter))(torch.arange(8)[None]).logits).all()
    assert_names_no_code(base.tokenizer_directory(adapter, directory_of(mapped)))


@pytest.mark.slow
def test_quantized_files_with_code_are_made_numbers_once_and_the_code_is_told(mapped, tmp_path, capsys):
    quantize(mapped, tmp_path / "small", "fp8")
    named = Base(checkpoint=str(tmp_path / "small"))
    first, second = (base.directory(named, base.pin(named)) for _ in range(2))
    assert first == second and capsys.readouterr().err.count("dequantizing small") == 1
    assert [note for note in base.notes(first) if "is ignored" in note]
    (tmp_path / "small/tokenizer.json").unlink()
    with pytest.raises(BaseError, match="small: has a tokenizer of its own code"):
        base.load_tokenizer(base.directory(named, base.pin(named), with_weights=False))
