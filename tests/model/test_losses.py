"""The chunked loss is that of the model's own logits, in value and in every gradient, for every kind of head; else it steps aside."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from finetune.model import losses

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "its own": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "with a bias": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
}
TOKENS = torch.randint(3, 300, (3, 17), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([0, 1, 5, 16, 17, 30, 33, 40, 41, 50])
LABELS = torch.tensor([4, 4, 299, 0, 8, 7, 6, 5, 4, 3])


@pytest.fixture(params=HEADS)
def model(request):
    torch.manual_seed(0)
    model = HEADS[request.param]()
    for name, parameter in model.named_parameters():
        if name == "lm_head.bias":
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 4)
    monkeypatch.setattr(losses, "LARGE_CHUNK_TOKENS", 6)


@pytest.fixture(params=["chunked", "in_large_chunks"])
def chunked(request):
    return getattr(losses, request.param)


def sum_tokens_gradients(model, loss, precision="fp32"):
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        total, tokens = loss(model, {"input_ids": TOKENS}, POSITIONS, LABELS)
    (total / 7).backward()
    return total.detach(), tokens.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_the_chunked_loss_and_its_gradients_are_those_of_the_models_own_logits(model, chunked, small_chunks):
    total, tokens, gradients = sum_tokens_gradients(model, chunked)
    expected_total, expected_tokens, expected_gradients = sum_tokens_gradients(model, losses.full)
    torch.testing.assert_close(total, expected_total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tokens, expected_tokens, rtol=2e-6, atol=2e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_under_autocast_it_is_as_near_to_fp32_as_the_models_own_logits_are(model, chunked, small_chunks):
    """Both round products to bf16; scale and cap are in fp32 here and in bf16 there."""
    exact = sum_tokens_gradients(model, losses.full)
    ours = sum_tokens_gradients(model, chunked, "bf16")
    plain = sum_tokens_gradients(model, losses.full, "bf16")
    assert ours[1].dtype == torch.float32
    for name in exact[2]:
        error = (ours[2][name] - exact[2][name]).norm()
        assert error <= 1.5 * (plain[2][name] - exact[2][name]).norm() + 1e-6, name
    assert (ours[1] - exact[1]).abs().max() <= 1.5 * (plain[1] - exact[1]).abs().max() + 1e-5


def test_every_head_that_is_one_linear_layer_is_recognized(model):
    assert losses.fitting(model.eval()) == (losses.chunked, None)


def test_a_head_with_lora_matrices_keeps_the_models_own_logits():
    import peft

    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    chosen, reason = losses.fitting(peft.get_peft_model(HEADS["its own"](), config).eval())
    assert chosen is losses.full and reason == "its head is not one linear layer"


def test_logits_that_something_else_touches_are_found_out_by_running_the_model():
    model = HEADS["its own"]().eval()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    chosen, reason = losses.fitting(model)
    assert chosen is losses.full and reason == "its logits are not its head on its decoder's output"


def test_beneath_lora_the_frozen_head_gets_no_gradient_and_the_matrices_get_the_right_one(small_chunks):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(HEADS["tied"](), config)
    ours, plain = (sum_tokens_gradients(model, loss)[2] for loss in (losses.chunked, losses.full))
    assert all((gradient is not None) == ("lora" in name) for name, gradient in ours.items())
    for name in (name for name in ours if "lora" in name):
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-7)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return made


def test_the_logits_of_all_tokens_never_exist_together(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 64)
    hidden, weight = torch.randn(640, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    labels = torch.arange(640) % 500
    with LargestTensor() as seen:
        losses.LinearCrossEntropy.apply(hidden, weight, None, labels, 1.0, None)[0].backward()
    assert seen.elements == 64 * 500


def test_the_loss_of_a_token_is_minus_the_log_of_its_probability():
    hidden = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    _, tokens = losses.LinearCrossEntropy.apply(hidden, torch.eye(3), None, torch.tensor([0, 2]), 1.0, None)
    torch.testing.assert_close(tokens, torch.tensor([math.log(2), -math.log(0.7)]))


def test_huge_logits_do_not_overflow():
    hidden = torch.tensor([[1e30, 0.0], [0.0, -1e30]], requires_grad=True)
    total, tokens = losses.LinearCrossEntropy.apply(hidden, torch.eye(2), None, torch.tensor([0, 0]), 1.0, None)
    total.backward()
    assert tokens.tolist() == [0.0, 0.0] and hidden.grad.isfinite().all()


def test_a_second_backward_is_an_error_and_not_twice_the_gradient():
    hidden = torch.randn(4, 3, requires_grad=True)
    total, _ = losses.LinearCrossEntropy.apply(hidden, torch.eye(3), None, torch.tensor([0, 1, 2, 0]), 1.0, None)
    (2 * total).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * total).backward()
