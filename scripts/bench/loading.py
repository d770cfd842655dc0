"""The most host memory that a training takes while its base is loaded, above the place of the weights themselves, in shards of the base.

`python scripts/bench/loading.py` makes a random Llama of 400 MB in eight shards and loads it once for each way to train, in a process
each. Memory of mapped files counts apart: the system takes it back when it is needed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from training import Shape, Work, write_recipe

SHARDS, SAMPLED_SECONDS = 8, 0.002
LORA = {"name": "lora", "rank": 8}
CASES = {
    "LoRA, bf16": (LORA, {"precision": "bf16"}),
    "LoRA, bf16 weights": (LORA, {"precision": "bf16", "weights": "bf16"}),
    "LoRA, fp32": (LORA, {"precision": "fp32"}),
    "full, bf16": (None, {"precision": "bf16"}),
    "full, bf16 weights": (None, {"precision": "bf16", "weights": "bf16"}),
}
SHAPES = {"small": Shape(16, 1024, 2816, 8192), "tiny": Shape(8, 64, 128, 300)}
LIMIT = 2.0
WORK = Work(rows=2, tokens=32)


def measured(recipe: Path) -> dict[str, float]:
    """Bytes at the worst moment of loading, above those before it: in memory of its own, and in mapped files."""
    from finetune.model import base
    from finetune.recipe.load import load
    from finetune.training.build import build
    from finetune.training.resolve import resolve
    from finetune.training.strategy.start import start_accelerator

    loaded = load(recipe)
    accelerator, resolved = start_accelerator(loaded.recipe.train), resolve(loaded)
    directory = base.directory(resolved.plan.recipe.base, resolved.plan.base)
    started = time.perf_counter()
    with peaks_above() as peaks:
        state = build(resolved.plan, directory, accelerator)
    seconds = time.perf_counter() - started
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in state.model.parameters()}
    shards = [file.stat().st_size for file in directory.glob("*.safetensors")]
    return {
        "seconds": seconds,
        "weights": sum(weights.values()),
        "shard": max(shards),
        "shards": len(shards),
        **peaks,
    }


@contextmanager
def peaks_above() -> Iterator[dict[str, int]]:
    """The most bytes meanwhile above those before, once it is over."""
    before, is_over = resident(), threading.Event()
    peaks = dict.fromkeys(before, 0)

    def sample() -> None:
        while not is_over.wait(SAMPLED_SECONDS):
            for kind, value in resident().items():
                peaks[kind] = max(peaks[kind], value - before[kind])

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peaks
    finally:
        is_over.set()
        sampler.join()


def resident() -> dict[str, int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"own": int(lines["RssAnon"].split()[0]) << 10, "mapped": int(lines["RssFile"].split()[0]) << 10}


def sharded(recipe: Path, stored: str) -> Path:
    """The base of a recipe in shards, stored in a type, beside it."""
    import torch
    import yaml
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sections = yaml.safe_load(recipe.read_text())
    base = Path(sections["base"]["checkpoint"])
    target = base.with_name(f"{base.name}-{stored}")
    if not target.exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, stored))
        total = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(target, max_shard_size=int(1.1 * total / SHARDS))
        AutoTokenizer.from_pretrained(base).save_pretrained(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a model of 0.3 MB, to try the script")
    parser.add_argument("--only", metavar="CASE", choices=CASES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shard", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure)))
    elif options.shard:
        print(sharded(Path(options.shard[0]), options.shard[1]))
    else:
        _all(options)


def _all(options: argparse.Namespace) -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPES["tiny" if options.tiny else "small"]
        for stored in ("bfloat16", "float32"):
            for name, (adapter, train) in CASES.items():
                if options.only not in (None, name):
                    continue
                recipe = write_recipe(Path(folder, "recipe.yaml"), shape, WORK, adapter)
                place = child(__file__, "--shard", recipe, stored).strip()
                set_base(recipe, place, train)
                found[f"{stored}: {name}"] = json.loads(child(__file__, "--measure", recipe).splitlines()[-1])
                _show(f"{stored}: {name}", found[f"{stored}: {name}"])
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def set_base(recipe: Path, place: str, train: dict[str, str]) -> None:
    import yaml

    sections = yaml.safe_load(recipe.read_text())
    sections["base"]["checkpoint"] = place
    sections["train"] |= train
    recipe.write_text(yaml.safe_dump(sections))


def child(*words: object, before: Sequence[str] = ()) -> str:
    """What a Python prints; `before` are words of a command that starts it."""
    command = [*before, sys.executable, *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _show(name: str, found: dict[str, float]) -> None:
    above = (found["own"] - found["weights"]) / found["shard"]
    mapped = found["mapped"] / found["shard"]
    sizes = f"{found['weights'] / 1e6:.0f} MB of weights, {found['shards']:.0f} shards of {found['shard'] / 1e6:.1f} MB"
    verdict = "" if above <= LIMIT else f"  ABOVE {LIMIT:g}"
    print(
        f"{name:30} {above:6.2f} shards above the weights, {mapped:5.2f} mapped; {sizes}; {found['seconds']:.1f} s{verdict}",
        flush=True,
    )


if __name__ == "__main__":
    main()
