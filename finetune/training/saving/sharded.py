"""A save of which every rank writes its rows: what rank 0 asks of the others, and what they do.

They exchange texts over the group of `rank_reports`, in the threads of their writers. A rank that fails or is gone costs the save, and
rank 0 says with which message; training goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypedDict

from finetune.errors import FinetuneError
from finetune.model import shards
from finetune.plan.memory import staging_sets
from finetune.plan.plan import Plan
from finetune.store.checkpoints import assembled
from finetune.store.checkpoints.assembled import Digests, Part, Written
from finetune.store.durable import SLOWEST_DISK, STALL_SECONDS, failures
from finetune.store.run.directory import RunDirectory
from finetune.store.tensors import Tensor
from finetune.training.device import device
from finetune.training.saving import snapshot as snapshots
from finetune.training.saving.buffers import Staging
from finetune.training.saving.rank_reports import MissingReport, Report, await_own
from finetune.training.saving.snapshot import Snapshot
from finetune.training.state import TrainState

TURNS = 4  # between two texts, rank 0 may move the bytes of a save this many times: it writes, reads back and syncs


class Order(TypedDict, total=False):
    """What rank 0 asks about files of an attempt. An empty one ends the save."""

    attempt: str
    write: list[str]
    """Files, of which the rank writes its rows."""
    read: Mapping[str, Written]
    """Files, which it reads back."""


class Answer(TypedDict, total=False):
    parts: dict[str, list[Part]]
    """As lists, once they were JSON."""
    digests: dict[str, Digests]
    error: str
    place: str
    """With an error of a disk that cannot be trusted: the file."""


class FailedRank(MissingReport):
    """Another rank could not write its rows, or read a file back."""


class OtherRanks:
    """The others, as rank 0 sees them in one save."""

    def __init__(self, report: Report, size: int):
        self._report = report
        self._seconds = patience(size)

    def shared_out(self, sizes: Mapping[str, int]) -> Mapping[int, Sequence[str]]:
        return assembled.shared_out(sizes, assembled.readers(len(self._report.others) + 1, device().processes))

    def ask_to_write(self, directory: Path, names: Sequence[str]) -> None:
        for rank in self._report.others:
            self._report.send(rank, Order(attempt=directory.name, write=list(names)), self._seconds)

    def written(self) -> Mapping[int, Mapping[str, Sequence[Part]]]:
        said = self._answers().items()
        return {rank: {name: [Part(*part) for part in each] for name, each in a["parts"].items()} for rank, a in said}

    def ask_to_read(self, directory: Path, files: Mapping[int, Mapping[str, Written]]) -> None:
        for rank in self._report.others:
            self._report.send(rank, Order(attempt=directory.name, read=files.get(rank, {})), self._seconds)

    def read(self) -> Mapping[str, Digests]:
        return {name: Digests(*each) for answer in self._answers().values() for name, each in answer["digests"].items()}

    def end(self) -> None:
        """The save is over, well or not."""
        for rank in self._report.others:
            with suppress(MissingReport):
                self._report.send(rank, Order(), self._seconds)

    def _answers(self) -> dict[int, Answer]:
        # All are heard, so that the texts of the next save are not taken for these.
        said: dict[int, Answer] = {rank: self._report.receive(rank, self._seconds) for rank in self._report.others}
        for answer in said.values():
            if "place" in answer:
                raise assembled.untrusted(answer["place"], answer["error"])
        for rank, answer in said.items():
            if "error" in answer:
                raise FailedRank(f"rank {rank}: {answer['error']}")
        return said


class OwnRows:
    """What a rank beside rank 0 does for the saves of a run."""

    def __init__(self, run: Path, plan: Plan, state: TrainState):
        self._attempts = RunDirectory(run).attempts
        self._plan = plan
        self._live = snapshots.Live(state)
        self._staging = Staging()
        self.sets = staging_sets(plan, device())
        self.is_copy = any(map(shards.is_copy, state.trainable.values()))
        """Whether another host has the same rows, and writes them."""

    def warm(self, state: TrainState) -> None:
        if self.is_copy:
            return
        snapshots.warm(state, self._live, self._staging, self.sets)

    def begin(self, state: TrainState) -> Snapshot:
        return snapshots.take(state, self._live, self._plan, self._staging)

    def write(self, snapshot: Snapshot, report: Report) -> None:
        """Writes what rank 0 asks for, until it says that the save is over, or is gone."""
        try:
            snapshot.copy.wait()
            with suppress(MissingReport):  # rank 0 says so, and gives the save up
                report.wait()
                files = snapshots.files_of(snapshot, is_first=False)
                self._obey(report, snapshot.bytes, lambda path: _rows_written(path, files[path.name]))
        finally:
            snapshot.copy.release()

    def pass_on(self, report: Report, size: int) -> None:
        """Reads files back and writes nothing, until rank 0 ends the save of `size` bytes, or is gone."""
        with suppress(MissingReport):
            report.wait()
            self._obey(report, size, lambda path: [])

    def whole_bytes(self) -> int:
        """Of the tensors that a save copies, over all ranks that share them."""
        return snapshots.whole_bytes(self._live)

    def _obey(self, report: Report, size: int, write: Callable[[Path], list[Part]]) -> None:
        while order := report.receive(0, patience(size)):
            report.send(0, _answer(order, self._attempts / order["attempt"], write), patience(size))


def work_beside(own_rows: OwnRows | None, state: TrainState, report: Report | None) -> tuple[int, Callable[[], None]]:
    """What a rank beside rank 0 does for a save, in its writer's thread, and the bytes that decide how long that may take."""
    if own_rows is None or report is None:
        return 0, partial(await_own, report)
    if own_rows.is_copy:
        size = own_rows.whole_bytes()
        return TURNS * size, partial(own_rows.pass_on, report, size)
    snapshot = own_rows.begin(state)
    return TURNS * snapshot.bytes, partial(own_rows.write, snapshot, report)


def _answer(order: Order, directory: Path, write: Callable[[Path], list[Part]]) -> Answer:
    try:
        if "write" in order:
            with failures(directory):
                return {"parts": {name: write(directory / name) for name in order["write"]}}
        with failures(directory, what="cannot read"):
            return {"digests": {name: _read_back(directory / name, each) for name, each in order["read"].items()}}
    except assembled.UntrustedDiskError as error:
        return {"error": error.message, "place": str(error.where)}
    except FinetuneError as error:
        return {"error": error.message}


def _rows_written(path: Path, tensors: Sequence[Tensor]) -> list[Part]:
    return assembled.write_rows(path, assembled.layout(tensors, snapshots.metadata_of(path.name)))


def _read_back(path: Path, written: Written) -> Digests:
    of_all = Written.again(*written)
    return assembled.read_back(path, of_all.layout(snapshots.metadata_of(path.name)), of_all.parts)


def patience(size: int) -> float:
    """Seconds to wait for another rank's text, in a save of `size` bytes."""
    return STALL_SECONDS + TURNS * size / SLOWEST_DISK
