"""Ours beside what people would use instead: the same rows, the same tokens an update, one process each, in turns, on this machine.

    python scripts/bench/throughput.py --json FILE [--part throughput] [--cells full-512-bf16,...] [--only finetune,...]
    python scripts/bench/throughput.py --write docs/benchmarks.md --from FILE...

throughput  tokens/s, peak memory, MFU and seconds to the first step of every contestant, and whether their losses agree
start       from the start of a process to its first step on three bases, and resuming at positions 10, 2,000 and 2,000,000
overhead    what the loop and its journal add to the bare arithmetic of a tiny model
update      clipping, AdamW and zeroing for the model's 134.5 M parameters, beside fused AdamW alone
profile     the operators of one step, ours and a bare loop's

TRL, for the SFTTrainer, is no part of the set-up: `pip install '.[bench]'`, or --python with an interpreter that has it.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import cells
import comparison
import loop_cost
import machine
import page
import processes
import starting
import step_profile
import torch
import update
from figures import OURS, Part, rotated

from finetune.store.run import journal

HERE = Path(__file__).parent / "contenders"
OF_GPUS = "\n## On GPUs\n"  # from here on the page is written by scripts/gpu, and stays


class Contestant(NamedTuple):
    title: str
    command: str
    needs_trl: bool = False


CONTESTANTS = {
    "bare-padded": Contestant("bare loop, padded", "{python} {here}/bare.py {job} {answer} padded"),
    "bare-packed": Contestant("bare loop, packed", "{python} {here}/bare.py {job} {answer} packed"),
    "bare-chunked": Contestant("bare, packed, chunked loss", "{python} {here}/bare.py {job} {answer} chunked"),
    "bare-per-row": Contestant("the same, attention per row", "{python} {here}/bare.py {job} {answer} per_row"),
    "trainer": Contestant("Trainer", "{python} {here}/trainer.py {job} {answer}"),
    "sft-padded": Contestant("SFTTrainer, padded", "{python} {here}/sft.py {job} {answer} padded", needs_trl=True),
    "sft-packed": Contestant("SFTTrainer, packed", "{python} {here}/sft.py {job} {answer} packed", needs_trl=True),
    OURS: Contestant("finetune", "{python} -m finetune train {recipe} --run {run} --quiet"),
}


def measure(name: str, prepared: cells.Prepared, options: argparse.Namespace) -> dict:
    """One run of a contestant."""
    contestant, folder = CONTESTANTS[name], prepared.job.parent
    answer, run = folder / f"{name}.answer", folder / f"{name}.run"
    python = (options.python or sys.executable) if contestant.needs_trl else sys.executable
    places = {"python": python, "here": HERE, "job": prepared.job, "recipe": prepared.recipe}
    command = [word.format(**places, answer=answer, run=run) for word in contestant.command.split()]
    outcome = processes.run(command, options.environment, folder / f"{name}.log")
    figures = of_run(run) if name == OURS else json.loads(answer.read_bytes()) | {"staged_bytes": 0}
    shutil.rmtree(run, ignore_errors=True)
    return vars(outcome) | figures


def of_run(run: Path) -> dict:
    """What the journal says of ours."""
    records = journal.read(run)
    steps = list(journal.steps(records).values())
    return {
        "ends": [datetime.fromisoformat(step["time"]).timestamp() for step in steps],
        "losses": [step["loss"] for step in steps],
        "tokens": [step["tokens"] for step in steps],
        "staged_bytes": max(record["bytes"] for record in records if record.get("event") == "committed"),
    }


def part_throughput(work: Path, options: argparse.Namespace, report: dict, save: Callable[[], None]) -> None:
    chosen = [cells.parse(name) for name in options.cells]
    prepared = {cell: cells.prepare(cell, options.steps, options.model, work / cell.name) for cell in chosen}
    report["rows"] = {cell.name: prepared[cell].facts for cell in chosen}
    runs = report["runs"] = []
    for turn in range(options.rounds):
        for cell in chosen:
            for name in rotated(options.only, turn):
                types = {"bf16": torch.bfloat16, "fp32": torch.float32}
                size = 128 if options.tiny else 2048  # some CPUs have no instructions for bf16
                peaks = {key: processes.matmul_peak(dtype, size) for key, dtype in types.items()}
                run = {"cell": cell.name, "contestant": name, "round": turn, "malloc": options.malloc, "matmul": peaks}
                runs.append(run | measure(name, prepared[cell], options))
                print(f"{turn} {cell.name:18} {name:14} {page.run_line(runs[-1])}", flush=True)
                save()
    print(page.throughput(report, {name: contestant.title for name, contestant in CONTESTANTS.items()}))
    if wrong := comparison.disagreeing(runs):
        report["disagreeing"] = wrong
        print("\n".join(wrong))


def other_part(parts: Callable) -> Callable:
    def part(work: Path, options: argparse.Namespace, report: dict, save: Callable[[], None]) -> None:
        for name, found in parts(work, options, measure):
            print(f"\n== {name}\n{found.show() if isinstance(found, Part) else page.operators(found)}", flush=True)
            report["parts"][name] = found.record() if isinstance(found, Part) else found
            save()

    return part


PARTS = {
    "throughput": part_throughput,
    "start": other_part(starting.parts),
    "overhead": other_part(loop_cost.parts),
    "update": other_part(update.parts),
    "profile": other_part(step_profile.parts),
}


def main() -> int:
    options = arguments()
    if options.write:
        reports = [json.loads(file.read_bytes()) for file in options.sources]
        titles = {name: contestant.title for name, contestant in CONTESTANTS.items()}
        earlier = options.write.read_text() if options.write.exists() else ""
        options.write.write_text(page.whole(reports, titles) + "".join(earlier.partition(OF_GPUS)[1:]))
        return 0
    torch.set_num_threads(options.threads)
    work = Path(tempfile.mkdtemp(prefix="bench-", dir=options.work))
    options.environment = processes.environment(options.malloc, options.threads, work / "cache")
    options.model = starting.random_model(work / "model") if options.tiny else cells.model_directory()
    os.environ["FINETUNE_CACHE"] = options.environment["FINETUNE_CACHE"]  # of the parts that run in this process
    report = {"machine": machine.facts(work), "command": command(), "parts": {}}
    report["machine"]["busy_cores_before"] = machine.busy_cores()

    def save() -> None:
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    try:
        for part in options.part:
            PARTS[part](work, options, report, save)
    finally:
        save()
        shutil.rmtree(work)
    return 1 if options.check and report.get("disagreeing") else 0


def command() -> str:
    """What was asked for, without this machine's paths."""
    words = sys.argv[1:]
    for option, name in (("--python", "PYTHON"), ("--work", "DIR"), ("--json", "REPORT")):
        if option in words:
            words[words.index(option) + 1] = name
    return " ".join(words)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--part", type=_listed(PARTS), default=["throughput"], help="one or several, like overhead,update")
    add("--cells", type=lambda text: text.split(","), default=[cell.name for cell in cells.CELLS])
    add("--only", type=_listed(CONTESTANTS), default=list(CONTESTANTS), help="some of the contestants")
    add("--rounds", type=int, default=5, help="runs of each contestant, or samples of each figure")
    add("--steps", type=int, default=12, help="updates of a run; the first two are not counted")
    add("--malloc", choices=processes.MALLOC, default="tuned", help="glibc's settings, the same for all")
    add("--threads", type=int, default=torch.get_num_threads(), help="torch threads, the same for all")
    add("--python", help="an interpreter that has TRL")
    add("--work", type=Path, help="where runs are written, some GB. Default: the system's temporary directory")
    add("--json", type=Path, help="where every sample is written")
    add("--check", action="store_true", help="at least 20 steps; exit code 1 when losses do not agree")
    add("--tiny", action="store_true", help="a tiny model in place of the real one: whether it runs, not how fast")
    add("--write", type=Path, help="write the page from reports, and measure nothing")
    add("--from", dest="sources", type=Path, nargs="+", default=[], help="the reports")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error("--steps: the first two are not counted, so there must be three")
    if options.check:
        options.steps = max(options.steps, comparison.CHECKED)
    for name in options.cells:
        try:
            cells.parse(name)
        except ValueError as error:
            parser.error(str(error))
    return options


def _listed(table: dict) -> Callable[[str], list[str]]:
    def listed(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - table.keys():
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(table)}")
        return chosen

    return listed


if __name__ == "__main__":
    sys.exit(main())
