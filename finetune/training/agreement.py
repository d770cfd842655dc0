"""What all ranks train, and the checkpoint that they go on from. Ranks that do not see the same are refused."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from finetune.errors import CheckpointError, RunError
from finetune.plan.facts import Facts
from finetune.store.checkpoints import assembled
from finetune.store.checkpoints.manifest import Checkpoint, read
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import Damage, Verify, verify
from finetune.store.run import holder
from finetune.store.run.directory import RunDirectory
from finetune.training import collectives
from finetune.training.device import device
from finetune.training.facts import sharing_of
from finetune.training.resume import Opened
from finetune.training.state import TrainState

WIDEST = ("fsdp", "hsdp", "ddp")
"""Strategies, by how many devices share the rows of a tensor."""


@contextmanager
def verified_together(path: Path, state: TrainState) -> Iterator[Verify]:
    """Gives rank 0 a `verify` in which all ranks share, where each reads rows of a checkpoint alone: every byte is read once by one of
    them. The others help in the exit, until rank 0 leaves. All ranks enter together."""
    accelerator = state.accelerator
    if accelerator.num_processes == 1 or not state.strategy.is_sharded:
        yield verify
        return
    _refuse_other_directories(path, _seen(path), "the run", accelerator)
    directory = RunDirectory(path).checkpoints
    if not accelerator.is_main_process:
        yield verify
        while name := collectives.text_of_rank_0(accelerator, ""):
            _verify_share(directory / name, accelerator)
        return

    def shared(checkpoint: Path) -> list[Damage]:
        collectives.text_of_rank_0(accelerator, checkpoint.name)
        return _verify_share(checkpoint, accelerator)

    try:
        yield shared
    finally:
        collectives.text_of_rank_0(accelerator, "")


def _verify_share(checkpoint: Path, accelerator: Accelerator) -> list[Damage]:
    """All damage that the ranks find together; each reads some of the files. Collective."""
    own: Sequence[str] = ()
    beside = collectives.of_rank_0(accelerator, device().processes)
    with suppress(CheckpointError):  # `verify` says it
        sizes = {name: record.bytes for name, record in read(checkpoint).manifest.files.items()}
        shares = assembled.shared_out(sizes, assembled.readers(accelerator.num_processes, beside))
        own = shares.get(accelerator.process_index, ())
    found = [asdict(damage) for damage in verify(checkpoint, only=own)]
    texts = collectives.texts_of_all(accelerator, json.dumps(found))
    damages = (Damage(**each) for text in texts for each in json.loads(text))
    # Names and sizes are looked at by all.
    return list(dict.fromkeys(damages))


def same_checkpoint(newest: Checkpoint | None, path: Path, state: TrainState) -> Checkpoint | None:
    """The checkpoint that rank 0 found, on every rank. Hosts that do not share the run directory, or read other bytes, are refused."""
    accelerator = state.accelerator
    if accelerator.num_processes == 1:
        return newest
    step = collectives.of_rank_0(accelerator, newest.step if newest else 0)
    mine, seen = newest, _seen(path)
    with suppress(CheckpointError):  # the ranks must not part here: the error comes below
        if step and not accelerator.is_main_process:
            mine = Store(path).find(step)
        # Where ranks read rows alone, they have verified it together.
        if mine and (mine is newest or state.strategy.is_sharded or not verify(mine.path)):
            seen ^= int((mine.manifest.digest or "").rpartition(":")[2][:15], 16)
    collectives.wait_for_everyone(accelerator)
    _refuse_other_directories(path, seen, f"the checkpoint of step {step}" if step else "the run", accelerator)
    return mine


def _seen(path: Path) -> int:
    """Only the directory that rank 0 holds has this number."""
    held = holder.read(RunDirectory(path).lease)
    return int(held.token[:15], 16) if held else 0


def _refuse_other_directories(path: Path, seen: int, what: str, accelerator: Accelerator) -> None:
    digests = accelerator.gather(torch.tensor([seen], device=accelerator.device)).tolist()
    if len(set(digests)) > 1:
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        raise RunError(
            f"ranks {others} do not see {what} as rank 0 does",
            where=str(path),
            hint="give all hosts one run directory on a shared disk",
        )


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
