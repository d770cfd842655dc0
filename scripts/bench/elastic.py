"""What `train.reproducibility: elastic` costs beside `exact`: tokens a second, memory and bytes between ranks, on two CPUs.

`python scripts/bench/elastic.py` trains a random Llama of 26 M parameters on two gloo ranks, in turns: with LoRA, and all of its weights.
Each step has four micro-batches a rank. Bytes are what the loopback of a network namespace carries, so nothing else counts. Ratios are
those of `elastic` to `exact`, of the medians.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import yaml
from loading import child
from training import Shape, Work, write_recipe

CASES = {"LoRA": {"name": "lora", "rank": 16}, "full": None}
SHAPES = {"small": Shape(8, 512, 1408, 1024), "tiny": Shape(4, 64, 128, 300)}
WORK = Work(rows=8, tokens=128)
MICRO_BATCH_TOKENS = 128
APART = ["unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
"""A loopback of its own, whose counters are the ranks' alone."""


def measured(recipe: Path, run: Path, steps: int) -> dict[str, float]:
    """Of the steps after the first two: seconds and CPU seconds (medians), bytes of both ranks a step, and the most memory of a rank."""
    from finetune.recipe.load import load
    from finetune.store.run import journal
    from finetune.training import loop
    from finetune.training.run import train

    sent, used, train_step = [_sent_bytes()], [time.process_time()], loop.train_step

    def counted(*arguments: object, **settings: object) -> object:
        report = train_step(*arguments, **settings)
        used.append(time.process_time())
        torch.distributed.barrier()
        sent.append(_sent_bytes())
        return report

    loop.train_step = counted
    train(load(recipe), run, is_quiet=True, until=steps)
    found = journal.steps(journal.read(run))
    later = [found[step] for step in range(3, steps + 1)]
    return {
        "seconds": statistics.median(each["seconds"] for each in later),
        "cpu": statistics.median(after - before for before, after in zip(used[2:], used[3:], strict=False)),
        "bytes": statistics.median(after - before for before, after in zip(sent[2:], sent[3:], strict=False)),
        "memory": max(each["memory_bytes"] for each in later),
        "tokens": later[0]["tokens"],
    }


def _sent_bytes() -> int:
    """Over the loopback, so far."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a model of 0.2 M parameters, to try the script")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3, help="trainings of each way")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        found = measured(*options.measure, options.steps)
        torch.distributed.barrier()  # the launcher ends the others as soon as one has ended
        if os.environ["RANK"] == "0":
            print(json.dumps(found), flush=True)
        os._exit(0)  # as the command line ends: a thread of gloo may abort the end of the interpreter
    found = {name: _case(adapter, options) for name, adapter in CASES.items()}
    for name, ways in found.items():
        exact, elastic = (
            {key: statistics.median(turn[key] for turn in ways[way]) for key in ways[way][0]}
            for way in ("exact", "elastic")
        )
        speed = {way: each["tokens"] / each["seconds"] for way, each in (("exact", exact), ("elastic", elastic))}
        print(
            f"{name:5} {speed['exact']:.0f} -> {speed['elastic']:.0f} tokens/s ({speed['elastic'] / speed['exact']:.2f}),"
            f" {exact['cpu']:.3f} -> {elastic['cpu']:.3f} CPU s a step of rank 0 ({elastic['cpu'] / exact['cpu']:.2f}),"
            f" {exact['memory'] / 1e6:.0f} -> {elastic['memory'] / 1e6:.0f} MB ({elastic['memory'] / exact['memory']:.2f}),"
            f" {exact['bytes'] / 1e6:.3g} -> {elastic['bytes'] / 1e6:.3g} MB a step ({elastic['bytes'] / exact['bytes']:.2f})",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _case(adapter: dict[str, object] | None, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, __file__]
    found: dict[str, list[dict[str, float]]] = {"exact": [], "elastic": []}
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder, "recipe.yaml"), SHAPES["tiny" if options.tiny else "small"], WORK, adapter)
        for turn in range(options.turns):
            for way, results in found.items():
                sections = yaml.safe_load(recipe.read_text())
                sections["train"] |= {"reproducibility": way, "precision": "fp32", "strategy": "ddp"}
                sections["train"]["micro_batch_tokens"] = MICRO_BATCH_TOKENS
                recipe.write_text(yaml.safe_dump(sections))
                measure = ["--measure", recipe, Path(folder, f"{way}-{turn}"), "--steps", options.steps]
                results.append(json.loads(child(*launcher, *measure, before=APART).splitlines()[-1]))
    return found


if __name__ == "__main__":
    main()
