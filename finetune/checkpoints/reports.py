"""Floor 1. Before a checkpoint is committed, every rank says that it is at that step of that plan. `saver` calls `exchange` on all ranks.

Over a gloo group of its own with a timeout, from the threads that save: a rank that is stuck costs a checkpoint, not the training.
"""

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
        self._rank = rank
        self._world_size = world_size
        self.renew()

    def renew(self) -> None:
        """Makes the group anew; all ranks call it at the same step's edge."""
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=REPORT_SECONDS))
        self.is_broken = False  # set when a report was missed: gloo has then closed the group's connections

    def exchange(self, step: int, plan_id: str) -> None:
        """Sends this rank's report to rank 0; on rank 0 returns when all have come. MissingReport names who is missing."""
        # ranks exchange numbers, never pickles: the step, and 60 bits of the plan's digest
        own = torch.tensor([step, int(plan_id.rpartition(":")[2][:15], 16)])
        others = range(1, self._world_size) if self._rank == 0 else (0,)
        for rank in others:
            try:
                if self._rank:
                    dist.send(own, rank, group=self._group)
                else:
                    self._receive(own, rank)
            except RuntimeError as error:  # gloo's timeouts and closed connections
                self.is_broken = True
                message = f"rank {rank} did not report within {REPORT_SECONDS:.0f} seconds"
                raise MissingReport(message) from error

    def _receive(self, own: torch.Tensor, rank: int) -> None:
        theirs = torch.empty_like(own)
        dist.recv(theirs, rank, group=self._group)
        if theirs.tolist() != own.tolist():
            self.is_broken = True  # what is on the way belongs to another save
            raise MissingReport(f"rank {rank} is at step {theirs[0]}, or follows another plan")
