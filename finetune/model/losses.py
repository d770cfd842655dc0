"""Floor 1. Loss functions that tasks are given. Shapes: N supervised tokens, V vocabulary."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Nats of each token, fp32, shape (N,); computed in fp32 whatever the logits are."""
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="none")
