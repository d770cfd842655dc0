"""What all ranks train, and the checkpoint that they go on from. Ranks that do not see the same are refused."""

import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from finetune.errors import CheckpointError, RunError
from finetune.plan.facts import Facts
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.store.run import holder
from finetune.store.run.directory import RunDirectory
from finetune.training import collectives
from finetune.training.facts import sharing_of
from finetune.training.resume import Opened

WIDEST = ("fsdp", "hsdp", "ddp")
"""Strategies, by how many devices share the rows of a tensor."""


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


def with_what_fits_all(opened: Opened, accelerator: Accelerator) -> Opened:
    """With the micro-batches and the strategy that fit the smallest device: all ranks must train alike. RunError where one of them would
    train on other bytes: each reads its own rows of the base."""
    if accelerator.num_processes == 1:
        return opened
    resolved = opened.resolved
    # Ranks that round otherwise would still train one model, whose bits no other machine could give again.
    kernels = int(hashlib.sha256(resolved.kernels.name.encode()).hexdigest()[:15], 16)
    own = resolved.micro_batch_tokens, WIDEST.index(resolved.strategy), int(resolved.plan.plan_id[-15:], 16), kernels
    found = accelerator.gather(torch.tensor([own], device=accelerator.device))
    if others := [rank for rank, plan in enumerate(found[:, 2].tolist()) if plan != found[0, 2]]:
        hint = "give all hosts the same base and data; a copy may be damaged"
        raise RunError(f"ranks {others} have another base, or other data, than rank 0", hint=hint)
    if others := [rank for rank, name in enumerate(found[:, 3].tolist()) if name != found[0, 3]]:
        hint = "install the same packages on all hosts, or set train.kernels: plain"
        mine = resolved.kernels.name
        raise RunError(f"ranks {others} have other kernels than rank 0; this one has {mine}", hint=hint)
    tokens, widest, *_ = found.amin(0).tolist()
    resolved = replace(resolved, micro_batch_tokens=tokens, strategy=WIDEST[widest])
    facts: Facts = {**opened.facts, "micro_batch_tokens": tokens, **sharing_of(resolved.strategy)}
    return Opened(resolved, facts, opened.changes)
