"""A token's loss is its surprise in nats, in fp32 whatever the logits are."""

import math

import torch

from finetune.model.losses import cross_entropy


def test_the_loss_of_a_token_is_minus_the_log_of_its_probability():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    losses = cross_entropy(logits, torch.tensor([0, 2]))
    torch.testing.assert_close(losses, torch.tensor([math.log(2), -math.log(0.7)]))


def test_losses_of_bf16_logits_are_computed_in_fp32():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(50)
    losses = cross_entropy(logits, labels)
    assert losses.dtype == torch.float32 and losses.shape == (50,)
    exact = torch.logsumexp(logits.double(), 1) - logits.double()[labels, labels]
    torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=1e-6)


def test_huge_logits_do_not_overflow():
    losses = cross_entropy(torch.tensor([[1e30, 0.0], [0.0, -1e30]]), torch.tensor([0, 0]))
    assert losses.tolist() == [0.0, 0.0]
