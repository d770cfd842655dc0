"""What it costs to encode a corpus of plain text: memory and speed beside `datasets.map`, and what a kill costs.

    python scripts/bench/corpora.py --work DIRECTORY [--megabytes 1000] [--rounds 3] [--processes 2] [--tiny] [--json FILE]

Each turn is a process with an empty cache, which opens the file, tokenizes it and writes the tokens. It tells the seconds from its
first look at the file to the last byte, after its imports; those of its worker processes count. Memory is the sum over all its
processes, by Linux's proportional set size, five times a second. A killed turn is stopped by SIGKILL half way and started again.
The text is the standard library and Debian's documentation, in pieces, shuffled, with other numbers in each; the tokenizer is that
of recipes/smollm2-135m.
"""

import argparse
import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import machine
import psutil
from figures import OURS, Goal, Part, Quantity, rotated
from training import SMOLLM2, TINY, _random_base

MAP, MAP_ALONE = "datasets: load and map", "datasets: of these, map alone"
MOST_BYTES = 2 << 30
MAX_LENGTH = 1024


def ours(data: Path, base: str, processes: int) -> dict[str, float]:
    import yaml

    from finetune.data import encode as encoding
    from finetune.recipe.load import loads
    from finetune.training import ahead

    encoding.workers = lambda: processes
    encoding.PARALLEL_ROWS = 0
    recipe = {
        "base": {"checkpoint": base},
        "task": {"name": "text", "max_length": MAX_LENGTH},
        "data": {"train": [{"path": str(data)}]},
        "optimizer": {"learning_rate": 1e-5},
        "train": {"steps": 1},
    }
    loaded = loads(yaml.safe_dump(recipe), "recipe.yaml")
    started = time.perf_counter()
    ahead.encode_ahead(loaded, encoding.Part(1, 1))
    return {OURS: time.perf_counter() - started}


def mapped(data: Path, base: str, processes: int) -> dict[str, float]:
    """`map` with the tokenizer, in batches, and the lengths cut as ours are: the way of TRL's and axolotl's preparation."""
    from datasets import load_dataset

    from finetune.model import base as bases
    from finetune.recipe.schema import Base

    named = Base(checkpoint=base)
    tokenizer = bases.load_tokenizer(bases.directory(named, bases.pin(named), with_weights=False))
    end = tokenizer.eos_token_id

    def encode(batch: dict) -> dict:
        ids = [[*each, end] for each in tokenizer(batch["text"])["input_ids"]]
        pieces = [each[start : start + MAX_LENGTH] for each in ids for start in range(0, len(each), MAX_LENGTH - 1)]
        return {"input_ids": pieces}

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = time.perf_counter()
    rows = load_dataset("json", data_files=str(data), split="train", cache_dir=os.environ["FINETUNE_CACHE"])
    loaded = time.perf_counter()
    rows.map(encode, batched=True, num_proc=processes, remove_columns=rows.column_names)
    ended = time.perf_counter()
    return {MAP: ended - started, MAP_ALONE: ended - loaded}


CONTESTANTS = {OURS: ours, MAP: mapped}


def corpus(path: Path, size: int) -> None:
    """Documents of 200 to 30,000 characters from pieces of what lies on this machine; no two are the same."""
    files = [*Path(sysconfig.get_path("stdlib")).glob("*.py"), *Path("/usr/share/doc").glob("*/*")]
    pieces = []
    for file in sorted(files)[:3000]:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            pieces += [each for each in content.decode().split("\n\n") if 40 < len(each) < 4000]
    draw, written = random.Random(0), 0
    with path.open("w") as out:
        while written < size:
            text = "\n\n".join(draw.choices(pieces, k=max(1, int(draw.lognormvariate(1.5, 1)))))[:30_000]
            text = re.sub(r"\d", lambda found: str(draw.randrange(10)), text)
            written += out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


