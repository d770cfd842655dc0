"""What an acceptance found, as goals that are reached or missed and as a page for docs/benchmarks.md."""

import json
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

SCHEMA = 1
PROOFS = ("tests", "kernels", "waits", "exact", "sigterm")
FORECAST = (0.9, 1.3)  # forecast over reserved memory
AWAIT = 0.05  # of a step
FASTER_THAN = {"bare": 0.97, "trainer": 1.0, "sft": 1.0}
PROFILE_LINES = 16
Items = dict[str, dict]  # by `part/name`


class Goal(NamedTuple):
    text: str
    found: str
    is_reached: bool | None
    """None where it was not measured."""


def load(file: Path, is_tiny: bool) -> Items:
    """What earlier calls found; SystemExit where that was at another size."""
    if not file.exists():
        return {}
    report = json.loads(file.read_bytes())
    if report["is_tiny"] != is_tiny or report["schema"] != SCHEMA:
        raise SystemExit(f"{file} is of another kind of acceptance: name another --out")
    return report["items"]


def write(directory: Path, items: Items, is_tiny: bool) -> None:
    found = [goal._asdict() for goal in goals(items)]
    content = {"schema": SCHEMA, "is_tiny": is_tiny, "goals": found, "items": items}
    file = directory / "report.json"
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(file)
    (directory / "page.md").write_text(page(directory, items, is_tiny))


def goals(items: Items) -> list[Goal]:
    return [*_proved(items), *_of_ours(items), *_beside_others(items)]


def _proved(items: Items) -> Iterator[Goal]:
    for part in PROOFS:
        found = {name: item for name, item in items.items() if name.startswith(f"{part}/")}
        missed = [name for name, item in found.items() if not item["ok"]]
        text = f"{len(found) - len(missed)} of {len(found)}" + (f"; not {', '.join(missed)}" if missed else "")
        yield Goal(f"all of `{part}`", text, not missed if found else None)


def _of_ours(items: Items) -> Iterator[Goal]:
    trained = {name: item for name, item in items.items() if item.get("forecast_bytes") and item["ok"]}
    on_device = {name: item for name, item in trained.items() if item.get("reserved_bytes")}
    ratios = {name: item["forecast_bytes"] / item["reserved_bytes"] for name, item in on_device.items()}
    low, high = FORECAST
    text = f"forecast of memory over what was reserved: {low} to {high}"
    yield _each(text, ratios, lambda ratio: low <= ratio <= high)
    retries = {name: item["alloc_retries"] for name, item in on_device.items()}
    yield _each("retries of the allocator: none", retries, lambda count: count == 0)
    shares = {
        name: max(wait / step for wait, step in zip(item["await_seconds"], item["step_seconds"], strict=True))
        for name, item in trained.items()
    }
    yield _each(f"updates that wait for a copy: under {AWAIT:.0%} of a step", shares, lambda share: share < AWAIT)


def _each(text: str, found: dict[str, float], is_good: object) -> Goal:
    if not found:
        return Goal(text, "not measured", None)
    values = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    return Goal(text, values, all(map(is_good, found.values())))


def _beside_others(items: Items) -> Iterator[Goal]:
    """Ours at the types of the other: nearest is the plain run of the part."""
    for name, item in items.items():
        kind, ours = item.get("kind"), _same_types(items, name)
        if kind is None or not item.get("tokens_per_second") or ours is None:
            continue
        ratio, part = ours["tokens_per_second"] / item["tokens_per_second"], name.partition("/")[0]
        limit = FASTER_THAN.get(kind)
        text = f"{part}: tokens/s over those of {kind}" + (f": at least {limit}" if limit else "")
        yield Goal(text, f"{ratio:.3f}", ratio >= limit if limit else None)


def _same_types(items: Items, name: str) -> dict | None:
    """Our run of the same part whose frozen or trained weights have the type of the other's."""
    part, wanted = name.partition("/")[0], items[name].get("dtype") == "bfloat16"
    for other, item in items.items():
        if other.startswith(f"{part}/finetune") and item.get("tokens_per_second") and item["is_bf16"] == wanted:
            return item
    return None


