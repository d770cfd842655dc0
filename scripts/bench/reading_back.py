"""The bytes that each rank reads in a sharded save and in a resume from it, on the CPU.

`python scripts/bench/reading_back.py` trains all weights of a random Llama (111 MB, and 222 MB of moments) on 2 and on 4 ranks, commits
and resumes. Files are divided at 8 MB, so that there are as many as of a large model. The bytes are those that the system counts for the
thread (`/proc/thread-self/io`). One rank that reads everything reads 1.0 of a checkpoint, and so did each on a resume.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from loading import child
from training import Shape, Work, write_recipe

FILE_BYTES = 8_000_000
SHAPES = {"small": Shape(8, 512, 1408, 4096), "tiny": Shape(4, 64, 128, 300)}
WORK = Work(rows=4, tokens=32)


class Counted:
    """What the calls of a function have read, and how long they took."""

    def __init__(self, function: Callable[..., object]):
        self._function = function
        self.bytes, self.seconds = 0, 0.0

    def __call__(self, *arguments: object, **settings: object) -> object:
        before, started = _read_bytes(), time.perf_counter()
        try:
            return self._function(*arguments, **settings)
        finally:
            self.bytes += _read_bytes() - before
            self.seconds += time.perf_counter() - started


@contextmanager
def counted() -> Iterator[dict[str, Counted]]:
    """Reads of files of a checkpoint: back in a save, and before a resume."""
    from finetune.store.checkpoints import assembled, tensor_files
    from finetune.training import agreement

    made = {"save": Counted(assembled.read_back), "resume": Counted(agreement.verify)}
    with (
        patch.object(assembled, "read_back", made["save"]),
        patch.object(agreement, "verify", made["resume"]),
        patch.object(tensor_files, "FILE_BYTES", FILE_BYTES),
    ):
        yield made


def measured(recipe: Path, run: Path) -> dict[str, list[float]]:
    """Of each rank: bytes read and seconds, in a save and in a resume, and the bytes of the checkpoint."""
    from finetune.recipe.load import load
    from finetune.store.checkpoints.store import Store
    from finetune.training.run import train

    with counted() as made:
        train(load(recipe), run, is_quiet=True, until=1)
        train(load(recipe), run, is_quiet=True, until=1)
    size = sum(record.bytes for record in Store(run).find(1).manifest.files.values())
    own = torch.tensor([size, *(each.bytes for each in made.values()), *(each.seconds for each in made.values())])
    found = [torch.empty_like(own) for _ in range(int(os.environ["WORLD_SIZE"]))]
    torch.distributed.all_gather(found, own)
    rows = torch.stack(found).T.tolist()
    return dict(zip(("bytes", "save", "resume", "save seconds", "resume seconds"), rows, strict=True))


def _read_bytes() -> int:
    lines = Path("/proc/thread-self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a model of 0.7 MB, to try the script")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        found = measured(*options.measure)
        torch.distributed.barrier()  # the launcher ends the others as soon as one has ended
        if os.environ["RANK"] == "0":
            print(json.dumps(found), flush=True)
        os._exit(0)  # as the command line ends: a thread of gloo may abort the end of the interpreter
    found = {str(ranks): _of(ranks, options.tiny) for ranks in options.ranks}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def _of(ranks: int, is_tiny: bool) -> dict[str, list[float]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, __file__]
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_recipe(Path(folder, "recipe.yaml"), SHAPES["tiny" if is_tiny else "small"], WORK)
        sections = recipe.read_text().replace('"batch_size"', '"strategy": "fsdp", "precision": "fp32", "batch_size"')
        recipe.write_text(sections)
        found = json.loads(child(*launcher, "--measure", recipe, Path(folder, "run")).splitlines()[-1])
    size = found["bytes"][0]
    for what in ("save", "resume"):
        shares = ", ".join(f"{each / size:.2f}" for each in found[what])
        seconds = ", ".join(f"{each:.2f}" for each in found[f"{what} seconds"])
        print(f"{ranks} ranks, {what:6}: {shares} of {size / 1e6:.0f} MB by rank; {seconds} s", flush=True)
    return found


if __name__ == "__main__":
    main()
