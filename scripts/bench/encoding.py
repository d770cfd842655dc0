"""What it costs to turn rows into tokens, to find them again, and to begin with what is there.

    python scripts/bench/encoding.py --work DIRECTORY [--rows 100000] [--examples 1000000] [--rounds 3] [--tiny] [--json FILE]

encode  rows of chat a second: in one process (the tokenizer has a thread a core) and in a worker process a core
start   `resolve` with a cold cache, with a warm one, and with a large entry that was hashed before in this boot
seek    an update of 32 rows from a position of an order over a million examples, and the memory they take

The rows are drawn from the standard library's words; the base is the one of recipes/smollm2-135m.
"""

import argparse
import json
import os
import random
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import machine
import numpy as np
from figures import OURS, Goal, Part, Quantity, rotated
from training import SMOLLM2, TINY, _random_base

from finetune.data import encode as encoding
from finetune.data.batches import Examples
from finetune.data.example import Encoded, Example
from finetune.plan.row_order import Order
from finetune.recipe.load import load
from finetune.store import cache
from finetune.training.resolve import resolve

ONE, WORKERS = "in one process", OURS
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def encoded(work: Path, options: argparse.Namespace) -> Part:
    """The whole of `resolve` with a cold cache: the base is read and the file hashed as well."""
    recipe = write_chat(work, options)
    seconds = Quantity(f"a cold start with {options.rows:,} rows", "s")
    digests = set()
    for turn in range(options.rounds):
        for name in rotated((ONE, WORKERS), turn):
            with own_cache(work / "encoded") as directory, parallel_from(0 if name == WORKERS else sys.maxsize):
                seconds.add(name, seconds_of(lambda: resolve(load(recipe))))
                digests.update(file.read_text() for file in directory.glob("encoded/*/digests.json"))
    facts = {
        "worker processes": encoding.workers(),
        **{f"rows a second, {name}": round(options.rows / seconds.median(name)) for name in (ONE, WORKERS)},
        "bytes that differ": "none" if len(digests) == 1 else "SOME",
    }
    goals = [Goal("workers / one process, seconds", seconds.median() / seconds.median(ONE), 1.0, "x")]
    return Part([seconds], goals, facts)


def started(work: Path, options: argparse.Namespace) -> Part:
    recipe = write_chat(work, options)
    seconds = Quantity("`resolve`", "s")
    with own_cache(work / "started") as directory:
        seconds.add("cold cache", seconds_of(lambda: resolve(load(recipe))))
        usual = cache.STAMPED_BYTES
        for turn in range(-1, options.rounds):
            for name in rotated((OURS, "warm cache, not hashed"), max(0, turn)):
                cache.STAMPED_BYTES = sys.maxsize if name == OURS else 0
                taken = seconds_of(lambda: resolve(load(recipe)))
                if turn >= 0:  # the first one writes the stamp
                    seconds.add(name, taken)
        cache.STAMPED_BYTES = usual
        [entry] = [path for path in (directory / "encoded").iterdir() if path.is_dir()]
        size = sum(file.stat().st_size for file in entry.iterdir())
        speed = Quantity("hashing an entry, warm files", "GB/s")
        for _ in range(options.rounds):
            speed.add(OURS, size / 1e9 / seconds_of(lambda: cache.is_sound(entry)))
    seconds.notes = {OURS: "warm cache, every byte hashed", "warm cache, not hashed": "as with a stamp of this boot"}
    return Part([seconds, speed], [], {"bytes of the entry": size, "bytes up to which all is hashed": usual})


def sought(work: Path, options: argparse.Namespace) -> Part:
    """Examples of 2 to 600 tokens, made without a tokenizer."""
    with own_cache(work / "sought"):
        before = anonymous_bytes()
        started = time.perf_counter()
        source = encoding.encode(Numbers(options.examples), str, made, "seek", str(options.examples))
        written = time.perf_counter() - started
        grown = anonymous_bytes() - before
        everything = np.arange(len(source), dtype=np.int32)
        examples = Examples([(source, everything, 0)])
        held = anonymous_bytes() - before - grown
        order = Order(0, 32, (len(examples),))
        opening, seek, row = (
            Quantity("to open an entry and join its columns", "s"),
            Quantity("the ids of the 32 rows of an update, anywhere in epoch 999", "ms"),
            Quantity("one of them, its tokens read", "ms"),
        )
        [entry] = (work / "sought/encoded").iterdir()
        for turn in range(100 * options.rounds):
            if turn % 100 == 0:
                opening.add(OURS, seconds_of(lambda: Examples([(Encoded(entry), everything, 0)])))
            step = 998 * order.steps_per_epoch + 1 + turn * 7919 % order.steps_per_epoch
            seek.add(OURS, seconds_of(lambda step=step: order.examples_of(step)))
            ids = order.examples_of(step).tolist()
            row.add(OURS, seconds_of(lambda ids=ids: [examples[index].tokens.sum() for index in ids]) / len(ids))
    facts = {
        "examples": len(examples),
        "bytes of tokens on the disk": source.tokens.nbytes + source.supervised.nbytes,
        "seconds to write them": round(written, 1),
        "memory that encoding left in use, bytes": grown,
        "memory that the columns take, bytes an example": round(held / len(examples), 1),
    }
    return Part([opening, seek, row], [Goal("a row of a million", row.median(), 50e-6, "ms")], facts)


