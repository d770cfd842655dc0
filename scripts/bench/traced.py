"""The speed and memory of a step on an H100, in a model: one real step over fake `cuda` tensors, and what each of its kernels costs.

    python scripts/bench/traced.py [--only CELL,...] [--set KEY=VALUE ...] [--kernels 20] [--json FILE] [--tiny]

A model, not a measurement: no GPU runs, and none is needed (not run here). The trace knows every kernel that is started, its
shapes and types. Its time is that of its arithmetic or of its bytes, whichever is longer, at rates that good kernels reach
(`tracing/roofline.py`). Time between kernels counts nothing, so where they are small, a GPU waits for its host and takes longer.

`--set train.kernels=fused` counts Liger's kernels by what they read and write (`tracing/fused_ops.py`).

A step has two micro-batches of whole rows, and every token is supervised. `ms` are those of one micro-batch; the update is
beside it. MFU is of 989 TFLOP/s, and attention counts nothing. The peak is of tensors alive at once, without the allocator's
gaps, the device's context and the scratch memory of kernels. `--set` changes the recipe, as in `finetune train`.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[1] / "gpu"))

import shapes
from tracing import no_device

if TYPE_CHECKING:
    from finetune.training.resolve import Resolved

MARKETED_FLOPS = 989e12
STEPS, MICRO_BATCHES = 2, 2
LORA = {"name": "lora", "rank": shapes.RANK, "alpha": 2 * shapes.RANK}


@dataclass(frozen=True)
class Cell:
    """One training."""

    title: str
    shape: str
    tokens: int
    """Of a micro-batch."""
    is_lora: bool = False


CELLS = {
    "8b-lora": Cell("Llama-3.1-8B, LoRA r16, 8,192 tokens", "large", 8192, is_lora=True),
    "1.7b-full": Cell("Qwen3-1.7B, full, 8,192 tokens", "middle", 8192),
    "135m-full": Cell("SmolLM2-135M, full, 4,096 tokens", "small", 4096),
}


@dataclass(frozen=True)
class Trace:
    """What a cell costs in the model. Milliseconds are those of a micro-batch."""

    title: str
    gemm_ms: float
    attention_ms: float
    elementwise_ms: float
    update_ms: float
    """Of an update: gradient norms, clipping and optimizer."""
    tokens_per_second: float
    """Of micro-batches alone."""
    mfu: float
    kernels: int
    """Of a micro-batch."""
    peak_bytes: int
    forecast_bytes: int
    """Of `finetune plan`, with the device's context and slack."""
    forecast: dict[str, int]
    largest: list[tuple[str, str, int, float]]
    """Kind, name with types and shapes, how often in a micro-batch, and milliseconds together; the longest first."""

    @property
    def ms(self) -> float:
        return self.gemm_ms + self.attention_ms + self.elementwise_ms


def trace(cell: Cell, work: Path, settings: Sequence[str], is_tiny: bool) -> Trace:
    """In a process of its own, where `no_device` is loaded."""
    from tracing import fake_step, fused_ops, roofline

    from finetune.training import loop
    from finetune.training.evaluation import batches

    workshop = shapes.Workshop(work, is_tiny)
    resolved = _resolved(cell, workshop, settings)
    if resolved.kernels.parts:
        fused_ops.define()
    meter = roofline.Meter()
    with fake_step.tracing(meter):
        state = fake_step.build(resolved)
        norms = state.strategy.gradient_norms

        def first_of_update(state: object) -> object:
            meter.phase = "update"
            return norms(state)

        state.strategy = replace(state.strategy, gradient_norms=first_of_update)
        micro_batches = batches(resolved, resolved.train, state.accelerator)
        for _ in range(STEPS):  # the first one makes the moments
            meter.begin("micro-batch")
            loop.train_step(state, resolved.plan, micro_batches)
    return _told(cell, workshop, resolved, meter)


