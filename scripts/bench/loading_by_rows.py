"""The most host memory of each of two ranks while `fsdp` reads a base: its own rows from the files, beside the whole base first.

`python scripts/bench/loading_by_rows.py` makes a random Llama of 400 MB (fp32: 800 MB) in eight shards, and builds the state of each way
to train twice, in two processes on the CPU. Memory of mapped files counts apart: the system takes it back when it is needed.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from loading import CASES, SHAPES, WORK, child, peaks_above, set_base
from training import write_recipe

RANKS = 2
LIMIT = 0.7  # of the weights: half, what is under way, and libraries that are imported meanwhile


def measured(recipe: Path, is_by_rows: bool) -> dict[str, float]:
    """Bytes at the worst moment of building, of the rank with most, above those before it; of all weights; and seconds."""
    from finetune.model import base, losses, shards
    from finetune.recipe.load import load
    from finetune.training import build as building
    from finetune.training.resolve import resolve
    from finetune.training.strategy.start import start_accelerator

    loaded = load(recipe)
    accelerator, resolved = start_accelerator(loaded.recipe.train), resolve(loaded)
    directory = base.directory(resolved.plan.recipe.base, resolved.plan.base)
    building.fitting_loss = lambda *_: (
        losses.chunked,
        None,
    )  # forwards, of which each step has more; kept after the first start
    if not is_by_rows:
        building.unread_model = lambda *_: None
    started = time.perf_counter()
    with peaks_above() as peaks:
        state = building.build(resolved.plan, directory, accelerator, "fsdp")
    seconds = time.perf_counter() - started
    kept = list(state.model.parameters())
    sizes = [sum(each.nbytes for each in kept), sum(shards.local(each).nbytes for each in kept)]
    mine = torch.tensor([peaks["own"], peaks["mapped"], sizes[1], sizes[0]])
    own, mapped, rows, whole = accelerator.gather(mine).reshape(-1, len(mine)).amax(0).tolist()
    return {"seconds": seconds, "own": own, "mapped": mapped, "rows": rows, "weights": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a model of 0.3 MB, to try the script")
    parser.add_argument("--only", metavar="CASE", choices=CASES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        found = measured(options.measure, not options.whole)
        torch.distributed.destroy_process_group()
        if os.environ["RANK"] == "0":
            print(json.dumps(found), flush=True)
    else:
        _all(options)


def _all(options: argparse.Namespace) -> None:
    found = {}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS, __file__]
    with tempfile.TemporaryDirectory() as folder:
        for stored in ("bfloat16", "float32"):
            for name, (adapter, train) in CASES.items():
                if options.only not in (None, name):
                    continue
                recipe = write_recipe(
                    Path(folder, "recipe.yaml"), SHAPES["tiny" if options.tiny else "small"], WORK, adapter
                )
                place = child(str(Path(__file__).with_name("loading.py")), "--shard", recipe, stored).strip()
                set_base(recipe, place, {**train, "strategy": "fsdp"})
                both = [
                    json.loads(child(*launcher, "--measure", recipe, *way).splitlines()[-1])
                    for way in ([], ["--whole"])
                ]
                found[f"{stored}: {name}"] = dict(zip(("by rows", "whole"), both, strict=True))
                _show(f"{stored}: {name}", *both)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _show(name: str, rows: dict[str, float], whole: dict[str, float]) -> None:
    own, before = (each["own"] / each["weights"] for each in (rows, whole))
    mapped = ", ".join(f"{each['mapped'] / 1e6:.0f}" for each in (rows, whole))
    verdict = "" if own <= LIMIT else f"  ABOVE {LIMIT:g}"
    print(
        f"{name:30} {own:5.2f} of {rows['weights'] / 1e6:.0f} MB a rank, {before:5.2f} whole first ({before / own:.1f} times);"
        f" mapped {mapped} MB; {rows['seconds']:.1f} s, {whole['seconds']:.1f} s{verdict}",
        flush=True,
    )


if __name__ == "__main__":
    main()
