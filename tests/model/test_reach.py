"""What LoRA reaches: experts in one tensor, patterns, exclusions, layers; and what is refused by name."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from finetune.errors import AdapterError
from finetune.model import losses
from finetune.model.adapters import ADAPTERS, apply, is_changed
from finetune.model.base import freeze_beside_text
from finetune.model.tiny import model_like
from finetune.recipe.schema import LoraAdapter

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
SHARED = {"num_hidden_layers": 2, "first_k_dense_replace": 1}


def small(kind, **settings):
    return model_like(AutoConfig.for_model(kind, **settings), max_length=64)


def lora(**settings):
    return LoraAdapter(name="lora", rank=4, **settings)


def reached(model):
    """Names of what is under the adapter, without the layers' numbers."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name.partition(".layers.")[2].partition(".")[2].partition(".lora_")[0] for name in names}


def gated(kind, gate_up):
    if kind == "gpt_oss":
        gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class Dense(torch.nn.Module):
    """Experts with LoRA, token by token and expert by expert: x W + s (x A) B, and never a sum of weights."""

    def __init__(self, kind, experts, scale):
        super().__init__()
        self.kind, self.experts, self.scale = kind, experts, scale
        generator = torch.Generator().manual_seed(1)
        self.pairs = {}
        for name in ("gate_up_proj", "down_proj"):
            count, rows, columns = getattr(experts, name).shape
            self.pairs[name] = [
                torch.nn.Parameter(torch.randn(count, *shape, generator=generator) * 0.1)
                for shape in ((rows, 4), (4, columns))
            ]

    def product(self, name, expert, x):
        weight, (left, right) = getattr(self.experts, name)[expert], self.pairs[name]
        if self.kind == "gpt_oss":  # in, out; and a bias
            bias = getattr(self.experts, f"{name}_bias")[expert]
            return x @ weight + bias + self.scale * (x @ left[expert]) @ right[expert]
        return weight @ x + self.scale * left[expert] @ (right[expert] @ x)

    def forward(self, hidden, indices, weights):
        out = []
        for x, chosen, shares in zip(hidden, indices, weights, strict=True):
            made = [self.product("down_proj", e, gated(self.kind, self.product("gate_up_proj", e, x))) for e in chosen]
            out.append(sum(share * each for share, each in zip(shares, made, strict=True)))
        return torch.stack(out)


