"""What is trained is what the recipe names; a name that matches nothing is an error that lists what there is."""

import pytest
import torch

from finetune.errors import AdapterError, CheckpointError
from finetune.model.adapters import apply, is_adapter, load_weights, skipped, weights
from finetune.model.base import attach, empty_model, load_model
from finetune.model.tiny import model_like
from finetune.recipe.schema import FrozenAdapter, LoraAdapter


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora(**settings):
    return LoraAdapter(name="lora", rank=4, **settings)


def frozen(*patterns):
    return FrozenAdapter(name="frozen", freeze=list(patterns))


def test_without_an_adapter_every_parameter_is_trained(tiny_base):
    model = load_model(tiny_base)
    assert apply(model, None) is model and not is_adapter(model)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("open_base", [load_model, empty_model])
def test_lora_trains_two_matrices_beside_every_linear_layer_but_the_head(tiny_base, open_base):
    model = apply(open_base(tiny_base), lora())
    assert is_adapter(model)
    layers = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert trainable(model) == {
        f"base_model.model.model.layers.{number}.{layer}.lora_{matrix}.default.weight"
        for number in range(2)
        for layer in layers
        for matrix in "AB"
    }


def test_lora_trains_the_targets_that_are_named(tiny_base):
    model = apply(empty_model(tiny_base), lora(targets=["q_proj", "layers.1.mlp.up_proj"]))
    assert {name.rpartition(".lora_")[0].removeprefix("base_model.model.model.") for name in trainable(model)} == {
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.up_proj",
    }


def test_lora_matrices_have_the_rank_scale_and_dropout_of_the_recipe_and_change_nothing_at_first(tiny_base):
    model = apply(load_model(tiny_base), lora(alpha=12.0, dropout=0.25))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (4, 32) and layer.lora_A["default"].weight.dtype == torch.float32
    assert layer.scaling["default"] == 3.0 and layer.lora_dropout["default"].p == 0.25
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, load_model(tiny_base)(tokens).logits)


@pytest.mark.parametrize(
    ("targets", "missed"),
    [
        (["c_attn"], "`c_attn`"),
        (["q_proj", "proj", "query"], "`proj`, `query`"),
        (["all-linear", "q_proj"], "`all-linear`"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_that_names_the_layers(tiny_base, targets, missed):
    with pytest.raises(AdapterError) as caught:
        apply(empty_model(tiny_base), lora(targets=targets))
    assert str(caught.value) == (
        f"adapter.targets: no linear layer is called {missed}\n"
        "hint: the base has `down_proj`, `gate_proj`, `k_proj`, `lm_head`, `o_proj`, `q_proj`, `up_proj`, `v_proj`"
    )
    assert caught.value.exit_code == 2


def small(kind, **settings):
    """A small random model of a family."""
    from transformers import AutoConfig

    return model_like(AutoConfig.for_model(kind, **settings), max_length=64)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("phimoe", "all-linear skips `router` (it is not a plain linear layer)"),
        ("llama4_text", "all-linear skips `router` (it is not a plain linear layer)"),
        ("deepseek_v4", "all-linear skips `o_a_proj` (it is not a plain linear layer)"),
        ("falcon_h1", "all-linear skips `out_proj` (peft does not allow it in this family)"),
        ("nemotron_h", "all-linear skips `out_proj` (peft does not allow it in this family)"),
        ("mamba", "all-linear skips `out_proj` (peft does not allow it in this family)"),
        ("llama", None),
    ],
)
def test_all_linear_skips_layers_that_lora_cannot_wrap_and_says_so(kind, told):
    model = small(kind)
    assert skipped(model, lora()) == told
    model = apply(model, lora())
    tokens = torch.arange(2, 12)[None]
    model(input_ids=tokens, use_cache=False).logits.sum().backward()
    wrapped = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in trainable(model)}
    assert wrapped and not wrapped & {"router", "o_a_proj", "lm_head", *(["out_proj"] if told else [])}
    assert skipped(small(kind), frozen("*norm*")) is None


@pytest.mark.parametrize(
    ("kind", "target", "name", "reason"),
    [
        ("llama", "lm_head", "lm_head", "another module has the same weight"),
        ("zamba", "up_proj", "model.layers.2.shared_transf.feed_forward.up_proj", "another module has the same weight"),
        ("mamba", "mixer.out_proj", "backbone.layers.0.mixer.out_proj", "peft does not allow it in this family"),
        ("phimoe", "router", "model.layers.0.mlp.router", "it is not a plain linear layer"),
    ],
)
def test_a_target_that_lora_cannot_train_is_refused_by_name(kind, target, name, reason):
    with pytest.raises(AdapterError) as caught:
        apply(small(kind, **({"tie_word_embeddings": True} if kind == "llama" else {})), lora(targets=[target]))
    assert str(caught.value) == (
        f"adapter.targets: LoRA cannot train `{name}`: {reason}\nhint: remove `{target}` from adapter.targets"
    )


