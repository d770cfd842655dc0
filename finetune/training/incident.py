"""All that there is to know of one step, as a folder of plain files: `debug/step-<step>/` of its run.

`run` writes one when the guard refuses an update, `bisect` one of the step that it finds. A bundle stays with the run: it has the text of
rows, which no package and no card has.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import psutil

from finetune.errors import RunError
from finetune.store.durable import failures, make_directory, replace_file
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.store.strict_json import strict, to_json
from finetune.training.loop import StepReport
from finetune.training.resolve import Resolved

# These change numbers or memory. The others may be secrets, like HF_TOKEN.
SHOWN_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF")


class BundledRow(TypedDict):
    """A row of a step: ids, loss, lengths, and its tokens as text."""

    row: int
    share: NotRequired[float]
    """How much of what is wrong with the step is its doing."""
    example: int
    loss: float
    tokens: int
    supervised_tokens: int
    text: str
    token_losses: NotRequired[list[tuple[str, float]]]
    """Each learnt token and its loss, where the row was looked into."""


def rows_of(resolved: Resolved, report: StepReport) -> list[BundledRow]:
    """The rows of a step, the one with the highest loss first."""
    columns = (report.examples.tolist(), report.rows.tolist(), report.row_losses, report.row_tokens)
    found: list[BundledRow] = []
    for example, row, loss, supervised in zip(*columns, strict=True):
        tokens = resolved.train[example].tokens
        text = str(resolved.tokenizer.decode(tokens.tolist()))
        found.append(
            {
                "row": row,
                "example": example,
                "loss": loss,
                "tokens": len(tokens),
                "supervised_tokens": supervised,
                "text": text,
            }
        )
    return sorted(found, key=lambda entry: (entry["loss"] == entry["loss"], -entry["loss"]))  # NaN comes first


def write(
    run: Path,
    resolved: Resolved,
    report: StepReport,
    about: Mapping[str, object],
    rows: Sequence[BundledRow] | None = None,
) -> Path:
    """Writes the bundle of a step, over an older one; returns its folder. `about` says what is wrong with the step."""
    folder = RunDirectory(run).bundle(report.step)
    facts = {
        "step": report.step,
        **about,
        "command": f"finetune replay {run} --steps {report.step} --inspect",
        "figures": report.figures,
        "module_grad_norms": report.module_norms,
        "plan_id": resolved.plan.plan_id,
        "environment": _environment(),
        "time": journal.now(),
    }
    # A full disk becomes a RunError, which the guard survives: its decision stands without these files.
    with failures(folder, RunError):
        make_directory(folder.parent)
        make_directory(folder)
        lines = [to_json(row) + "\n" for row in rows or rows_of(resolved, report)]
        replace_file(folder / "rows.jsonl", "".join(lines).encode())
        # `strict`: JSON has no NaN, and a refused step often has one.
        replace_file(folder / "report.json", (json.dumps(strict(facts), indent=1) + "\n").encode())
    return folder


def _environment() -> dict[str, object]:
    memory = psutil.virtual_memory()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory_bytes": memory.total,
        "available_bytes": memory.available,
        "variables": {name: os.environ[name] for name in SHOWN_VARIABLES if name in os.environ},
    }