def as_peft(kind, dense, name):
    """A dense pair as peft stores it: A (experts * rank, in), B (out, rank * experts), transposed where weights are (in, out)."""
    left, right = dense.pairs[name]
    if kind == "gpt_oss":
        left, right = right.transpose(1, 2), left.transpose(1, 2)
    return right.flatten(0, 1), left.permute(1, 2, 0).flatten(1)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_experts_of_lora_have_the_loss_and_gradients_of_a_dense_reimplementation(kind):
    plain, model = small(kind), apply(small(kind), lora(alpha=6.0, targets=[], parameters=EXPERTS))
    denses = []
    for layer, other in zip(plain.model.layers, model.get_base_model().model.layers, strict=True):
        layer.mlp.experts = Dense(kind, layer.mlp.experts, scale=1.5)
        denses.append((layer.mlp.experts, other.mlp.experts))
    wrapped = {}
    for dense, outer in denses:
        for module in (outer, outer.base_layer):
            matrices = (module.lora_A["default"].weight, module.lora_B["default"].weight)
            wrapped[dense, module.parameter_name] = matrices
            with torch.no_grad():
                for mine, given in zip(matrices, as_peft(kind, dense, module.parameter_name), strict=True):
                    mine.copy_(given)
    tokens = torch.arange(3, 40)[None] * 7 % 300
    found = []
    for each in (plain, model):
        loss, rows = losses.full(each, {"input_ids": tokens}, torch.arange(36), tokens[0, 1:])
        loss.backward()
        found.append((loss, rows))
    torch.testing.assert_close(found[0], found[1], rtol=2e-5, atol=2e-5)
    for (dense, name), matrices in wrapped.items():
        grads = [torch.nn.Parameter(each.grad) for each in dense.pairs[name]]
        expected = as_peft(kind, type("Grads", (), {"pairs": {name: grads}}), name)
        for mine, given in zip(matrices, expected, strict=True):
            assert given.abs().max() > 0
            torch.testing.assert_close(mine.grad, given, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3"])
def test_all_linear_reaches_dense_and_shared_layers_that_peft_misses_beside_experts_and_no_router(kind):
    model = apply(small(kind, **SHARED), lora())
    feed_forward = {name for name in reached(model) if name.startswith("mlp.")}
    plain = {f"{part}{name}_proj" for part in ("mlp.", "mlp.shared_experts.") for name in ("gate", "up", "down")}
    assert feed_forward == {*plain, "mlp.experts", "mlp.experts.base_layer"}
    model(input_ids=torch.arange(2, 12)[None], use_cache=False).logits.sum().backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


def test_runs_of_older_code_keep_what_they_reached():
    assert is_changed(small("glm4_moe", **SHARED), lora()) and is_changed(small("qwen3_moe"), lora())
    assert not is_changed(small("llama"), lora()) and not is_changed(small("gpt_oss"), lora())
    before = reached(apply(small("glm4_moe", **SHARED), lora(), is_older=True))
    assert "mlp.gate" in before and "mlp.shared_experts.up_proj" not in before


@pytest.mark.parametrize(
    ("kind", "settings", "names"),
    [
        (
            "glm4_moe",
            {"targets": ["shared_experts.*"]},
            {f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")},
        ),
        ("glm4_moe", {"targets": ["shared_experts.down_proj"]}, {"mlp.shared_experts.down_proj"}),
        ("qwen3_moe", {"targets": ["gate_proj", "up_proj", "down_proj"]}, {"mlp.experts", "mlp.experts.base_layer"}),
        ("qwen3_moe", {"targets": ["q_proj", "gate"]}, {"self_attn.q_proj", "mlp.gate"}),
        ("qwen3_moe", {"targets": [], "parameters": ["gate.weight"]}, {"mlp.gate"}),
        ("gpt_oss", {"targets": [], "parameters": ["experts.*"]}, {"mlp.experts", "mlp.experts.base_layer"}),
        ("llama", {"exclude": ["mlp.*", "[!v]_proj", "lm_head"]}, {"self_attn.v_proj"}),
        ("llama", {"targets": ["*attn.[qk]_*"]}, {"self_attn.q_proj", "self_attn.k_proj"}),
        ("qwen3_moe", {"exclude": ["experts.*"]}, {f"self_attn.{n}_proj" for n in "qkvo"}),
    ],
)
def test_names_and_patterns_reach_what_they_say(kind, settings, names):
    config = SHARED if kind == "glm4_moe" else {}
    with warnings.catch_warnings(action="error", category=RuntimeWarning):
        assert reached(apply(small(kind, **config), lora(**settings))) == names


def test_only_the_given_layers_get_matrices():
    model = apply(small("qwen3_moe"), lora(layers=[1]))
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    assert trained and all(".layers.1." in name for name in trained)
    assert {"mlp.experts", "self_attn.q_proj"} <= reached(model)
    outer = model.get_base_model().model.layers[1].mlp.experts
    assert outer.base_layer.r == {"default": 8} and outer.scaling == {"default": 8.0}, (
        "gate and up have a rank of 4 each"
    )


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        (
            "qwen3_moe",
            {"dropout": 0.1},
            "adapter.dropout: LoRA has no dropout on experts whose matrices are one tensor",
        ),
        ("gpt_oss", {"targets": ["experts.down_proj"]}, "hint: name `experts.down_proj` in adapter.parameters"),
        ("gpt_oss", {"parameters": ["experts.w1"]}, "hint: the base has `experts.down_proj`, `experts.gate_up_proj`"),
        (
            "gpt_oss",
            {"parameters": ["down_proj_bias"]},
            "LoRA cannot train `model.layers.0.mlp.experts.down_proj_bias`: it is",
        ),
        ("llama", {"parameters": ["experts.*"]}, "this base has none: name layers in adapter.targets"),
        (
            "llama",
            {"parameters": ["embed_tokens.weight"]},
            "`model.embed_tokens.weight`: it is the weight of Embedding",
        ),
        ("llama", {"parameters": ["q_proj.weight"]}, "it is a linear layer's, so it belongs in adapter.targets"),
        ("qwen3_moe", {"targets": ["gate_proj"]}, "adapter.targets: peft cannot put an adapter on this base"),
        ("llama", {"layers": [2]}, "adapter.layers: there is no layer 2\nhint: layers are numbered 0 to 1"),
        ("llama", {"exclude": ["qproj"]}, "adapter.exclude: nothing in the base is called `qproj`"),
        ("llama", {"exclude": ["*"]}, "adapter: no layer is left to train"),
        ("llama", {"targets": ["*head"]}, None),
    ],
)
def test_what_lora_cannot_reach_is_refused_by_name(kind, settings, told):
    if told is None:
        assert apply(small(kind), lora(**settings))
        return
    with pytest.raises(AdapterError) as caught:
        apply(small(kind), lora(**settings))
    assert told in str(caught.value)


def test_an_adapter_has_something_to_reach():
    with pytest.raises(ValueError, match="has neither `targets` nor `parameters`"):
        lora(targets=[])
    assert ADAPTERS["frozen"].put_on_older is None


def test_parameters_beside_the_text_are_none_that_lora_reaches():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    model = freeze_beside_text(small("gemma3", vision_config=vision, mm_tokens_per_image=4))
    assert model.model.multi_modal_projector.mm_input_projection_weight.ndim == 2
    named = lora(targets=["q_proj"], parameters=["mm_input_projection_weight"])
    with pytest.raises(AdapterError, match="no parameter is called `mm_input_projection_weight`"):
        apply(model, named)