class Numbers:
    """A source whose rows are their numbers."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> dict:
        return {"row": row}


def made(rows: list[dict], places: list[str]) -> list[list[Example]]:
    lengths = [2 + row["row"] * 7919 % 599 for row in rows]
    return [[Example(np.full(length, length, np.int32), np.ones(length, dtype=bool))] for length in lengths]


def write_chat(work: Path, options: argparse.Namespace) -> Path:
    """A recipe of conversations of one to three turns; 320 tokens on average."""
    path, data = work / "chat.yaml", work / "chat.jsonl"
    if path.exists():
        return path
    words = [
        word
        for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20]
        for word in file.read_text().split()
    ]
    words = [word for word in words if "<" not in word]
    draw = random.Random(0)
    with data.open("w") as file:
        for _ in range(options.rows):
            messages = [
                {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(*longest)))}
                for _ in range(draw.choice((1, 1, 1, 2, 3)))
                for role, longest in (("user", (5, 40)), ("assistant", (20, 80)))
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    checkpoint = _random_base(work, TINY) if options.tiny else SMOLLM2
    task = {"name": "chat", "max_length": 1024}
    if options.tiny:
        (work / "template.jinja").write_text(CHATML)
        task["template"] = str(work / "template.jinja")
    sections = {"base": {"checkpoint": checkpoint}, "task": task, "data": {"train": [{"path": str(data)}]}}
    sections |= {"optimizer": {"learning_rate": 1e-5}, "train": {"steps": 10, "batch_size": 4}}
    path.write_text("".join(f"{name}: {json.dumps(section)}\n" for name, section in sections.items()))
    return path


@contextmanager
def own_cache(directory: Path) -> Iterator[Path]:
    """An empty cache, but for the converted base."""
    usual = cache.root()
    directory.mkdir()
    if (usual / "converted").exists():
        (directory / "converted").symlink_to((usual / "converted").absolute())
    before = os.environ.get("FINETUNE_CACHE")
    os.environ["FINETUNE_CACHE"] = str(directory)
    try:
        yield directory
    finally:
        os.environ.pop("FINETUNE_CACHE")
        if before is not None:
            os.environ["FINETUNE_CACHE"] = before
        shutil.rmtree(directory)


@contextmanager
def parallel_from(rows: int) -> Iterator[None]:
    usual, encoding.PARALLEL_ROWS = encoding.PARALLEL_ROWS, rows
    try:
        yield
    finally:
        encoding.PARALLEL_ROWS = usual


def anonymous_bytes() -> int:
    """Memory that no file backs: pages of mapped files are the kernel's to drop."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


PARTS: dict[str, Callable] = {"encode": encoded, "start": started, "seek": sought}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where rows and caches are written, about 3 GB")
    parser.add_argument("--rows", type=int, default=100_000, help="encode, start: conversations")
    parser.add_argument("--examples", type=int, default=1_000_000, help="seek: encoded examples")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help="like encode,seek")
    parser.add_argument("--json", type=Path, help="also write every sample here")
    parser.add_argument("--tiny", action="store_true", help="a random base and few rows: whether it runs, not how fast")
    options = parser.parse_args()
    if options.tiny:
        options.rows, options.examples = 9_000, 10_000
    options.work.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine.facts(options.work), "parts": {}}
    print(json.dumps(report["machine"], indent=1))
    work = Path(tempfile.mkdtemp(prefix="bench-encoding-", dir=options.work))
    for name in options.only:
        busy = machine.busy_cores()
        part = PARTS[name](work, options)
        part.facts["cores kept busy by others, before and after"] = f"{busy}, {machine.busy_cores()}"
        print(f"\n== {name}\n{part.show()}", flush=True)
        report["parts"][name] = part.record()
    shutil.rmtree(work)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
