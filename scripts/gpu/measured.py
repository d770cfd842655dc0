"""`finetune plan` and `finetune train` in one process, which writes down what it held at its peak: `measured.py RECIPE RUN ANSWER`."""

import atexit
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path


def peak() -> dict:
    import torch

    status = Path("/proc/self/status").read_text()
    found = {"host_peak_bytes": 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])}
    if torch.cuda.is_available():
        found |= {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
        }
    return found


def main() -> None:
    recipe, run, answer = sys.argv[1:]
    from finetune.cli import cli
    from finetune.cli import main as finetune
    from finetune.hosts.world import prepare_allocator

    prepare_allocator(os.environ)  # before torch is imported, as `finetune` itself does
    with contextlib.redirect_stdout(io.StringIO()) as said:
        cli.main(["plan", recipe, "--json"], standalone_mode=False)
    plan = json.loads(said.getvalue())
    atexit.register(lambda: Path(answer).write_text(json.dumps({"plan": plan, **peak()})))
    sys.argv[1:] = ["train", recipe, "--run", run, "--quiet"]
    finetune()


if __name__ == "__main__":
    main()