@pytest.mark.parametrize("target", ["embed_tokens", "model.embed_tokens", ".*lm_head", "head", "lm_head.weight"])
def test_no_other_spelling_reaches_tied_weights(tiny_base, target):
    with pytest.raises(AdapterError, match="no linear layer is called"):
        apply(empty_model(tiny_base), lora(targets=["q_proj", target]))


def test_an_untied_head_can_be_a_target():
    assert any("lm_head.lora_A" in name for name in trainable(apply(small("llama"), lora(targets=["lm_head"]))))


def test_what_peft_raises_is_one_error_with_its_cause(tiny_base, monkeypatch):
    import peft

    def refuse(*_):
        raise ValueError("no such thing\nas this")

    monkeypatch.setattr(peft, "get_peft_model", refuse)
    with pytest.raises(AdapterError) as caught:
        apply(empty_model(tiny_base), lora())
    assert str(caught.value) == (
        "adapter: peft cannot put an adapter on this base (ValueError: no such thing as this)\n"
        "hint: name its layers in adapter.targets, or train without an adapter"
    )


def test_frozen_parameters_are_those_that_match_a_pattern(tiny_base):
    model = apply(load_model(tiny_base), frozen("model.embed_tokens.*", "*.layers.0.*", "*norm.weight"))
    assert not is_adapter(model)
    names = {name for name, _ in model.named_parameters()}
    assert trainable(model) == {name for name in names if ".layers.1." in name and "norm" not in name}
    assert len(trainable(model)) == 7


def test_a_pattern_that_matches_nothing_is_an_error_that_shows_names(tiny_base):
    with pytest.raises(AdapterError) as caught:
        apply(empty_model(tiny_base), frozen("model.layers.0.*", "embed_tokens", "lm_head.weight"))  # the head is tied
    assert str(caught.value) == (
        "adapter.freeze: no parameter is called `embed_tokens`, `lm_head.weight`\n"
        "hint: parameters are called like `model.embed_tokens.weight`, `model.layers.0.self_attn.q_proj.weight`, "
        "`model.layers.0.self_attn.k_proj.weight`"
    )


def test_freezing_everything_is_an_error(tiny_base):
    with pytest.raises(AdapterError) as caught:
        apply(empty_model(tiny_base), frozen("*"))
    assert (
        str(caught.value)
        == "adapter.freeze: every parameter is frozen, so there is nothing to train\nhint: freeze fewer"
    )


@pytest.mark.parametrize("settings", [None, lora(), frozen("model.embed_tokens.*")])
def test_stored_weights_load_back_to_the_bit(tiny_base, settings):
    first, second = apply(load_model(tiny_base), settings), apply(load_model(tiny_base), settings)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.requires_grad)
    stored = {name: tensor.clone() for name, tensor in weights(first).items()}
    load_weights(second, stored)
    assert all(torch.equal(mine, other) for mine, other in zip(first.parameters(), second.parameters(), strict=True))


def test_stored_weights_are_whole_or_the_adapter_alone_and_tied_ones_once(tiny_base):
    whole = weights(load_model(tiny_base))
    assert "model.embed_tokens.weight" in whole and "lm_head.weight" not in whole
    adapter = weights(apply(load_model(tiny_base), lora()))
    assert len(adapter) == 28 and all("lora_" in name and "default" not in name for name in adapter)


def test_weights_of_another_model_are_refused_by_name(tiny_base):
    model = load_model(tiny_base)
    stored = weights(model)
    with pytest.raises(CheckpointError) as caught:
        load_weights(
            model, {name: stored[name] for name in stored if name != "model.norm.weight"} | {"surplus": torch.zeros(1)}
        )
    assert str(caught.value) == "does not fit the model: `model.norm.weight`, `surplus` in only one of them"


def test_a_saved_adapter_is_attached_to_its_base_and_not_trainable(tiny_base, tmp_path):
    trained = apply(load_model(tiny_base), lora())
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    trained.save_pretrained(tmp_path)
    attached = attach(load_model(tiny_base), tmp_path, "the adapter")
    assert trainable(attached) == set()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(attached.eval()(tokens).logits, trained.eval()(tokens).logits)
