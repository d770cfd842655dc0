"""What the ranks of a training do beside its steps: they wait for the one that works, and tell a rank that is lost from a bug.

`run` and the debugging tools wait here, `state` asks how many were declared, `cli` says what is lost.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator

from finetune.errors import FinetuneError, LostRankError
from finetune.hosts.launch import PASSING
from finetune.model.base import files
from finetune.store import cache
from finetune.store.boot import boot_id

FoundT = TypeVar("FoundT")

LONGEST_WORK = timedelta(days=7)
OF_LOST_PEERS = ("gloo/transport", "ncclRemoteError")  # neither has its own class


def lost_rank(error: RuntimeError) -> LostRankError | None:
    """What an error of a collective says of another rank; None for any other error."""
    is_of_store = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
    if not is_of_store and not any(part in str(error) for part in OF_LOST_PEERS):
        return None
    # torch writes `[file.cc:line] reason. …` and then a stack; you need the reason.
    where, reason = f"rank {os.environ['RANK']}", str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
    # Before the group exists no rank was ever reached, so the address is the likely cause.
    if dist.is_initialized():
        return LostRankError(f"lost another rank: {reason}", where=where)
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    hint = "check that --master-addr reaches host 0, that its port is free, and that every host was started"
    return LostRankError(f"cannot meet the others at {place}: {reason}", where=where, hint=hint)


@lru_cache(maxsize=1)
def _patient() -> dist.ProcessGroup:
    """The connections of `wait_for_everyone`, for the life of the process. Collectives of the training give up after minutes, NCCL's after
    ten; a download, an encoding or a slow disk may take hours."""
    return dist.new_group(backend="gloo", timeout=LONGEST_WORK)


def connect(accelerator: Accelerator) -> None:
    """By all ranks, before they wait for each other."""
    if accelerator.num_processes > 1:
        # Making it is a collective with the usual timeout. At first use, the others would wait for rank 0's long work.
        _patient()


def wait_for_everyone(accelerator: Accelerator) -> None:
    """Returns when all ranks are here, however long one of them works."""
    if accelerator.num_processes > 1:
        dist.barrier(_patient())


def of_rank_0(accelerator: Accelerator, number: int) -> int:
    """Rank 0's number on every rank, however long it worked for it."""
    if accelerator.num_processes == 1:
        return number
    told = torch.tensor([number])
    dist.broadcast(told, 0, group=_patient())
    return int(told)


def text_of_rank_0(accelerator: Accelerator, text: str) -> str:
    """Rank 0's text on every rank. Ranks exchange texts, never pickles."""
    if accelerator.num_processes == 1:
        return text
    size = of_rank_0(accelerator, len(data := text.encode()))
    told = _bytes(data, size)
    dist.broadcast(told, 0, group=_patient())
    return told.numpy().tobytes()[:size].decode()


def found_by_all(accelerator: Accelerator, kind: str, facts: object, find: Callable[[], FoundT]) -> FoundT:
    """As `cache.found`, for what all ranks find together: rank 0 says whether it is in the cache."""
    is_first = accelerator.is_main_process
    known: list[FoundT] = json.loads(text_of_rank_0(accelerator, json.dumps(_kept(kind, facts) if is_first else [])))
    if known:
        return known[0]
    found = find()
    return cache.found(kind, facts, lambda: found) if is_first else found


class _UnknownError(Exception):
    """Nothing is in the cache."""


def _kept(kind: str, facts: object) -> list[object]:
    """What `cache.found` has for these facts, in a list; none where it has nothing."""

    def fail() -> object:
        raise _UnknownError

    with suppress(_UnknownError):
        return [cache.found(kind, facts, fail)]
    return []


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """All ranks get through the body, or none does: the others raise LostRankError with the message of one that failed."""
    if accelerator.num_processes == 1:
        yield
        return
    error = None
    try:
        yield
    except FinetuneError as failed:
        error = failed
    own = [error.message, error.where, error.hint, error.code] if error else []
    texts = texts_of_all(accelerator, json.dumps(own))
    if error:
        raise error
    for rank, text in enumerate(texts):
        if said := json.loads(text):
            lost = LostRankError(f"rank {rank}: {said[0]}", where=said[1], hint=said[2])
            lost.code = lost.code if said[3] in PASSING else said[3]  # no launcher tries again what you have to fix
            raise lost


def texts_of_all(accelerator: Accelerator, text: str) -> list[str]:
    """Each rank's text, in the order of ranks, however long one of them works for it."""
    own = text.encode()
    sizes = _gathered(accelerator, torch.tensor([len(own)]))
    texts = _gathered(accelerator, _bytes(own, max(int(size) for size in sizes)))
    return [each[: int(size)].numpy().tobytes().decode() for each, size in zip(texts, sizes, strict=True)]


def _gathered(accelerator: Accelerator, own: torch.Tensor) -> list[torch.Tensor]:
    """What each rank has, in the order of ranks, however long one of them works for it."""
    found = [torch.empty_like(own) for _ in range(accelerator.num_processes)]
    dist.all_gather(found, own, group=_patient())
    return found


def _bytes(data: bytes, size: int) -> torch.Tensor:
    """These bytes as a tensor, padded to `size`."""
    return torch.frombuffer(bytearray(data[:size].ljust(max(1, size), b"\0")), dtype=torch.uint8)


@contextmanager
def rank_0_first(accelerator: Accelerator) -> Iterator[None]:
    """Rank 0 runs the body, then one rank of each other host, then the others, and all go on together. Files that a rank has digested
    are not read again by those of its host."""
    if accelerator.num_processes == 1:
        yield
        return
    own_turn = 0 if accelerator.is_main_process else 1 if accelerator.is_local_main_process else 2
    for turn in range(3):
        if turn == own_turn:
            yield
        _hand_digests_on(accelerator)


def _hand_digests_on(accelerator: Accelerator) -> None:
    host = boot_id()
    for text in texts_of_all(accelerator, json.dumps([host, list(files.digests.items())])):
        of_host, found = json.loads(text)
        if host and of_host == host:
            files.digests.update((tuple(as_it_is), digest) for as_it_is, digest in found)


def declared() -> int:
    """The number of processes a launcher says it started. `accelerate launch` sets no variable if it starts only one: on CPUs it does
    that whatever you ask for."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    parents = []
    with suppress(psutil.Error):  # one of them has ended meanwhile
        parents = psutil.Process().parents()
    for parent in parents:
        with suppress(psutil.Error):  # or is somebody else's
            if (asked := _after_accelerate(parent.cmdline())) is not None:
                return _asked_of_accelerate(asked)
    return 1


def _after_accelerate(words: list[str]) -> list[str] | None:
    """The arguments of a command that is `accelerate launch`, in one of its ways, perhaps by a Python; None for any other."""
    names = [Path(word).name for word in words]
    for way in (["accelerate", "launch"], ["accelerate-launch"], ["accelerate.commands.launch"]):
        # A Python and `-m` may come first.
        for place in range(3):
            if names[place : place + len(way)] == way:
                return words[place + len(way) :]
    return None


def _asked_of_accelerate(words: list[str]) -> int:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    asked = launch_command_parser().parse_args(words)
    number = asked.num_processes
    # As `accelerate launch` decides itself: with --cpu it does not read the default file.
    if number is None and (asked.config_file or (not asked.cpu and Path(default_config_file).is_file())):
        number = load_config_from_file(asked.config_file).num_processes
    return number or 1
