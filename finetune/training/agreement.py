"""The checkpoint that all ranks go on from. Ranks that do not see the same run directory are refused."""

from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator

from finetune.errors import CheckpointError, RunError
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.store.run import holder
from finetune.store.run.directory import RunDirectory
from finetune.training import collectives


def same_checkpoint(newest: Checkpoint | None, path: Path, accelerator: Accelerator) -> Checkpoint | None:
    """The checkpoint that rank 0 found, on every rank. Hosts that do not share the run directory, or read other bytes, are refused."""
    if accelerator.num_processes == 1:
        return newest
    step = collectives.of_rank_0(accelerator, newest.step if newest else 0)
    mine, held = newest, holder.read(RunDirectory(path).lease)
    seen = int(held.token[:15], 16) if held else 0  # only the directory that rank 0 holds has this one
    with suppress(CheckpointError):  # the ranks must not part here: the error comes below
        if step and not accelerator.is_main_process:
            mine = Store(path).find(step)
        if mine and (mine is newest or not verify(mine.path)):
            seen ^= int((mine.manifest.digest or "").rpartition(":")[2][:15], 16)
    collectives.wait_for_everyone(accelerator)
    digests = accelerator.gather(torch.tensor([seen], device=accelerator.device)).tolist()
    if len(set(digests)) > 1:
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        raise RunError(
            f"ranks {others} do not see {f'the checkpoint of step {step}' if step else 'the run'} as rank 0 does",
            where=str(path),
            hint="give all hosts one run directory on a shared disk",
        )
    return mine
