"""Encodes generated rows in a process of its own, as `python encoding_process.py JSON`; tests kill it, count its calls and measure it.

Row n becomes `n % 7 + 2` tokens of value n. Prints one JSON line: shape and digest of the result, the most anonymous memory in use.
"""

import functools
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

from finetune.data import encode as encoding
from finetune.data.encode import encode
from finetune.data.example import Example
from finetune.data.shards import Work
from finetune.errors import DataError


class Rows:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        return {"row": row}


class Encoder:
    def __init__(self, options):
        self.options = options
        self.most_bytes = 0

    def __call__(self, rows, places):
        numbers = [row["row"] for row in rows]
        with open(self.options["log"], "a") as log:
            log.write(f"{os.getpid()} {numbers[0]} {len(rows)}\n")
        for number in reversed(numbers):  # an encoder may find the last one first
            if number in self.options.get("bad", ()):
                raise DataError("is bad", where=place(number), hint="correct it")
            if number == self.options.get("hangs_at"):
                time.sleep(600)
        self.most_bytes = max(self.most_bytes, anonymous_bytes())
        return [[Example(np.full(number % 7 + 2, number), np.ones(number % 7 + 2, dtype=bool))] for number in numbers]


def place(row):
    return f"rows:{row}"


def work(options):
    return Work(Rows(options["rows"]), place, Encoder(options), skips_bad=options.get("skips_bad", False))


def anonymous_bytes():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


def main():
    options = json.loads(sys.argv[1])
    encoding.SHARD_ROWS = options["shard"]
    encoding.PARALLEL_ROWS = 0 if options.get("workers") else 10**9
    encoding.workers = lambda: options["workers"]
    here = work(options)
    try:
        key, again = ("rows", str(options["rows"])), functools.partial(work, options)
        encoded = encode(here.rows, here.where, here.encoder, *key, reopen=again, skips_bad=here.skips_bad)
    except DataError as error:
        print(json.dumps({"error": str(error)}))
        return
    digest = hashlib.sha256()
    for name in ("tokens", "supervised", "offsets", "rows", "targets", "cut_tokens", "left_out_rows"):
        digest.update(f"{name} {getattr(encoded, name).dtype}".encode() + getattr(encoded, name).tobytes())
    bad = [row["where"] for row in encoded.first_bad_rows]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    servers = sum(b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)
    facts = {"examples": len(encoded), "digest": digest.hexdigest(), "servers": servers}
    facts["most_bytes"] = here.encoder.most_bytes
    print(json.dumps(facts | ({"bad": bad} if bad else {})))


if __name__ == "__main__":
    main()
