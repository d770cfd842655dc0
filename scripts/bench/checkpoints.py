"""What checkpoints cost: every figure that is promised, side by side with other ways to save, in one run on this machine.

    python scripts/bench/checkpoints.py --work DIRECTORY [--only a,b,c,d,e,f] [--json FILE]

a  blocked time per save of a full AdamW state of 500 MB and of a LoRA state: ours, torch.save, accelerate, torch's DCP, a bare copy
b  wall-clock overhead of saving at every tenth step (SmolLM2-135M, all weights) and at every step (LoRA), beside a writer process;
   with fewer --rows the seconds that a save adds come out of less noise, and its share of a longer step follows
c  time until a save is durable, beside a raw write and fsync of the same bytes
d  resuming: verify, load, seek
e  bytes on the disk after 50 saves, beside transformers' Trainer
f  blocked time per save of the same state where two ranks hold rows of it and each writes its own (fsdp), beside two ranks of which one
   writes all (ddp), and beside one process; each process has one thread

Needs about 20 GB on the file system of DIRECTORY, which is removed at the end. `--tiny` runs every part on a tiny model.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import machine
import overhead
import resume
import sharded
import size
import stall
import torch
import transformers
from figures import Part
from training import MEDIUM, SMOLLM2, TINY, Work, opened, write_recipe

LORA = {"name": "lora"}
SHORT, LONG = Work(rows=4, tokens=128), Work(rows=8, tokens=500)  # 512 and 4,000 tokens an update


def part_a(work: Path, options: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    for name, model, adapter in (("full", options.medium, None), ("LoRA", options.real, LORA)):
        recipe = write_recipe(work / f"a-{name}.yaml", model, options.short, adapter)
        with opened(recipe, work / f"a-{name}") as training:
            yield f"a, {name}", stall.blocked(training, options.rounds)


def part_b(work: Path, options: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    for name, adapter, measure in (("full", None, overhead.every_ten), ("LoRA", LORA, overhead.every_step)):
        recipe = write_recipe(work / f"b-{name}.yaml", options.real, options.long, adapter)
        for threads in (1, 2):
            with opened(recipe, work / f"b-{name}-{threads}") as training:
                yield f"b, {name}, {threads} threads", measure(training, options.cycles, options.block, threads)
            shutil.rmtree(work / f"b-{name}-{threads}")


def part_c(work: Path, options: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    recipe = write_recipe(work / "c.yaml", options.medium, options.short)
    with opened(recipe, work / "c") as training:
        yield "c", stall.durable(training, options.rounds)


def part_d(work: Path, options: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    recipe = write_recipe(work / "d.yaml", options.medium, options.short)
    with opened(recipe, work / "d") as training:
        yield "d", resume.resumed(training, options.rounds)


def part_e(work: Path, options: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    yield "e", size.sizes(work, options.medium, options.saves)


def part_f(work: Path, options: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    yield "f", sharded.beside_single(work, options.medium, options.short, options.rounds)


PARTS: dict[str, Callable] = {"a": part_a, "b": part_b, "c": part_c, "d": part_d, "e": part_e, "f": part_f}


def main() -> None:
    options = arguments()
    quieten()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine.facts(options.work),
        "options": {name: str(value) for name, value in vars(options).items()},
        "parts": {},
    }
    print(json.dumps(report["machine"], indent=1))
    goals = []
    for letter in options.only:
        work = Path(tempfile.mkdtemp(prefix=f"bench-{letter}-", dir=options.work))
        busy_before = machine.busy_cores()
        torch.set_num_threads(options.threads)
        for name, part in PARTS[letter](work, options):
            part.facts["cores kept busy by others, before and after"] = f"{busy_before}, {machine.busy_cores()}"
            print(f"\n== {name}\n{part.show()}", flush=True)
            report["parts"][name] = part.record()
            goals += part.goals
        shutil.rmtree(work)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n== goals\n" + "\n".join(goal.show() for goal in goals))


def quieten() -> None:
    """Libraries say the same at every save; the report is for a person."""
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="where runs are written; its file system is what is measured"
    )
    parser.add_argument("--only", type=letters, default=list(PARTS), help="some of the parts, like a,c")
    parser.add_argument("--json", type=Path, help="also write every sample here")
    parser.add_argument("--rounds", type=int, default=20, help="a, c, d, f: saves of each contestant")
    parser.add_argument("--cycles", type=int, default=5, help="b: blocks of each kind, in each of four settings")
    parser.add_argument("--block", type=int, default=1, help="b: steps of a block")
    parser.add_argument("--rows", type=int, default=LONG.rows, help="b: rows of 500 tokens in an update")
    parser.add_argument("--saves", type=int, default=50, help="e: saves of a run")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch threads, of all parts but b"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model in place of all others: whether it runs, not how fast"
    )
    options = parser.parse_args()
    options.medium, options.real = (TINY, TINY) if options.tiny else (MEDIUM, SMOLLM2)
    options.short, options.long = (
        (Work(2, 16), Work(2, 16)) if options.tiny else (SHORT, LONG._replace(rows=options.rows))
    )
    return options


def letters(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - PARTS.keys():
        raise argparse.ArgumentTypeError(
            f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}"
        )
    return chosen


if __name__ == "__main__":
    sys.exit(main())
