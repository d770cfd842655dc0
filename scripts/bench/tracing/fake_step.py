"""A training over fake `cuda` tensors: they have shapes and devices, no values. `no_device` must be loaded before torch.

What it patches stays patched, so trace in a fork. An operation over tensors of two devices is an error, as on a GPU.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.model import adapters, attention, base, fused, losses
from finetune.plan.memory import Device
from finetune.recipe.load import LoadedRecipe
from finetune.training import build as building
from finetune.training import fitting
from finetune.training import resolve as resolving
from finetune.training.resolve import Resolved
from finetune.training.state import TrainState
from finetune.training.strategy.start import start_accelerator

DEVICE = torch.device("cuda", 0)
CARD = Device(80 * 2**30, is_gpu=True, host_bytes=512 * 2**30)
ONE_KERNEL = ("silu_backward", "mish_backward")
"""On CUDA. Where that is not built, torch makes several of each."""


class Kernels(TorchDispatchMode):
    """Sees every kernel; does for pinned memory and streams what fake tensors do not know."""

    def __torch_dispatch__(
        self, operation: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, operation._schema.name.rpartition("::")[2]
        if name == "is_pinned":
            return getattr(args[0], "is_pinned_here", False)
        if name == "_pin_memory":
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        if name == "record_stream":
            return None
        result = operation(*args, **kwargs)
        self.saw(operation, args, kwargs, result)
        return result

    def saw(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        raise NotImplementedError

    def read(self, tensor: torch.Tensor) -> None:
        """A tensor was read as numbers."""


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextmanager
def tracing(kernels: Kernels) -> Iterator[None]:
    """All tensors made in it are fake, and `kernels` sees what is done with them."""
    # autocast asks for a GPU in Python, too
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_: True

    def numbers(tensor: torch.Tensor) -> list[float]:
        kernels.read(tensor)
        return [1.0] * tensor.numel()

    FakeTensor.tolist = numbers  # there are no values to read
    library = torch.library.Library("aten", "IMPL")
    for name in ONE_KERNEL:
        library.impl(name, _without_values, "CUDA")
    with FakeTensorMode(), kernels:
        yield


def _without_values(*given: Any) -> Any:
    raise NotImplementedError("fake tensors have no values")


def resolve(loaded: LoadedRecipe) -> Resolved:
    """The plan of a recipe as a GPU makes it."""
    resolving.device = lambda: CARD
    return resolving.resolve(loaded)


def build(resolved: Resolved) -> TrainState:
    """`building.build` on the fake device; what it tries out would need values."""
    torch.nn.Module.to = _to
    building.trained_model = _model_of
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    fitting.device_name = lambda _: "a device that is not there"
    fitting.check_packing = lambda *_: None
    fitting.check_kernels = lambda *_, **__: None
    losses.fitting = lambda _: (losses.chunked, None)
    real = torch.Generator
    torch.Generator = lambda device: real()  # without CUDA there is none for it, and no numbers are drawn
    accelerator = start_accelerator(resolved.plan.recipe.train)
    PartialState._shared_state["device"] = DEVICE
    directory = base.directory(resolved.plan.recipe.base, resolved.plan.base, with_weights=False)
    return building.build(resolved.plan, directory, accelerator, kernels=resolved.kernels)


def _to(module: torch.nn.Module, *to: Any, **_: Any) -> torch.nn.Module:
    """All is on the device already. Fake tensors cannot be swapped, so those of another type are made anew."""
    if len(to) == 1 and isinstance(to[0], torch.dtype):
        for each in module.modules():
            for name, parameter in each._parameters.items():
                if parameter is not None:
                    each._parameters[name] = torch.nn.Parameter(parameter.detach().to(to[0]), parameter.requires_grad)
    return module


def _model_of(plan: Any, directory: Any, _: torch.device, parts: fused.Parts | None = None) -> Any:
    """The model on the fake device, without its weights."""
    from transformers import AutoModelForCausalLM

    recipe = plan.recipe
    implementation = attention.PER_ROW if plan.arrangement == "packed" else "sdpa"
    settings = {"attn_implementation": implementation, "dtype": base.DTYPES[recipe.train.weights]}
    with DEVICE:
        model = AutoModelForCausalLM.from_config(base.load_config(directory), **settings)
        if parts:
            fused.apply(model, parts)
        return adapters.apply(model, recipe.adapter)
