"""Copies of live tensors: complete when they say so, unchanged by what comes after, in memory that is used again."""

import torch

from finetune.checkpoints.staging import Staging


def test_a_copy_holds_the_values_of_its_moment() -> None:
    live = {"matrix": torch.randn(64, 32), "vector": torch.randn(7).to(torch.bfloat16), "scalar": torch.tensor(3.0)}
    before = {name: tensor.clone() for name, tensor in live.items()}
    copy = Staging().take(live)
    copy.wait()
    for tensor in live.values():
        tensor.add_(1)
    assert all(torch.equal(copy.tensors[name], before[name]) for name in live)


def test_a_tensor_that_is_not_contiguous_is_copied_in_its_own_order() -> None:
    live = {"transposed": torch.arange(12.0).reshape(3, 4).T}
    copy = Staging().take(live)
    copy.wait()
    assert torch.equal(copy.tensors["transposed"], live["transposed"])


def test_buffers_are_reused_once_they_are_given_back() -> None:
    staging, live = Staging(), {"weights": torch.ones(1000)}
    first, second = staging.take(live), staging.take(live)
    address = first.tensors["weights"].data_ptr()
    assert second.tensors["weights"].data_ptr() != address
    first.wait()
    first.release()
    assert staging.take(live).tensors["weights"].data_ptr() == address
