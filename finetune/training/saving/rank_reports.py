"""Before a checkpoint is committed, every rank says that it is at that step of that plan. `recorder` begins a report on all ranks.

Where each rank saves its own rows, they exchange short JSON texts after that. Over a separate gloo group with a timeout, beside
training: a rank that is stuck costs a checkpoint, not the training.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from finetune.errors import CheckpointError

REPORT_SECONDS = 60.0
REPORT, LENGTH, WORDS = range(3)
"""Tags of messages: the report of the next save may overtake the texts of this one."""


class MissingReport(CheckpointError):
    """A rank did not report in time, or reported another step: the save is given up, training goes on."""


class Reports:
    """The connections of the reports; made and renewed by all ranks together."""

    def __init__(self, rank: int, world_size: int):
        self.rank = rank
        self.world_size = world_size
        self.awaited: int | None = None
        """The rank that the running save waits for."""
        self.renew()

    def renew(self) -> None:
        """Makes a new group; all ranks call it at the same step's edge."""
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=REPORT_SECONDS))
        self.is_broken = False  # set when a report was missed: gloo has then closed the group's connections

    def close(self) -> None:
        """Ends the group's thread, which wakes a hundred times a second; nothing may be under way."""
        dist.destroy_process_group(self.group)

    def begin(self, step: int, plan_id: str) -> "Report":
        """Sends this rank's report, or prepares to receive the others'; returns at once."""
        return Report(self, step, plan_id)


class Report:
    """The reports of one save: on rank 0 those of all others, elsewhere its own."""

    def __init__(self, reports: Reports, step: int, plan_id: str):
        self._reports = reports
        self._group = group = reports.group
        # ranks exchange numbers, never pickles: the step, and 60 bits of the plan's digest
        self._own = torch.tensor([step, int(plan_id.rpartition(":")[2][:15], 16)])
        self._under_way: list[tuple[int, torch.Tensor, dist.Work | None]] = []
        try:
            if reports.rank:
                self._under_way.append((0, self._own, dist.isend(self._own, 0, group=group, tag=REPORT)))
            for rank in range(1, reports.world_size) if reports.rank == 0 else ():
                theirs = torch.empty_like(self._own)
                self._under_way.append((rank, theirs, dist.irecv(theirs, rank, group=group, tag=REPORT)))
        except RuntimeError:  # the connections are closed since an earlier report was missed: `wait` says so
            self._break()

    def wait(self) -> None:
        """Returns when all reports are there; MissingReport names the rank of one that is not, or is of another step or plan."""
        if not self._under_way:
            raise MissingReport("a rank missed an earlier report")
        for rank, theirs, work in self._under_way:
            try:
                with self._awaiting(rank):
                    if work:
                        work.wait()
            except RuntimeError as error:  # gloo's timeouts and closed connections
                self._break()
                raise MissingReport(f"rank {rank} did not report within {REPORT_SECONDS:g} seconds") from error
            if theirs.tolist() != self._own.tolist():
                self._break()
                raise MissingReport(f"rank {rank} is at step {theirs[0]}, or follows another plan")

    @property
    def others(self) -> range:
        """The ranks beside rank 0."""
        return range(1, self._reports.world_size)

    def send(self, rank: int, words: object, seconds: float) -> None:
        """Returns when the rank takes it; MissingReport if it does not in time."""
        data = torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8)
        try:
            for tensor, tag in ((torch.tensor([len(data)]), LENGTH), (data, WORDS)):
                if work := dist.isend(tensor, rank, group=self._group, tag=tag):
                    with self._awaiting(rank):
                        work.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            self._break()
            raise MissingReport(f"rank {rank} is gone, or did not listen for {seconds:.0f} seconds") from error

    def receive(self, rank: int, seconds: float) -> Any:
        """The next words of a rank; MissingReport if none come in time."""
        length = torch.zeros(1, dtype=torch.int64)
        try:
            self._receive(length, rank, LENGTH, seconds)
            data = torch.empty(int(length), dtype=torch.uint8)
            self._receive(data, rank, WORDS, seconds)
        except RuntimeError as error:
            self._break()
            raise MissingReport(f"rank {rank} is gone, or said nothing for {seconds:.0f} seconds") from error
        return json.loads(data.numpy().tobytes())

    def _receive(self, into: torch.Tensor, rank: int, tag: int, seconds: float) -> None:
        work = dist.irecv(into, rank, group=self._group, tag=tag)
        if work:
            with self._awaiting(rank):
                work.wait(timedelta(seconds=seconds))

    @contextmanager
    def _awaiting(self, rank: int) -> Iterator[None]:
        self._reports.awaited = rank
        try:
            yield
        finally:
            self._reports.awaited = None

    def _break(self) -> None:
        self._under_way = []
        if self._group is self._reports.group:
            self._reports.is_broken = True


def await_own(report: Report | None) -> None:
    """Waits for this rank's report; alone there is none."""
    if report is None:
        return
    with suppress(MissingReport):  # rank 0 says so, and gives the save up
        report.wait()
