"""A base whose tokenizer is Mistral's `tekken.json` alone is trained with a tokenizer.json made of it, and packaged with that."""

import base64
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig, MistralForCausalLM

from finetune.errors import BaseError
from finetune.model import base
from finetune.package import export, proof
from finetune.package.verify.verify import verify
from finetune.recipe.schema import Base

SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
WORDS = [b"th", b"the", b" t", b" the", b"mo", b"el", b"de", b"del"]
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def tekken(**changes: object) -> str:
    vocabulary = [*(bytes([number]) for number in range(256)), *WORDS]
    tokens = [{"rank": rank, "token_bytes": base64.b64encode(one).decode()} for rank, one in enumerate(vocabulary)]
    config = {"pattern": PATTERN, "default_vocab_size": len(tokens) + 20, "default_num_special_tokens": 20}
    special = [{"rank": rank, "token_str": one, "is_control": True} for rank, one in enumerate(SPECIAL)]
    record = {"config": config, "vocab": tokens, "special_tokens": special} | changes
    return json.dumps({name: value for name, value in record.items() if value is not None})


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    """Weights twice, as Mistral publishes them, and no tokenizer that others read."""
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    torch.manual_seed(0)
    MistralForCausalLM(config).save_pretrained(tmp_path / "mistral", max_shard_size="30KB")
    shutil.copyfile(next((tmp_path / "mistral").glob("model-*")), tmp_path / "mistral/consolidated.safetensors")
    (tmp_path / "mistral/tekken.json").write_text(tekken())
    return tmp_path / "mistral"


def directory_of(path: Path) -> Path:
    named = Base(checkpoint=str(path))
    return base.directory(named, base.pin(named))


@pytest.mark.slow
def test_it_is_trained_and_packaged_with_a_fast_tokenizer_and_its_weights_once(trained, mistral, tmp_path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the model {number}"}) + "\n" for number in range(12)))
    run = trained(
        "fp32",
        base={"checkpoint": str(mistral)},
        task={"name": "text", "max_length": 32},
        data={"train": [{"path": str(rows)}], "holdout": 2},
        train={"steps": 2, "batch_size": 4, "precision": "fp32"},
        checkpoint={},
    )
    package = run.parent / "package"
    export.package(f"{run}@last", package, load=proof.load_here)
    assert verify(str(package))["ok"]
    assert not list(package.glob("consolidated*")) and not (package / "tekken.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(package)
    assert tokenizer.is_fast and tokenizer.eos_token == "</s>" and tokenizer.bos_token_id == 1
    assert tokenizer.convert_ids_to_tokens(tokenizer("the model")["input_ids"]) == ["the", "Ġ", "mo", "del"]
    model, plan = AutoModelForCausalLM.from_pretrained(package), json.loads((run / "plan.json").read_text())
    assert sum(each.numel() for each in model.parameters()) == plan["total_parameters"]


def test_its_own_settings_stay_and_another_tokenizer_beside_it_comes_first(mistral, tiny_tokenizer) -> None:
    settings = {"tokenizer_class": "MistralCommonBackend", "pad_token": "<unk>", "model_max_length": 99}
    (mistral / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = base.load_tokenizer(directory_of(mistral))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("</s>", "<unk>", 99)
    (mistral / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "[/INST]"}))
    assert directory_of(mistral) == mistral, "transformers reads it as it is"
    assert base.load_tokenizer(mistral).eos_token == "[/INST]"
    (mistral / "tekken.json").write_text(tekken(vocab=None, special_tokens=None) + " ")
    tiny_tokenizer.save_pretrained(mistral)
    assert directory_of(mistral) == mistral and len(base.load_tokenizer(mistral)) == 300


def refusal(mistral: Path, text: str) -> str:
    (mistral / "tekken.json").write_text(text)
    with pytest.raises(BaseError) as caught:
        directory_of(mistral)
    return str(caught.value)


def test_a_file_that_cannot_be_converted_is_refused(mistral, monkeypatch) -> None:
    assert refusal(mistral, tekken()[:-9]).startswith("mistral: its tekken.json is damaged")
    assert refusal(mistral, "[]").startswith("mistral: its tekken.json is damaged")
    assert "its tekken.json cannot be read" in refusal(mistral, tekken(vocab=[{"token_bytes": 3}]))
    monkeypatch.setattr(base.pinning.native.tekken, "_has_mistral_common", lambda: False)
    told = refusal(mistral, tekken(special_tokens=None))
    assert told.endswith("is of an old kind, which needs mistral-common\nhint: pip install mistral-common")