def _resolved(cell: Cell, workshop: shapes.Workshop, settings: Sequence[str]) -> "Resolved":
    """The plan of the cell's recipe for a GPU, without any weights."""
    from tracing import fake_step

    from finetune.model import fused, tiny
    from finetune.recipe.load import load
    from finetune.training.kernels import Kernels

    directory = workshop.base(cell.shape)
    workshop.config(cell.shape).save_pretrained(directory)
    shapes.byte_tokenizer().save_pretrained(directory)
    tokens = cell.tokens if not workshop.is_tiny else 2 * workshop.length
    rows = MICRO_BATCHES * tokens // workshop.length
    train = {"steps": STEPS, "batch_size": rows, "micro_batch_tokens": tokens}
    sections = {"train": train} | ({"adapter": LORA} if cell.is_lora else {})
    recipe = workshop.recipe(workshop.directory / "traced.yaml", cell.shape, rows=rows * STEPS, **sections)
    resolved = fake_step.resolve(load(recipe, settings))
    if resolved.plan.recipe.train.kernels != "fused":
        return resolved
    # What a trial on a GPU would find.
    parts = fused.parts_of(tiny.model_like(workshop.config(cell.shape), workshop.length))
    return replace(resolved, kernels=Kernels("liger-kernel, traced", parts.told, parts))


def _told(cell: Cell, workshop: shapes.Workshop, resolved: "Resolved", meter: object) -> Trace:
    from tracing import fake_step

    from finetune.plan.memory import Work, parts

    ms = [1000 * meter.seconds("micro-batch", kind) / MICRO_BATCHES for kind in ("GEMM", "attention", "elementwise")]
    tokens = resolved.micro_batch_tokens
    forecast = parts(resolved.plan, resolved.shape, Work(tokens, MICRO_BATCHES * tokens), fake_step.CARD)
    largest = meter.largest("micro-batch")
    rate = tokens / sum(ms) * 1000
    return Trace(
        cell.title,
        *ms,
        update_ms=1000 * meter.seconds("update"),
        tokens_per_second=rate,
        mfu=rate * workshop.shapes[cell.shape].flops_a_token(cell.is_lora) / MARKETED_FLOPS,
        kernels=sum(count for _, count in largest) // MICRO_BATCHES,
        peak_bytes=meter.peak_bytes,
        forecast_bytes=sum(forecast.values()),
        forecast=forecast,
        largest=[
            (kernel.kind, kernel.name, count // MICRO_BATCHES, 1000 * kernel.seconds * count / MICRO_BATCHES)
            for kernel, count in largest
        ],
    )


HEADING = (
    "| modelled, not run here | GEMM | attention | elementwise | ms | update ms | tokens/s | MFU | kernels | peak / forecast GiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def line(traced: Trace) -> str:
    ms = f"{traced.gemm_ms:.0f} | {traced.attention_ms:.0f} | {traced.elementwise_ms:.0f} | {traced.ms:.0f}"
    memory = f"{traced.peak_bytes / 2**30:.1f} / {traced.forecast_bytes / 2**30:.1f}"
    speed = f"{traced.tokens_per_second:,.0f} | {traced.mfu:.0%} | {traced.kernels:,}"
    return f"| {traced.title} | {ms} | {traced.update_ms:.1f} | {speed} | {memory} |"


def kernels(traced: Trace, count: int) -> str:
    rows = [f"{ms:9.2f} ms {times:6} x {kind:11} {name}" for kind, name, times, ms in traced.largest[:count]]
    return "\n".join([f"\n{traced.title}: the longest kernels of a micro-batch", *rows])


def traces(names: Sequence[str], settings: Sequence[str], is_tiny: bool) -> list[Trace]:
    """Each in a fork: a trace leaves patches behind."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="traced-") as work:
        os.environ["FINETUNE_CACHE"] = f"{work}/cache"
        no_device.load(no_device.compiled(Path(work)))
        with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
            jobs = [(CELLS[name], Path(work) / name, settings, is_tiny) for name in names]
            return pool.starmap(trace, jobs, chunksize=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CELLS), help="some of the cells")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes the recipe")
    parser.add_argument("--kernels", type=int, default=0, help="also print this many of the longest kernels of each")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    parser.add_argument("--tiny", action="store_true", help="tiny models: whether it runs")
    chosen = parser.parse_args()
    if reason := no_device.why_not():
        sys.exit(reason)
    found = traces(chosen.only.split(","), chosen.set, chosen.tiny)
    print("\n".join([HEADING, *map(line, found)]))
    for each in found if chosen.kernels else ():
        print(kernels(each, chosen.kernels))
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
