"""Where the tensors of a step are and what crosses between host and device, on a machine without a GPU.

Nothing is computed: tensors are fake. What a GPU computes is tested by `test_cuda.py`, where there is one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.bench.tracing import no_device

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
ADAPTERS = [None, {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    if reason := no_device.why_not():
        pytest.skip(reason)
    return no_device.compiled(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def tracer(library, tmp_path_factory) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A process that traces each recipe it is told, and where it says what went wrong."""
    said = tmp_path_factory.mktemp("tracer") / "stderr"
    command = [sys.executable, HERE / "traced_step.py", library]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with said.open("w") as stderr, subprocess.Popen(command, stderr=stderr, **pipes) as process:
        yield process, said


@pytest.fixture(scope="module")
def traces() -> dict[str, str]:
    """The lines of recipes that were traced already."""
    return {}


@pytest.fixture
def asked(tracer, traces):
    """A function that has the process trace something, and returns its report."""

    def asked(key: str, **what: object) -> dict:
        process, said = tracer
        if key not in traces:
            print(json.dumps(what), file=process.stdin, flush=True)
            traces[key] = process.stdout.readline().strip()
        assert traces[key], said.read_text()[-4000:]
        return json.loads(traces[key])

    return asked


@pytest.fixture
def traced(asked, recipe_file):
    """A function that traces two steps of a recipe and what a snapshot after them reads."""

    def traced(**sections) -> dict:
        train = {"steps": 10, "batch_size": 4, "precision": "bf16", "micro_batch_tokens": 64}
        optimizer = {"learning_rate": 0.01, "max_grad_norm": 0.5}
        recipe = recipe_file(**{"train": train, "optimizer": optimizer} | sections)
        return asked(recipe.read_text(), recipe=str(recipe))

    return traced


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_step_reads_the_device_once_and_never_waits_for_a_copy(traced, adapter, is_packed):
    report = traced(adapter=adapter, task={"name": "chat", "max_length": 64, "packing": is_packed})
    assert report["devices"] == ["cuda:0"]
    for number, (step, micro_batches) in enumerate(zip(report["steps"], report["micro_batches"], strict=True)):
        assert micro_batches > 2
        copies = step.pop("host to device, overlapped") - (number == 0)  # once, the modules that gradients belong to
        assert copies >= 3 * micro_batches and copies % micro_batches == 0
        assert step == {"device to host: tolist": 1}
    assert report["evaluation"].pop("host to device, overlapped") >= 3
    assert report["evaluation"] == {"device to host: tolist": 1}
    assert ("_varlen_attn" in report["kernels"]) == is_packed
    assert "_fused_adamw_" in report["kernels"]


@pytest.mark.parametrize("adapter", [None, {"name": "lora", "rank": 4, "alpha": 8}])
def test_memory_savers_read_the_device_once_as_well(traced, adapter):
    saving = {"weights": "bf16", "activation_checkpointing": True}
    train = {"steps": 10, "batch_size": 4, "precision": "bf16", "micro_batch_tokens": 64} | saving
    report = traced(adapter=adapter, train=train)
    assert report["devices"] == ["cuda:0"]
    for step in report["steps"]:
        assert step.pop("host to device, overlapped")
        assert step == {"device to host: tolist": 1}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_snapshot_reads_the_counters_of_the_optimizer_at_once(traced, adapter):
    report = traced(adapter=adapter, task={"name": "chat", "max_length": 64, "packing": True})
    assert report["scalars"] > 10
    assert report["snapshot"] == {"device to host: tolist": 1}
    assert report["copy"] == {"device to host: copy_": report["copied"]}


def test_fp32_attends_row_by_row(traced):
    report = traced(train={"steps": 10, "batch_size": 4, "precision": "fp32", "micro_batch_tokens": 64})
    assert "_varlen_attn" not in report["kernels"]
    assert report["steps"][0]["device to host: tolist"] == 1


def test_the_bench_knows_the_kernels_of_a_step_and_what_lives_at_its_peak(asked, tmp_path):
    found = asked("bench", cell="8b-lora", work=str(tmp_path), settings=[])
    tokens, (layers, hidden, wide, vocabulary) = 128, (2, 64, 128, 512)
    names = {name: count for kind, name, count, _ in found["largest"] if kind == "GEMM"}
    head = f"mm bfloat16[{tokens - 2},{hidden}] bfloat16[{hidden},{vocabulary}]"
    up = f"mm bfloat16[{tokens},{hidden}] bfloat16[{hidden},{wide}]"
    # gate and up forward, and down backward
    assert names[head] == 1 and names[up] == 3 * layers, names
    assert [kind for kind, *_ in found["largest"]].count("attention") == 2
    assert all(found[f"{kind}_ms"] > 0 for kind in ("gemm", "attention", "elementwise", "update"))
    logits = 4 * tokens * vocabulary
    assert logits < found["peak_bytes"] < found["forecast_bytes"]
    assert found["tokens_per_second"] > 0 and 0 < found["mfu"] < 1
