"""Runs a training step over fake `cuda` tensors and prints, as a line of JSON, what crossed between host and device.

    echo RECIPE | python traced_step.py LIBRARY

Started by `test_traced_step.py` in a process of its own, because LIBRARY, made from `no_device.cpp`, must be there before torch.
For each recipe on its stdin it forks once, as a trace leaves patches behind. It prints an empty line where that one fails.
Fake tensors have shapes and devices, no values; an operation over tensors of two devices is an error, as on a GPU.
"""

import ctypes
import json
import os
import sys
from collections import Counter
from pathlib import Path

ctypes.CDLL(sys.argv[1])

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from finetune.model import adapters, attention, base, losses  # noqa: E402
from finetune.recipe.load import load  # noqa: E402
from finetune.training import build as building  # noqa: E402
from finetune.training import fitting, loop  # noqa: E402
from finetune.training.evaluation import batches, row_results  # noqa: E402
from finetune.training.resolve import resolve  # noqa: E402
from finetune.training.saving import buffers as staging  # noqa: E402
from finetune.training.saving.snapshot import Live  # noqa: E402
from finetune.training.strategy.start import start_accelerator  # noqa: E402

DEVICE = torch.device("cuda", 0)


class Watch(TorchDispatchMode):
    """Counts what crosses between host and device; does for pinned memory and streams what fake tensors do not know."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()
        self.kernels = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
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
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        before = {tensor.device.type for tensor in tensors}
        after = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        self.kernels[name] += "cuda" in before
        if name == "_local_scalar_dense" or ("cuda" in before and "cpu" in after):
            self.seen[f"device to host: {name}"] += 1
        elif before == {"cpu"} and "cuda" in after:
            is_overlapped = getattr(args[0], "is_pinned_here", False) and kwargs.get("non_blocking")
            self.seen["host to device, " + ("overlapped" if is_overlapped else f"waiting: {name}")] += 1
        elif len(before) > 1:
            self.seen[f"mixed: {name}"] += 1
        return result


def model_of(plan, directory, _):
    """The model on the fake device, without its weights."""
    from transformers import AutoModelForCausalLM

    recipe = plan.recipe
    implementation = attention.PER_ROW if plan.arrangement == "packed" else "sdpa"
    settings = {"attn_implementation": implementation, "dtype": base.DTYPES[recipe.train.weights]}
    with DEVICE:
        model = AutoModelForCausalLM.from_config(base.load_config(directory), **settings)
        return adapters.apply(model, recipe.adapter)


def build(resolved):
    """`building.build` on the fake device; what it tries out would need values."""
    torch.nn.Module.to = lambda module, *_, **__: module  # all is there already, and fake tensors cannot be swapped
    building.trained_model = model_of
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    fitting.device_name = lambda _: "a device that is not there"
    fitting.check_packing = lambda *_: None
    losses.fitting = lambda _: (losses.chunked, None)
    real = torch.Generator
    torch.Generator = lambda device: real()  # without CUDA there is none for it, and no numbers are drawn
    accelerator = start_accelerator(resolved.plan.recipe.train)
    PartialState._shared_state["device"] = DEVICE
    directory = base.directory(resolved.plan.recipe.base, resolved.plan.base)
    return building.build(resolved.plan, directory, accelerator)


def trace(recipe):
    resolved = resolve(load(recipe))
    # autocast asks for a GPU in Python, too
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_: True
    watch = Watch()

    def read(tensor):
        watch.seen["device to host: tolist"] += tensor.device.type == "cuda"
        return [1.0] * tensor.numel()

    FakeTensor.tolist = read  # there are no values to read
    with FakeTensorMode(), watch:
        built = build(resolved)
        micro_batches = batches(resolved, resolved.train, built.accelerator)
        of_steps = []
        for _ in range(2):
            watch.seen.clear()
            loop.train_step(built, resolved.plan, micro_batches)
            of_steps.append(dict(watch.seen))
        watch.seen.clear()
        copied, scalars = Live(built).copied()
        of_snapshot = dict(watch.seen)
        watch.seen.clear()
        buffers = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in copied.items()}
        staging._queue_on_device(copied, buffers, staging._moment(copied))
        of_copy = dict(watch.seen)
        watch.seen.clear()
        held_out = batches(resolved, resolved.holdout, built.accelerator)
        row_results(built.accelerator, built.objective, held_out)
    moments = [value for slots in built.optimizer.state.values() for value in slots.values()]
    tensors = [*built.model.state_dict().values(), *moments, *copied.values()]
    report = {
        "steps": of_steps,
        "snapshot": of_snapshot,
        "copy": of_copy,
        "copied": len(copied),
        "evaluation": dict(watch.seen),
        "scalars": len(scalars),
        "devices": sorted({str(tensor.device) for tensor in tensors}),
        "kernels": sorted(+watch.kernels),
        "micro_batches": [len(micro_batches.of(resolved.plan.order.examples_of(step))) for step in (1, 2)],
    }
    print(json.dumps(report), flush=True)


def main():
    for line in sys.stdin:
        if process_id := os.fork():
            _, status = os.waitpid(process_id, 0)
            if status:
                print(flush=True)
            continue
        trace(Path(line.rstrip("\n")))
        sys.exit()


main()
