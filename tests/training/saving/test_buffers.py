"""Copies of live tensors: complete when they say so, unchanged by what comes after, in memory that is used again."""

import gc
from types import SimpleNamespace

import pytest
import torch

from finetune.errors import CheckpointError
from finetune.training.saving import buffers as stagings
from finetune.training.saving import snapshot
from finetune.training.saving.buffers import Staging


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
    first.wait()
    second.wait()
    address = first.tensors["weights"].data_ptr()
    assert second.tensors["weights"].data_ptr() != address
    first.release()
    third = staging.take(live)
    third.wait()
    assert third.tensors["weights"].data_ptr() == address


@pytest.fixture
def host(monkeypatch):
    """CUDA's allocator of page-locked memory, as far as it is asked: sizes by address."""
    locked, runtime = {}, SimpleNamespace(error=0)

    def register(address, size, flags):
        locked[address] = size
        return runtime.error

    runtime.cudaHostRegister, runtime.locked = register, locked
    runtime.cudaHostUnregister = lambda address: locked.pop(address, None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


def of_a_gpu(*sizes):
    """Tensors that are not on a CPU, of so many bytes."""
    return {
        f"weights/{number}": torch.empty(size // 2, dtype=torch.bfloat16, device="meta")
        for number, size in enumerate(sizes)
    }


def test_buffers_for_a_gpu_are_as_large_as_what_they_hold_and_not_rounded_to_powers_of_two(host, monkeypatch) -> None:
    monkeypatch.setattr(stagings, "SLAB_BYTES", 10_000)
    live = of_a_gpu(4096, 4100, 600, 25_000, 2) | {"moments/scalar": torch.ones(3)}
    buffers = stagings._made(live)
    assert {name: (each.shape, each.dtype) for name, each in buffers.items()} == {
        name: (each.shape, each.dtype) for name, each in live.items()
    }
    assert [*host.locked.values()] == [4096 + 4160 + 640, 25_024, 64]  # of 64 bytes each, and no tensor in two slabs
    for number, name in enumerate(live):
        buffers[name].fill_(number)
    assert all((buffers[name] == number).all() for number, name in enumerate(live))
    del buffers
    gc.collect()
    assert not host.locked


def test_a_host_that_cannot_page_lock_says_so_where_the_copy_is_awaited(host, monkeypatch) -> None:
    host.error = 2
    monkeypatch.setattr(stagings, "_moment", lambda live: None)
    copy = Staging().take(of_a_gpu(4096))
    with pytest.raises(CheckpointError, match=r"cannot page-lock 4,096 bytes for a copy of the state \(CUDA error 2\)"):
        copy.wait()
    copy.release()


def test_sets_for_a_gpu_are_made_ahead_and_no_update_waits_for_them(host) -> None:
    for sets in (1, 2):
        host.locked.clear()
        staging, live = Staging(), SimpleNamespace(copied=lambda: (of_a_gpu(4096, 640), {}))
        accelerator = SimpleNamespace(device=torch.device("meta"))
        state = SimpleNamespace(accelerator=accelerator, copy=None, await_snapshot=lambda: 0.0)
        snapshot.warm(state, live, staging, sets)
        staging._copier.shutdown(wait=True)
        assert state.copy is None and [*host.locked.values()] == [4736] * sets


def test_page_locking_is_left_to_the_copier_and_one_set_is_made_ahead(host, monkeypatch) -> None:
    import threading

    makers = []
    made = stagings._made
    monkeypatch.setattr(stagings, "_made", lambda live: makers.append(threading.current_thread().name) or made(live))
    monkeypatch.setattr(stagings, "_moment", lambda live: None)
    staging, live = Staging(), of_a_gpu(4096)
    monkeypatch.setattr(stagings.Copy, "_fill", lambda copy, live, _: setattr(copy, "tensors", staging.buffers(live)))
    first = staging.take(live)
    staging.make_ahead(live)
    second = staging.take(live)
    second.wait()
    assert len(host.locked) == 2 and all(name.startswith("copier") for name in makers)
    assert first.tensors.keys() == second.tensors.keys()
    assert first.tensors["weights/0"].data_ptr() != second.tensors["weights/0"].data_ptr()
