"""Runs a training step over fake `cuda` tensors and prints, as a line of JSON, what crossed between host and device.

    echo '{"recipe": RECIPE}' | python traced_step.py LIBRARY

Started by `test_traced_step.py` in a process of its own, because LIBRARY must be there before torch.
For each line on its stdin, a recipe or a cell of `scripts/bench/traced.py`, it forks once, as a trace leaves patches behind. It prints an empty line where that one fails.
Fake tensors have shapes and devices, no values; an operation over tensors of two devices is an error, as on a GPU.
"""

import gc
import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

from tracing import no_device

no_device.load(Path(sys.argv[1]))

# what traces import: once, and not in each fork
import fsspec.core  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch  # noqa: E402
import traced  # noqa: E402
from tracing import fake_step, roofline  # noqa: E402, F401
from transformers import GenerationMixin, PreTrainedTokenizerFast  # noqa: E402, F401
from transformers.models.llama import modeling_llama  # noqa: E402, F401

from finetune.recipe.load import load  # noqa: E402
from finetune.training import loop  # noqa: E402
from finetune.training.evaluation import batches, row_results  # noqa: E402
from finetune.training.saving import buffers as staging  # noqa: E402
from finetune.training.saving.snapshot import Live  # noqa: E402


class Watch(fake_step.Kernels):
    """Counts what crosses between host and device."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()
        self.kernels = Counter()

    def saw(self, operation, args, kwargs, result):
        name = operation._schema.name.rpartition("::")[2]
        before = {tensor.device.type for tensor in fake_step.tensors_of((args, kwargs))}
        after = {tensor.device.type for tensor in fake_step.tensors_of(result)}
        self.kernels[name] += "cuda" in before
        if name == "_local_scalar_dense" or ("cuda" in before and "cpu" in after):
            self.seen[f"device to host: {name}"] += 1
        elif before == {"cpu"} and "cuda" in after:
            is_overlapped = getattr(args[0], "is_pinned_here", False) and kwargs.get("non_blocking")
            self.seen["host to device, " + ("overlapped" if is_overlapped else f"waiting: {name}")] += 1
        elif len(before) > 1:
            self.seen[f"mixed: {name}"] += 1

    def read(self, tensor):
        self.seen["device to host: tolist"] += tensor.device.type == "cuda"


def trace(recipe):
    resolved = fake_step.resolve(load(recipe))
    watch = Watch()
    with fake_step.tracing(watch):
        built = fake_step.build(resolved)
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
    gc.freeze()  # forks need not look through what was imported
    for line in sys.stdin:
        if process_id := os.fork():
            _, status = os.waitpid(process_id, 0)
            if status:
                print(flush=True)
            continue
        asked = json.loads(line)
        if "recipe" in asked:
            trace(Path(asked["recipe"]))
        else:
            found = traced.trace(traced.CELLS[asked["cell"]], Path(asked["work"]), asked["settings"], is_tiny=True)
            print(json.dumps(asdict(found)), flush=True)
        sys.exit()


main()