def page(directory: Path, items: Items, is_tiny: bool) -> str:
    machine = items.get("limits/device", {})
    versions = ", ".join(f"{name} {found}" for name, found in machine.get("versions", {}).items() if found)
    size = " Tiny models: the figures mean nothing." if is_tiny else ""
    lines = [f"## {machine.get('device', 'A device')}, {date.today()}", ""]
    lines += [f"`scripts/gpu/run`; Python {machine.get('python')}, {versions}.{size}", ""]
    lines += [_limits(machine), ""] if machine.get("product_tflops") else []
    lines += _table(("goal", "found", ""), [(goal.text, goal.found, _mark(goal.is_reached)) for goal in goals(items)])
    lines += _kernels(items.get("kernels/all", {}).get("kernels", {}))
    for part in dict.fromkeys(name.partition("/")[0] for name, item in items.items() if "tokens_per_second" in item):
        lines += _speeds(part, items, machine.get("product_tflops"))
    lines += _saves(items)
    for name, item in items.items():
        if name.startswith("profile/") and item["ok"]:
            shown = (directory / item["table"]).read_text().splitlines()[:PROFILE_LINES]
            lines += [f"### {name}", "", "```text", *(line.rstrip() for line in shown), "```", ""]
    failed = [
        (name, (item.get("error") or item.get("why") or "")[-200:]) for name, item in items.items() if not item["ok"]
    ]
    if failed:
        lines += [
            "### Not done, or failed",
            "",
            *_table(("item", "why"), [(n, w.replace("\n", " ")) for n, w in failed]),
        ]
    return "\n".join(lines)


def _limits(machine: dict) -> str:
    return (
        f"The device by itself: {machine['product_tflops']} TFLOP/s in a product of bf16 matrices, {machine['copy_tb_s']} TB/s in a copy, "
        f"{machine['to_host_gb_s']} GB/s to page-locked memory, which takes {machine['page_lock_seconds_per_gib']} s a GiB to lock."
    )


def _kernels(found: dict) -> list[str]:
    rows = [
        (name, ", ".join(f"{each:.2g}" for each in item["differences"]) or "-", "yes" if item["same_bits"] else "no")
        for name, item in found.items()
    ]
    heading = ("kernel", "difference from fp64 or fp32, of the norm: output, gradients", "same bits each time")
    return ["### Kernels", "", *_table(heading, rows)] if rows else []


def _speeds(part: str, items: Items, limit: float | None) -> list[str]:
    rows = []
    for name, item in items.items():
        if name.startswith(f"{part}/") and "tokens_per_second" in item:
            share = f"{item['tflops'] / limit:.0%}" if limit else "-"
            memory = [_gib(item.get(key)) for key in ("reserved_bytes", "forecast_bytes", "host_peak_bytes")]
            first = item.get("first_step_seconds")
            rows.append(
                (name.partition("/")[2], f"{item['tokens_per_second']:,.0f}", share, *memory, f"{first or '-'}")
            )
    heading = (
        "",
        "tokens/s",
        "of the product's rate",
        "GiB reserved",
        "forecast",
        "host's peak",
        "s to the first step",
    )
    return [f"### {part}", "", *_table(heading, rows)]


def _saves(items: Items) -> list[str]:
    rows = [
        (
            name,
            f"{save['bytes'] / 1e9:.2f}",
            f"{save['blocked_ms']:.1f}",
            save["save_seconds"],
            save["read_back_seconds"],
        )
        for name, item in items.items()
        for save in item.get("saves", ())
    ]
    heading = ("save", "GB", "training waited, ms", "s until it is there", "s to read it back")
    return ["### Saves", "", *_table(heading, rows)] if rows else []


def _table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return [*(f"| {' | '.join(map(str, line))} |" for line in lines), ""]


def _gib(size: float | None) -> str:
    return f"{size / 2**30:.1f}" if size else "-"


def _mark(is_reached: bool | None) -> str:
    return "not judged" if is_reached is None else "reached" if is_reached else "missed"
