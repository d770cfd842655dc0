"""Encodes shards in worker processes. Spawns, never forks: a fork lacks the threads of torch and of the tokenizer, and keeps their locks held."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

from finetune.data.shards import Work, all_or_refusals, shard
from finetune.errors import FinetuneError


def encoded(directory: Path, ranges: Sequence[range], reopen: Callable[[], Work], most: int) -> list[Path]:
    """The shards of these rows in order, made by at most `most` processes; each opens the source for itself."""
    count = min(most, len(ranges))
    print(f"encoding {sum(map(len, ranges)):,} rows in {count} processes, once", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(count, get_context("spawn"), _start_worker, (reopen,)) as pool:
        shards = [pool.submit(_shard_in_worker, directory, ids) for ids in ranges]
        try:
            return all_or_refusals((each.result for each in shards), ranges)
        except BrokenProcessPool as error:
            message, hint = (
                "a process that encoded rows was killed",
                "free some memory and run again: it goes on from there",
            )
            raise FinetuneError(message, hint=hint) from error
        finally:
            pool.shutdown(cancel_futures=True)


_reopen: list[Callable[[], Work]] = []  # in a worker process: the one from the parent


def _start_worker(reopen: Callable[[], Work]) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core already has a process
    _reopen.append(reopen)


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
    os._exit(1)  # the parent was killed, and the executor would wait forever


def _shard_in_worker(directory: Path, ids: range) -> Path:
    return shard(directory, _own_work(), ids)


@lru_cache(maxsize=1)
def _own_work() -> Work:
    """Opened by the first shard, not at the start: there the executor takes any error for a kill."""
    return _reopen[0]()