class Turn:
    """One contestant in a process with its own cache."""

    def __init__(self, name: str, data: Path, base: str, processes: int, cache: Path):
        environment = os.environ | {
            "FINETUNE_CACHE": str(cache),
            "HF_DATASETS_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            # of a long turn they fill the pipe, which nobody reads before its end, and the turn waits
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        environment["PYTHONPATH"] = f"{Path(__file__).parents[2]}:{environment.get('PYTHONPATH', '')}"
        command = [sys.executable, __file__, "--work", ".", "--child", json.dumps([name, str(data), base, processes])]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.most_bytes, self.cpu_seconds, self._cpu = 0, 0.0, {}

    def watch(self, until: float = float("inf")) -> None:
        """Until its end, or as many seconds after its start."""
        started, root = time.monotonic(), psutil.Process(self.process.pid)
        while self.process.poll() is None and time.monotonic() - started < until:
            total = 0
            with contextlib.suppress(psutil.Error):
                for each in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        total += each.memory_full_info().pss
                        self._cpu[each.pid] = sum(each.cpu_times()[:2])
            self.most_bytes = max(self.most_bytes, total)
            time.sleep(0.2)
        self.cpu_seconds = sum(self._cpu.values())

    def seconds(self) -> dict[str, float]:
        out, error = self.process.communicate()
        if self.process.returncode:
            raise SystemExit(error)
        return json.loads(out.splitlines()[-1])


def compared(work: Path, options: argparse.Namespace) -> Part:
    base = _random_base(work, TINY) if options.tiny else SMOLLM2
    data = options.text or work / "corpus.jsonl"
    if not data.exists():
        corpus(data, options.megabytes * 10**6)
    seconds, memory = Quantity("opened, tokenized and written", "s"), Quantity("most memory of all processes", "MB")
    work_done = Quantity("CPU seconds, imports included", "s")
    own_cache(work / "warm")  # the converted base, once for all
    for turn in range(options.rounds):
        for name in rotated(tuple(CONTESTANTS), turn):
            made = Turn(name, data, base, options.processes, own_cache(work / "cache"))
            made.watch()
            for kind, taken in made.seconds().items():
                seconds.add(kind, taken)
                print(f"turn {turn + 1}: {kind}: {taken:.1f} s", file=sys.stderr, flush=True)
            memory.add(name, float(made.most_bytes))
            work_done.add(name, made.cpu_seconds)
            shutil.rmtree(work / "cache")
    facts = {"bytes of text": data.stat().st_size, "processes": options.processes} | killed(
        work, options, data, base, seconds.median()
    )
    goals = [
        Goal("most memory of all our processes", memory.median(), MOST_BYTES, "MB"),
        Goal("ours / datasets: load and map, seconds", seconds.median() / seconds.median(MAP), 1.0, "x"),
        Goal("ours / datasets: map alone, seconds", seconds.median() / seconds.median(MAP_ALONE), 1.0, "x"),
    ]
    return Part([seconds, work_done, memory], goals, facts)


def killed(work: Path, options: argparse.Namespace, data: Path, base: str, usual: float) -> dict[str, object]:
    """Killed half way, as a preemption does, and continued."""
    cache = own_cache(work / "cache")
    first = Turn(OURS, data, base, options.processes, cache)
    while (
        first.process.poll() is None
        and not len([*cache.glob("encoded/*.building/rows-*[0-9]")]) >= options.shards_before_kill
    ):
        time.sleep(0.02)
    first.process.send_signal(signal.SIGKILL)
    first.process.communicate()
    kept = len([*cache.glob("encoded/*.building/rows-*[0-9]")])
    second = Turn(OURS, data, base, options.processes, cache)
    second.watch()
    taken = second.seconds()[OURS]
    shutil.rmtree(cache)
    return {
        "shards kept by a kill": kept,
        "seconds to continue, and those of a whole turn": f"{taken:.1f}, {usual:.1f}",
        "most memory of the continued turn, MB": round(second.most_bytes / 1e6),
    }


def own_cache(directory: Path) -> Path:
    """An empty cache, but for converted bases."""
    usual = Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".cache/finetune")
    directory.mkdir(exist_ok=True)
    if (usual / "converted").exists() and not (directory / "converted").exists():
        (directory / "converted").symlink_to((usual / "converted").absolute())
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, required=True, help="where text and caches are written, five times the text"
    )
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--text", type=Path, help="JSON Lines with `text`; made, and kept there, if there is none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="of each contestant")
    parser.add_argument("--shards-before-kill", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write every sample here")
    parser.add_argument("--tiny", action="store_true", help="a random base and few rows: whether it runs, not how fast")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, data, base, processes = json.loads(options.child)
        print(json.dumps(CONTESTANTS[name](Path(data), base, processes)))
        return
    if options.tiny:
        options.megabytes, options.rounds = 1, 1
    options.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="bench-corpora-", dir=options.work))
    report = {"machine": machine.facts(options.work), "parts": {}}
    busy = machine.busy_cores()
    part = compared(work, options)
    part.facts["cores kept busy by others, before and after"] = f"{busy}, {machine.busy_cores()}"
    print(f"{json.dumps(report['machine'], indent=1)}\n\n== corpora\n{part.show()}", flush=True)
    report["parts"]["corpora"] = part.record()
    shutil.rmtree(work)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
