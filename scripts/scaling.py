"""What checkpoints cost at sizes that we cannot run: sizes and times of saves, resumes and mirrors, and the share of time that is training.

    python scripts/scaling.py [--hours 720] [--seeds 20]

Sizes follow from shapes and from the format; tests compare them with real files. Times divide sizes by the rates below, which you
can set. The share of time is simulated: hosts fail at random, and a training goes on from its last commit.
"""

import argparse
import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from finetune.store.checkpoints.tensor_files import FILE_BYTES

MANIFEST_BYTES, FILE_RECORD_BYTES, TENSOR_BYTES = 2_200, 165, 153
"""Of a manifest: for itself and its small files, for each more file of tensors, and for each tensor that it names."""
STEP_BYTES, ROW_BYTES, MODULE_BYTES = 300, 20, 8
"""Of a step's line in the journal; of each row and each group of modules beside it."""
MASTER, MOMENTS = 4, 8
"""Bytes of a trained weight: fp32, and both moments of AdamW."""
GPU_HOURS_A_FAILURE = 50_678
"""419 unexpected interruptions in 54 days of 16,384 H100 (Llama 3, arXiv 2407.21783, section 3.3.4)."""


@dataclass(frozen=True)
class Model:
    name: str
    parameters: float
    tensors: int
    layers: int
    largest: float
    """Numbers of its largest tensor, which stays in one file."""


MODELS = (
    Model("8B", 8.03e9, 291, 32, 5.25e8),  # Llama 3.1
    Model("70B", 70.6e9, 723, 80, 1.05e9),
    Model("400B MoE", 401e9, 626, 48, 1.07e10),  # Llama 4 Maverick's size, with fused experts
)
GPUS = (8, 64, 256, 1024)


@dataclass(frozen=True)
class Rates:
    """Bytes a second, and of the last three seconds."""

    shared_disk: float = 2e9
    """Of the disk that all hosts share, for one host; they add up to `most`."""
    most: float = 100e9
    read_back: float = 2e9
    """Of one host that reads files of a checkpoint and hashes them, on the disk that all share."""
    copy: float = 20e9
    """From a GPU to its host's memory."""
    bucket: float = 1e9
    """Of the host of rank 0 to a mirror."""
    start: float = 60
    """Seconds until all ranks run again, without what they read."""
    replace: float = 300
    """Seconds until a failed host is replaced."""
    interval: float = 900
    """Seconds between saves (`checkpoint.every: 15 minutes`)."""


@dataclass(frozen=True)
class Cost:
    """Of one training of all weights on some GPUs. Bytes and seconds."""

    checkpoint: float
    rank: float
    """The rows of one rank, which its host copies and writes."""
    copied: float
    written: float
    read_back: float
    """All ranks read whole files: at the end of a save, and before a resume."""
    resumed: float
    mirrored: float
    manifest: float
    journal: float
    """Of 10,000 steps with 1,024 rows each, with the columns beside it."""

    @property
    def saved(self) -> float:
        """From the end of a step to its commit. Training goes on meanwhile."""
        return self.copied + self.written + self.read_back


def cost(model: Model, gpus: int, rates: Rates) -> Cost:
    size = model.parameters * (MASTER + MOMENTS)
    hosts = max(1, gpus // 8)
    disk, back = min(hosts * rates.shared_disk, rates.most), read_back_seconds(size, model, hosts, rates)
    return Cost(
        checkpoint=size,
        rank=size / gpus,
        copied=size / gpus / rates.copy,
        written=size / disk,
        read_back=back,
        # Verified by all together, and then each rank reads its rows.
        resumed=rates.start + back + size / disk,
        mirrored=size / rates.bucket,
        manifest=manifest_bytes(model.tensors, is_full=True, files=math.ceil(size / FILE_BYTES)),
        journal=10_000 * step_bytes(1_024, model.layers + 2),
    )


def read_back_seconds(size: float, model: Model, hosts: int, rates: Rates) -> float:
    """Of the host that has most to read. No more than all together may read, and a tensor is one rank's to read."""
    files = math.ceil(size / FILE_BYTES)
    of_a_host = min(size, math.ceil(files / hosts) * FILE_BYTES)
    largest = model.largest * MASTER
    return max(of_a_host / rates.read_back, largest / rates.read_back, size / rates.most)


def manifest_bytes(trained_tensors: int, is_full: bool, files: int = 2) -> int:
    """`is_full`: with two moments for each tensor. `files`: of tensors."""
    more = FILE_RECORD_BYTES * max(0, files - 2)
    return MANIFEST_BYTES + more + TENSOR_BYTES * trained_tensors * (3 if is_full else 1)


def step_bytes(rows: int, modules: int) -> int:
    return STEP_BYTES + ROW_BYTES * rows + MODULE_BYTES * modules


def share_of_time(gpus: int, of: Cost, rates: Rates, hours: float, seed: int) -> float:
    """Seconds of training that were kept, of all `hours`.

    A failure loses what was trained since the step of the last commit, and a save that it meets. The next save begins when the
    interval is over and the one before has committed.
    """
    chance, end = random.Random(seed), hours * 3600
    now = kept = 0.0
    while now < end:
        failure = now + chance.expovariate(gpus / GPU_HOURS_A_FAILURE / 3600)
        until = min(failure, end)
        begin = kept_until = now + of.resumed
        save = begin + rates.interval
        while save + of.saved <= until:
            kept_until = save
            save += max(rates.interval, of.saved)
        is_last = failure >= end
        kept += max(0.0, (end if is_last else kept_until) - begin)
        now = failure + rates.replace
    return kept / end


def rows(hours: float, seeds: int, rates: Rates) -> Iterator[list[str]]:
    for model in MODELS:
        for gpus in GPUS:
            of = cost(model, gpus, rates)
            if of.rank > 64e9:  # with gradients and activations more than a device of 80 GB
                yield [model.name, str(gpus), "does not fit", *[""] * 9]
                continue
            shares = [share_of_time(gpus, of, rates, hours, seed) for seed in range(seeds)]
            yield [
                model.name,
                f"{gpus:,}",
                size_of(of.checkpoint),
                size_of(of.rank),
                f"{of.copied:.1f} s",
                time_of(of.written),
                time_of(of.read_back),
                time_of(of.resumed),
                time_of(of.mirrored),
                size_of(of.manifest),
                size_of(of.journal),
                f"{statistics.mean(shares):.1%}",
            ]


def size_of(size: float) -> str:
    for unit, bytes_of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= bytes_of:
            return f"{size / bytes_of:.3g} {unit}"
    return f"{size:.0f} B"


def time_of(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


HEADER = "model | GPUs | checkpoint | of a rank | copy | write | read back | resume | to a mirror | manifest | journal | trains"


def table(hours: float = 720, seeds: int = 20, rates: Rates = Rates()) -> list[str]:
    """Lines of Markdown."""
    lines = [f"| {HEADER} |", "|" + "---|" * (HEADER.count("|") + 1)]
    return lines + [f"| {' | '.join(row)} |" for row in rows(hours, seeds, rates)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, default=720, help="of a training")
    parser.add_argument("--seeds", type=int, default=20, help="simulations of each row")
    for name, default in vars(Rates()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default)
    options = parser.parse_args()
    chosen = Rates(**{name: getattr(options, name) for name in vars(Rates())})
    print("\n".join(table(options.hours, options.seeds, chosen)))
