"""Encodes shards in worker processes. Never forks this one: a fork lacks the threads of torch and of the tokenizer, and keeps their locks held.

A server that has imported what a worker needs, and has done nothing else, is forked instead: a worker would import for seconds.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing import forkserver, get_context, parent_process
from pathlib import Path
from threading import Thread

from finetune.data.shards import Work, all_or_refusals, shard
from finetune.errors import FinetuneError


def encoded(directory: Path, ranges: Sequence[range], reopen: Callable[[], Work], most: int) -> list[Path]:
    """The shards of these rows in order, made by at most `most` processes; each opens the source for itself."""
    count = min(most, len(ranges))
    print(f"encoding {sum(map(len, ranges)):,} rows in {count} processes, once", file=sys.stderr, flush=True)
    context = get_context("forkserver")
    context.set_forkserver_preload([getattr(reopen, "func", reopen).__module__])
    with _stopped_server(), ProcessPoolExecutor(count, context, _start_worker, (reopen,)) as pool:
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


@contextmanager
def _stopped_server() -> Iterator[None]:
    """Ends the server afterwards: it would stay as long as this process, with the memory of all that it has imported."""
    try:
        yield
    finally:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # there is no public way


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
