"""Steps of a real training, and where the host waited for the device in them: `steps.py RECIPE RUN TABLE|- ANSWER`.

With a TABLE one more step is profiled, and its operators are written there.
"""

import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from finetune.model import base
from finetune.recipe.load import load
from finetune.training import loop
from finetune.training.build import build
from finetune.training.evaluation import batches
from finetune.training.resume import open_plan
from finetune.training.strategy.start import start_accelerator

IS_GPU = torch.cuda.is_available()
SHOWN_OPERATORS = 45


def stepping(recipe: Path, run: Path) -> tuple[Callable[[], object], set[str]]:
    """A function that makes the next step, and the devices that the weights are on."""
    loaded = load(recipe)
    accelerator = start_accelerator(loaded.recipe.train)
    resolved, _, _ = open_plan(loaded, run, accelerator)
    plan = resolved.plan
    state = build(plan, base.directory(plan.recipe.base, plan.base), accelerator)
    made = batches(resolved, resolved.train, accelerator)
    devices = {parameter.device.type for parameter in state.model.parameters()}
    return lambda: loop.train_step(state, plan, made), devices


def waits(step: Callable[[], object]) -> dict[str, int]:
    """Where the host waited in a step, as `file:line`, by torch's own warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if IS_GPU:
            torch.cuda.set_sync_debug_mode("warn")
        step()
        if IS_GPU:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]
    return dict(Counter(places))


def profiled(step: Callable[[], object], table: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if IS_GPU else [])]
    with profile(activities=kinds) as found:
        step()
    order = "self_cuda_time_total" if IS_GPU else "self_cpu_time_total"
    table.write_text(found.key_averages().table(sort_by=order, row_limit=SHOWN_OPERATORS, max_name_column_width=70))


def main() -> None:
    recipe, run, table, answer = sys.argv[1:]
    step, devices = stepping(Path(recipe), Path(run))
    for _ in range(2):  # what is made once, in the first steps, does not count
        step()
    counted = [waits(step) for _ in range(2)]
    if table != "-":
        profiled(step, Path(table))
    host_peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    found = {"waits": counted, "devices": sorted(devices), "host_peak_bytes": host_peak}
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
