"""Tokens a second and memory of ours, a bare loop, Trainer and SFTTrainer on one shape; ours also with saves, and with 4-bit weights."""

import json
import shutil
import sys
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from host import Host

from finetune.store.run import journal

HERE = Path(__file__).parent
COUNTED_FROM = 3  # the first steps make what later ones reuse
NEEDS = {"bare-liger": "liger_kernel", "sft": "trl"}
LORA = {"name": "lora", "rank": 16, "alpha": 32}


def ours(
    host: Host, name: str, *, batch: int, steps: int, limit: float, is_mixed: bool = False, **sections: dict
) -> dict:
    """`finetune plan`, then `finetune train`: the forecast, the journal, the peak."""
    place = host.work / "runs" / "measured"
    shutil.rmtree(place, ignore_errors=True)
    sections["train"] = {"steps": steps, "batch_size": batch, **sections.get("train", {})}
    host.base(name)
    recipe = host.workshop.recipe(place / "recipe.yaml", name, rows=batch * steps, is_mixed=is_mixed, **sections)
    began = datetime.now().timestamp()
    found = host.answer([sys.executable, HERE / "measured.py", recipe, place / "run"], limit)
    facts = {"shape": name, "is_lora": "adapter" in sections, **found}
    if not found["ok"]:
        return facts
    plan = facts.pop("plan")
    facts |= {"forecast": plan["memory"], "forecast_bytes": plan["memory_bytes"]}
    facts |= {"micro_batch_tokens": plan["micro_batch_tokens"], "host_forecast_bytes": plan["host_memory_bytes"]}
    facts |= of_journal(host, name, place / "run", "adapter" in sections, began)
    shutil.rmtree(place / "run")  # a save of the middle shape has 20 GB
    return facts


def of_journal(host: Host, name: str, run: Path, is_lora: bool, began: float) -> dict:
    records = journal.read(run)
    steps = [record for record in records if record["kind"] == "step"]
    ends = [datetime.fromisoformat(record["time"]).timestamp() for record in steps]
    tokens = sum(record["tokens"] for record in steps[COUNTED_FROM:])
    saved = ("step", "bytes", "blocked_ms", "wait_seconds", "save_seconds", "read_back_seconds", "save_cpu_seconds")
    return {
        **rate(host, name, is_lora, tokens / (ends[-1] - ends[COUNTED_FROM - 1])),
        "first_step_seconds": round(ends[0] - began, 1),
        "step_seconds": [record["seconds"] for record in steps],
        "await_seconds": [record["await_seconds"] for record in steps],
        "losses": [record["loss"] for record in steps[:3]],
        "saves": [{key: record[key] for key in saved} for record in records if record.get("event") == "committed"],
    }


def rate(host: Host, name: str, is_lora: bool, tokens_per_second: float) -> dict:
    flops = host.workshop.shapes[name].flops_a_token(is_lora) * tokens_per_second
    return {"tokens_per_second": round(tokens_per_second, 1), "tflops": round(flops / 1e12, 3)}


def contender(
    host: Host,
    kind: str,
    name: str,
    *,
    batch: int,
    micro: int,
    steps: int,
    is_lora: bool = False,
    dtype: str = "float32",
) -> dict:
    if kind in NEEDS and find_spec(NEEDS[kind]) is None:
        return {"ok": None, "why": f"{NEEDS[kind]} is not installed"}
    job = {"kind": kind, "base": str(host.base(name)), "rows": str(host.workshop.rows(batch * steps))}
    job |= {"batch": batch, "micro": micro, "steps": steps, "is_lora": is_lora, "dtype": dtype, "work": str(host.work)}
    found = host.answer([sys.executable, HERE / "contender.py", json.dumps(job)], 200)
    facts = {"shape": name, "kind": kind, "dtype": dtype, "micro_batch_tokens": micro * host.workshop.length}
    if not found["ok"]:
        return facts | found
    ends = found.pop("ends")
    tokens = batch * host.workshop.length * (steps - COUNTED_FROM)
    return facts | found | rate(host, name, is_lora, tokens / (ends[-1] - ends[COUNTED_FROM - 1]))
