"""A process without torch that writes checkpoint files when it is told to: the floor of what a save costs beside a training.

    python scripts/bench/writer_process.py DIRECTORY BYTES

For each line on stdin it does what the writer of `finetune` does with a buffer of its own (hash each tensor and the file while
writing, sync, read back and compare, remove the file before), and answers with a JSON line of its seconds.
"""

import json
import sys
import time
from pathlib import Path

import blake3
import numpy as np
import xxhash

from finetune.store import tensors
from finetune.store.checkpoints.manifest import FileRecord
from finetune.store.checkpoints.verify import is_as_recorded
from finetune.store.durable import durable
from finetune.store.tensors import Tensor


def main() -> None:
    directory, size = Path(sys.argv[1]), int(sys.argv[2])
    buffer = memoryview(np.full(size, 7, dtype=np.uint8))
    print(json.dumps({"hash_cpu_seconds": hash_seconds(buffer)}), flush=True)
    earlier = None
    for number, _ in enumerate(sys.stdin):
        started, cpu = time.perf_counter(), time.process_time()
        path = directory / f"{number}.safetensors"
        with durable(path) as file:
            file.tensors = tuple(tensors.write(file, [Tensor("state", "U8", (size,), buffer)], {}))
        written = time.perf_counter() - started
        if not is_as_recorded(path, FileRecord(file.bytes, file.digest(), file.tensors)):
            raise OSError(f"{path} does not read back as it was written")
        if earlier:
            earlier.unlink()
        earlier = path
        print(json.dumps({"seconds": written, "cpu_seconds": time.process_time() - cpu}), flush=True)


def hash_seconds(buffer: memoryview) -> float:
    """CPU seconds of both digests over the buffer, nothing written."""
    started = time.process_time()
    whole, each = blake3.blake3(), xxhash.xxh3_128()
    for piece in tensors.pieces(buffer):
        whole.update(piece)
        each.update(piece)
    return time.process_time() - started


if __name__ == "__main__":
    main()
