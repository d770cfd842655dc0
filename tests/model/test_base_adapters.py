"""An adapter as a base is merged onto the base that it names, proven to compute the same, or refused with the reason."""

import json
import shutil
import warnings

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.errors import BaseError
from finetune.model import base
from finetune.recipe.schema import Base
from finetune.store import cache
from finetune.training.opened import open_model

TOKENS = torch.arange(10, 40)[None]
LINEAR = {"r": 4, "target_modules": "all-linear"}
MERGED = {
    "lora": LINEAR,
    "dora": LINEAR | {"use_dora": True},
    "scaled by rank": LINEAR | {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "an orthogonal start": LINEAR | {"init_lora_weights": "orthogonal"},
    "a head of its own": LINEAR | {"modules_to_save": ["lm_head"]},
    "embeddings of its own": LINEAR | {"modules_to_save": ["embed_tokens"]},
    "tied embeddings of its own": LINEAR | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "a few tokens": LINEAR | {"trainable_token_indices": [3, 4]},
    "a larger vocabulary": LINEAR | {"rows": 310},
    "a larger vocabulary of its own": LINEAR | {"rows": 310, "modules_to_save": ["embed_tokens", "lm_head"]},
    "a low-rank head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "low-rank embeddings": {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "rows": 310},
    "loha": LINEAR | {"kind": peft.LoHaConfig},
    "lokr": LINEAR | {"kind": peft.LoKrConfig},
    "adalora": {"kind": peft.AdaLoraConfig, "target_modules": ["q_proj"], "init_r": 4, "total_step": 10},
    "ia3": {"kind": peft.IA3Config, "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}
YOURSELF = "hint: merge it where it was made (merge_and_unload, save_pretrained), and name that directory"
REFUSED = {
    "prompts": (
        {"kind": peft.PromptTuningConfig, "num_virtual_tokens": 4},
        f"is an adapter of the type PROMPT_TUNING, which cannot be merged\n{YOURSELF}",
    ),
    "a classifier": (
        LINEAR | {"task_type": "SEQ_CLS"},
        "is an adapter for another task: SEQ_CLS\nhint: choose one that generates text",
    ),
    "more layers": (
        LINEAR | {"layer_replication": [[0, 2], [1, 2]]},
        f"is an adapter with settings that cannot be merged here: layer_replication\n{YOURSELF}",
    ),
    "a changed base": (
        LINEAR | {"init_lora_weights": "pissa"},
        f"was started by `pissa`, which changes the base as well\nhint: save it with path_initial_model_for_weight_conversion, or {YOURSELF[6:]}",
    ),
    "biases without a place": (
        LINEAR | {"lora_bias": True},
        f"cannot be merged: Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.\n{YOURSELF}",
    ),
}


@pytest.fixture
def adapter(tiny_base, tiny_tokenizer, tmp_path):
    """A function that makes a peft directory with random weights; returns it, with the logits of the model that it was saved from."""

    def adapter(kind=peft.LoraConfig, rows=None, task_type="CAUSAL_LM", **settings):
        torch.manual_seed(1)
        with warnings.catch_warnings(action="ignore"):
            model = AutoModelForCausalLM.from_pretrained(tiny_base)
            if rows:
                model.resize_token_embeddings(rows)
            model = peft.get_peft_model(model, kind(task_type=task_type, **settings)).eval()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(tmp_path / "adapter")
        tiny_tokenizer.save_pretrained(tmp_path / "adapter")
        with torch.inference_mode():
            return tmp_path / "adapter", model(TOKENS).logits

    return adapter


def edit(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(function, *arguments):
    with pytest.raises(BaseError) as caught:
        function(*arguments)
    return str(caught.value)


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits


@pytest.mark.parametrize("settings", MERGED.values(), ids=MERGED)
def test_a_merged_adapter_computes_what_the_adapted_model_did(adapter, settings):
    path, trained = adapter(**settings)
    named = Base(checkpoint=str(path))
    pinned = base.pin(named)
    merged = base.load_model(base.directory(named, pinned))
    torch.testing.assert_close(logits(merged), trained, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(open_model(str(path)).model), trained, rtol=0, atol=0)
    planned = base.empty_model(base.directory(named, pinned, with_weights=False))
    shapes = [{name: weight.shape for name, weight in model.named_parameters()} for model in (planned, merged)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_is_refused_without_the_weights_of_the_base(adapter, settings, reason):
    path, _ = adapter(**settings)
    named = Base(checkpoint=str(path))
    assert refusal(lambda: base.directory(named, base.pin(named), with_weights=False)) == f"{path}: {reason}"


def test_a_setting_of_a_newer_peft_is_refused_where_it_is_used(adapter):
    path, _ = adapter(**LINEAR)
    edit(path, of_tomorrow=None)
    base.pin(Base(checkpoint=str(path)))
    edit(path, of_tomorrow=True)
    assert "settings that cannot be merged here: of_tomorrow" in refusal(base.pin, Base(checkpoint=str(path)))


def test_code_that_an_adapter_names_is_never_imported(adapter, tmp_path, monkeypatch):
    path, _ = adapter(**LINEAR)
    (tmp_path / "trap.py").write_text("raise SystemExit('code of an adapter was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    edit(path, megatron_core="trap", auto_mapping={"base_model_class": "Model", "parent_library": "trap"})
    named = Base(checkpoint=str(path))
    base.directory(named, base.pin(named))
    edit(path, megatron_config={"a": 1})
    assert "settings that cannot be merged here: megatron_config" in refusal(base.pin, named)


def test_weights_that_are_missing_torn_or_a_pickle_are_refused_unread(adapter):
    path, _ = adapter(**LINEAR)
    weights, named = path / "adapter_model.safetensors", Base(checkpoint=str(path))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert refusal(base.pin, named).startswith(f"{path}: its adapter_model.safetensors is damaged: ")
    weights.unlink()
    hint = "\nhint: load it with peft once and call save_pretrained"
    assert refusal(base.pin, named) == f"{path}: has no adapter_model.safetensors{hint}"
    (path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    message = "has no adapter_model.safetensors, only a pickle, which is never read"
    assert refusal(base.pin, named) == refusal(open_model, str(path)) == f"{path}: {message}{hint}"


def test_a_damaged_config_is_refused(adapter):
    path, _ = adapter(**LINEAR)
    for content in ("{", "[]", "{}"):
        (path / "adapter_config.json").write_text(content)
        assert "its adapter_config.json is damaged: " in refusal(base.pin, Base(checkpoint=str(path)))


@pytest.mark.parametrize("change", [{"r": 8}, {"target_modules": ["q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_whose_weights_are_not_those_of_its_config_is_refused(adapter, change):
    path, _ = adapter(**LINEAR)
    edit(path, **change)
    named = Base(checkpoint=str(path))
    assert "does not fit its base: " in refusal(lambda: base.directory(named, base.pin(named), with_weights=False))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (None, "is an adapter that does not name its base"),
        (
            "no/such/directory",
            "is an adapter, and its base cannot be had: `no/such/directory` is neither a directory nor a ref",
        ),
        ("owner/name", "is an adapter, and its base cannot be had: owner/name: the Hub cannot be reached: "),
    ],
)
def test_a_base_beneath_that_cannot_be_had_is_named(adapter, name, reason):
    path, _ = adapter(**LINEAR)
    edit(path, base_model_name_or_path=name)
    for said in (refusal(base.pin, Base(checkpoint=str(path))), refusal(open_model, str(path))):
        assert said.startswith(f"{path}: {reason}")
        assert "hint: set base_model_name_or_path in its adapter_config.json" in said


def test_an_adapter_on_an_adapter_is_refused_also_where_it_names_itself(adapter):
    path, _ = adapter(**LINEAR)
    edit(path, base_model_name_or_path=str(path))
    assert f"is an adapter on another adapter, `{path}`" in refusal(base.pin, Base(checkpoint=str(path)))


def test_a_larger_vocabulary_without_a_tokenizer_says_what_is_missing_and_where(adapter):
    path, _ = adapter(**LINEAR, rows=310)
    (path / "tokenizer.json").unlink()
    named = Base(checkpoint=str(path))
    assert refusal(lambda: base.directory(named, base.pin(named), with_weights=False)) == (
        f"{path}: has no tokenizer\n"
        f"hint: copy tokenizer.json and tokenizer_config.json of the model that it was trained from into {path}"
    )


def test_the_tokenizer_is_the_adapters_own_else_that_of_the_base_beneath(adapter, tiny_base):
    path, _ = adapter(**LINEAR)
    (path / "chat_template.jinja").write_text("its own")
    named = Base(checkpoint=str(path))
    assert (base.directory(named, base.pin(named), False) / "chat_template.jinja").read_text() == "its own"
    for file in path.glob("*t*oken*"):
        file.unlink()
    (path / "chat_template.jinja").unlink()
    merged = base.directory(named, base.pin(named), False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (merged / name).read_bytes() == (tiny_base / name).read_bytes()


def test_the_licence_is_the_adapters_where_it_states_one_else_that_of_the_base_beneath(adapter, tiny_base, tmp_path):
    path, _ = adapter(**LINEAR)  # with peft's own card, which states none
    below = shutil.copytree(tiny_base, tmp_path / "below")
    (below / "README.md").write_text("---\nlicense: mit\n---\n")
    (below / "LICENSE").write_text("terms")
    edit(path, base_model_name_or_path=str(below))
    named = Base(checkpoint=str(path))
    merged = base.directory(named, base.pin(named), False)
    assert (merged / "README.md").read_text() == "---\nlicense: mit\n---\n"
    assert (merged / "LICENSE").read_text() == "terms"
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    edit(path, peft_version="another")  # else the merged one is in the cache
    assert "apache-2.0" in (base.directory(named, base.pin(named), False) / "README.md").read_text()


def test_the_pin_holds_the_adapter_and_what_is_beneath_and_once_merged_only_the_adapter_is_needed(
    adapter, tiny_base, tmp_path, monkeypatch
):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    path, trained = adapter(**LINEAR)
    below = shutil.copytree(tiny_base, tmp_path / "below")
    edit(path, base_model_name_or_path=str(below))
    named = Base(checkpoint=str(path))
    pinned = base.pin(named)
    assert (pinned.kind, pinned.revision, pinned.beneath) == ("adapter", None, base.pin(Base(checkpoint=str(below))))
    (below / "generation_config.json").write_text("{}")
    assert base.pin(named).digest == pinned.digest and base.pin(named) != pinned
    changed = f"{path}: is an adapter, and its base cannot be had: {below}: is not what it was when the run was planned"
    assert refusal(base.directory, named, pinned).startswith(changed)
    shutil.copy(tiny_base / "generation_config.json", below)
    merged = base.directory(named, pinned)
    shutil.rmtree(below)
    assert base.directory(named, pinned) == merged and merged.is_relative_to(cache.root())
    torch.testing.assert_close(logits(base.load_model(merged)), trained, rtol=1e-5, atol=1e-5)
    edit(path, lora_alpha=9)
    assert refusal(base.directory, named, pinned) == (
        f"{path}: is not what it was when the run was planned\nhint: restore it, or start a new run"
    )


def test_a_merge_that_changes_the_model_is_refused(adapter, monkeypatch):
    path, _ = adapter(**LINEAR)
    edit(path, lora_alpha=7)  # else the merged one is in the cache
    monkeypatch.setattr("finetune.model.base.merge.MERGE_BOUND", -1.0)
    named = Base(checkpoint=str(path))
    assert "merging changes the model by a mean KL of " in refusal(lambda: base.directory(named, base.pin(named)))
