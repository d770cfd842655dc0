"""The disk that averages of a run's checkpoints take at most, by the files of one of them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from finetune.compare import average_lora
from finetune.compare.average_usual import Usual
from finetune.errors import FinetuneError, counted
from finetune.plan import disk, memory
from finetune.plan.plan import Plan
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.tensor_files import ADAPTER, FROZEN, of_kind
from finetune.store.tensors import read_header


def announced(averages: Path, found: Sequence[Usual], needed: int) -> str:
    """The line that says what is needed. FinetuneError where the disk has less left."""
    free = disk.free_bytes(averages)
    line = f"{counted(len(found), 'average')} to try: at most {disk.readable(needed)} of disk"
    if needed > free:
        hint = "free some space on this disk"
        raise FinetuneError(f"{line}, and {disk.readable(free)} is free", where=str(averages), hint=hint)
    return f"{line}, {disk.readable(free)} free"


def needed_bytes(found: Sequence[Usual], checkpoint: Checkpoint, plan: Plan, is_all_kept: bool) -> int:
    """Of all together if they are kept; else of the two largest: the best so far, and the one that is being made."""
    each = sorted(_bytes(len(usual.named), checkpoint, plan) for usual in found)
    return sum(each if is_all_kept else each[-2:])


def _bytes(members: int, checkpoint: Checkpoint, plan: Plan) -> int:
    files = checkpoint.manifest.files
    small = sum(record.bytes for name, record in files.items() if not name.endswith(".safetensors"))
    if _is_adapter(members, checkpoint):
        return small + members * memory.FLOAT * plan.trainable_parameters
    changing = plan.trainable_parameters if of_kind(files, FROZEN) else plan.total_parameters
    return small + memory.FLOAT * changing


def _is_adapter(members: int, checkpoint: Checkpoint) -> bool:
    """Whether so many of these adapters are one adapter; not where that depends on more than its shapes."""
    config = checkpoint.path / average_lora.CONFIG
    if not config.is_file():
        return False
    facts = json.loads(config.read_bytes())
    if facts["peft_type"] != "LORA" or average_lora.beside_factors(facts):
        return False
    shapes = {name: place.shape for name, place in read_header(checkpoint.path / ADAPTER).items()}
    factors = members * sum(map(math.prod, shapes.values()))
    pairs = ((name, name.replace(a, b)) for name in shapes for a, b in average_lora.NAMES if a in name)
    return factors < sum(shapes[a][-1] * shapes[b][0] for a, b in pairs if b in shapes)
