"""Before a checkpoint is committed, every rank says that it is at that step of that plan. `recorder` begins a report on all ranks.

Over a separate gloo group with a timeout, beside training: a rank that is stuck costs a checkpoint, not the training.
"""

from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from finetune.errors import CheckpointError

REPORT_SECONDS = 60.0


class MissingReport(CheckpointError):
    """A rank did not report in time, or reported another step: the save is given up, training goes on."""


class Reports:
    """The connections of the reports; made and renewed by all ranks together."""

    def __init__(self, rank: int, world_size: int):
        self.rank = rank
        self.world_size = world_size
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
                self._under_way.append((0, self._own, dist.isend(self._own, 0, group=group)))
            for rank in range(1, reports.world_size) if reports.rank == 0 else ():
                theirs = torch.empty_like(self._own)
                self._under_way.append((rank, theirs, dist.irecv(theirs, rank, group=group)))
        except RuntimeError:  # the connections are closed since an earlier report was missed: `wait` says so
            self._break()

    def wait(self) -> None:
        """Returns when all reports are there; MissingReport names the rank of one that is not, or is of another step or plan."""
        if not self._under_way:
            raise MissingReport("a rank missed an earlier report")
        for rank, theirs, work in self._under_way:
            try:
                if work:
                    work.wait()
            except RuntimeError as error:  # gloo's timeouts and closed connections
                self._break()
                raise MissingReport(f"rank {rank} did not report within {REPORT_SECONDS:g} seconds") from error
            if theirs.tolist() != self._own.tolist():
                self._break()
                raise MissingReport(f"rank {rank} is at step {theirs[0]}, or follows another plan")

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
