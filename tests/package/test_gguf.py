"""A base in a GGUF file: converted once, trained, packaged, and named for what it is; a file that is not whole is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from finetune.errors import BaseError
from finetune.model import base
from finetune.package import export, proof
from finetune.package.verify.verify import verify
from finetune.recipe.schema import Base
from tests.model import gguf_files


@pytest.fixture(scope="module")
def models(tiny_base, tiny_tokenizer) -> dict:
    llama = AutoModelForCausalLM.from_pretrained(tiny_base)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {name: getattr(llama.config, name) for name in (*sizes, "num_key_value_heads", "max_position_embeddings")}
    torch.manual_seed(0)
    return {"llama": llama, "qwen2": Qwen2ForCausalLM(Qwen2Config(**shape, initializer_range=0.1))}


def directory_of(file: Path | str) -> Path:
    named = Base(checkpoint=str(file))
    return base.directory(named, base.pin(named))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_local_file_is_the_model_and_the_tokenizer_that_were_written(models, tiny_tokenizer, tmp_path, kind) -> None:
    file = gguf_files.write(tmp_path / "model.gguf", models[kind], tiny_tokenizer)
    directory = directory_of(file)
    found, expected = base.load_model(directory).state_dict(), models[kind].state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    text = "the model reads a row<|im_end|>\n"
    tokenizer = base.load_tokenizer(directory)
    assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert directory_of(shutil.copyfile(file, tmp_path / "other.gguf")) == directory, "converted once"


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, {"name": "lora", "rank": 2, "alpha": 4}])
def test_a_quantized_file_is_trained_and_packaged(trained, models, tiny_tokenizer, tmp_path, adapter) -> None:
    file = gguf_files.write(tmp_path / "tiny-Q8_0.gguf", models["qwen2"], tiny_tokenizer, True, licence="mit")
    train = {"steps": 2, "batch_size": 6, "precision": "fp32"}
    run = trained("fp32", base={"checkpoint": str(file)}, adapter=adapter, train=train, checkpoint={})
    package = run.parent / "package"
    export.package(f"{run}@last", package, load=proof.load_here)
    assert verify(str(package))["ok"]
    card = (package / "README.md").read_text()
    assert "license: mit" in card and "the local checkpoint `tiny-Q8_0.gguf`" in card and "base_model:" not in card
    assert type(AutoModelForCausalLM.from_pretrained(package)) is Qwen2ForCausalLM
    assert len(AutoTokenizer.from_pretrained(package)) == 300


def refusal(file: Path) -> str:
    with pytest.raises(BaseError) as caught:
        directory_of(file)
    return str(caught.value)


def test_a_file_that_is_not_whole_is_refused(models, tiny_tokenizer, tmp_path) -> None:
    file = gguf_files.write(tmp_path / "model.gguf", models["llama"], tiny_tokenizer)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert refusal(cut).startswith("cut.gguf: transformers cannot read it")
    part = shutil.copyfile(file, tmp_path / "model-00001-of-00002.gguf")
    assert "is one part of a GGUF model in several files\nhint: merge the parts" in refusal(part)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "is a pointer of Git LFS" in refusal(other)
    other.write_bytes(b"\x80\x04cos\nsystem\n")
    assert "other.gguf: is not a GGUF file" in refusal(other)
    lacking = gguf_files.write(
        tmp_path / "lacking.gguf", models["llama"], tiny_tokenizer, without="blk.1.ffn_up.weight"
    )
    assert "lacks weights of its model: model.layers.1.mlp.up_proj.weight" in refusal(lacking)


def test_a_changed_file_is_refused_and_a_moved_one_is_found(models, tiny_tokenizer, tmp_path) -> None:
    file = gguf_files.write(tmp_path / "model.gguf", models["llama"], tiny_tokenizer)
    named = Base(checkpoint=str(file))
    pinned = base.pin(named)
    assert pinned.kind == "gguf"
    with file.open("r+b") as opened:
        opened.seek(-1, 2)
        opened.write(b"\x01")
    with pytest.raises(BaseError, match="is not what it was when the run was planned"):
        base.directory(named, pinned)
