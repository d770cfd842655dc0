"""`finetune` in a process of its own that writes down what it held at its peak: `measured.py ANSWER COMMAND...`."""

import atexit
import json
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
    answer = Path(sys.argv.pop(1))
    from finetune.cli import main as finetune

    atexit.register(lambda: answer.write_text(json.dumps(peak())))
    finetune()


if __name__ == "__main__":
    main()
