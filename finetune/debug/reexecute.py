"""Runs the steps of a run again from its checkpoints, and compares them with the record, to the bit.

It must change nothing in the run.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from finetune.data.batches import Batches
from finetune.debug import against_record, as_trained
from finetune.debug.against_record import Difference
from finetune.errors import CheckpointError, FinetuneError, NotFiniteError, RunError
from finetune.model import base
from finetune.plan.facts import World
from finetune.recipe.resume_rules import recorded, that_may_cost_bits
from finetune.recipe.schema import Guard
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.store.run import journal, row_losses, scan
from finetune.store.run.directory import RunDirectory
from finetune.training import collectives, guard, loop
from finetune.training.build import build
from finetune.training.evaluation import batches
from finetune.training.facts import facts_of, sharing_of
from finetune.training.guard import Amendment, amendments
from finetune.training.resolve import Resolved, resolve_own
from finetune.training.resume import stand_in
from finetune.training.saving import reading
from finetune.training.state import TrainState
from finetune.training.strategy.start import start_accelerator

REFUSED = ("not_finite", "spike", "amended")  # events with the figures of a step


class Rerun:
    """At most one in a process at a time: an accelerator is global. With several ranks, one on every rank."""

    def __init__(self, run: Path):
        self.run = run
        self.plan, self.facts = RunDirectory(run).plan()
        self.store = Store(run)
        recorded = scan.read(run)
        self.events = recorded.events
        """Events of the run other than steps."""
        self.columns = row_losses.Reader(run)
        first = self.plan.parent.step + 1 if self.plan.parent else 1
        self.history = recorded.steps
        """The record of every step; for a branch also those of its parent."""
        self.steps = self.history.since(first)
        """The steps under this plan."""
        self.refused = journal.that_count(self.events, lambda item: item.get("event") in REFUSED and "loss" in item)
        """Records of refused steps."""
        self.unwritten: dict[int, row_losses.Columns] = {}
        """Row losses and norms of repeated steps missing from the files: the run was killed before it wrote them."""
        self.amendments = self._amendments()
        self.first_difference: Difference | None = None
        """Of all steps repeated so far."""
        self.accelerator = start_accelerator(self.plan.recipe.train)
        with collectives.rank_0_first(self.accelerator):
            self._stand_in = stand_in(run, self.plan)
            small_files = base.small_files_of(self._stand_in) if self._stand_in else None
            self.resolved: Resolved = resolve_own(
                self.plan, RunDirectory(run).plan_file, is_to_load=True, stand_in=small_files
            )
            self._directory = self._stand_in or base.directory(self.plan.recipe.base, self.plan.base, as_trained=True)
        self._state: TrainState | None = None
        self._loaded_step = 0
        self._worlds: dict[str, World] = {
            record["attempt"]: record["world"] for record in self.events if record.get("event") == "started"
        }
        self._batches: dict[int, Batches] = {}
        self.kernels = as_trained.kernels(self.plan, self._directory, (self.facts, *self._worlds.values()))

    @property
    def state(self) -> TrainState:
        """Where the first `begin_at` or `go_to` brought it."""
        if self._state is None:
            raise ValueError("nothing was run again yet")
        return self._state

    @property
    def strategy(self) -> str:
        """How devices share the work: as the run did, or a single one has it all."""
        return str(recorded(self.facts)["strategy"]) if self.accelerator.num_processes > 1 else "ddp"

    @property
    def whole_state(self) -> TrainState:
        """The same, to be written to a disk. FinetuneError if it is spread over ranks."""
        if self.state.strategy.is_sharded:
            hint = "run the command in one process; its steps have the same rows, and may differ in the last bits"
            raise FinetuneError("a state that is spread over ranks is written by a training alone", hint=hint)
        return self.state

    def is_at(self, step: int) -> bool:
        return self._state is not None and self._state.step == step

    def notes(self) -> list[str]:
        """A line for every recorded fact of the machine that differs here."""
        own = {"micro_batch_tokens": self.facts["micro_batch_tokens"], **sharing_of(self.strategy)}
        own["kernels"] = as_trained.name_here(self.facts, self.kernels)
        now = facts_of(self.accelerator) | own
        found = that_may_cost_bits(self.facts, now, self.plan.recipe.train.reproducibility)
        return [f"{name} was {old} and is {new}: bits may differ" for name, old, new in found]

    def nearest(self, step: int) -> Checkpoint | None:
        """The newest sound checkpoint before or at a step, as rank 0 sees it; None is the base."""
        number = 0
        if self.accelerator.is_main_process:
            found, _ = self.store.newest_sound(before=step + 1)
            number = found.step if found else 0
        number = collectives.of_rank_0(self.accelerator, number)
        if number:
            return self.store.find(number)
        if self.plan.parent and self.plan.parent.step:
            where, hint = str(self.run), f"replay the run it comes from, {self.plan.parent.ref}"
            raise RunError(
                f"begins at step {self.plan.parent.step}, and has no checkpoint before step {step}",
                where=where,
                hint=hint,
            )
        return None

    def sound_checkpoints(self) -> tuple[dict[int, Checkpoint], list[str]]:
        """The full and sound checkpoints by step, and the names of the damaged ones."""
        full = [item for item in self.store.checkpoints() if item.manifest.kind == "full"]
        broken = {item.step for item in full if any(damage.check != "extra" for damage in verify(item.path))}
        return {item.step: item for item in full if item.step not in broken}, [
            item.path.name for item in full if item.step in broken
        ]

    def begin_at(self, checkpoint: Checkpoint | None) -> None:
        """Brings the state to a checkpoint of this run or of its parent, or to the base."""
        if checkpoint is None and self._stand_in:
            base.directory(self.plan.recipe.base, self.plan.base)  # raises if the base is gone
        self._loaded_step = checkpoint.step if checkpoint else 0
        if checkpoint is None and self._state is not None and self._state.step == 0:
            return
        if self._state is None or checkpoint is None:
            self._state = None
            self.accelerator.free_memory()  # before a second model is built
            self._state = build(self.plan, self._directory, self.accelerator, self.strategy, self.kernels)
        if checkpoint:
            try:
                reading.read(self._state, self.plan, checkpoint)
            except FileNotFoundError as error:
                hint = "a training that runs removes old checkpoints: raise checkpoint.keep, or try again"
                raise CheckpointError("was removed meanwhile", where=str(checkpoint.path), hint=hint) from error

    def go_to(self, step: int, say: Callable[[str], None] | None = None, is_to_run: bool = False) -> None:
        """Brings the state to a step, from its current step or from the nearest earlier checkpoint. With `is_to_run`, never from a
        checkpoint of that step itself: its content may be the fault."""
        begin = max(step - 1, self.plan.parent.step if self.plan.parent else 0) if is_to_run else step

        def is_on_the_way(start: int) -> bool:
            return self._state is not None and start <= self._state.step <= step and self._loaded_step <= begin

        # all ranks ask together, or none does
        if not is_on_the_way(self._newest_name(begin)) or self.accelerator.num_processes > 1:
            nearest = self.nearest(begin)
            if not is_on_the_way(nearest.step if nearest else 0):
                self.begin_at(nearest)
        if say and self.state.step < step:
            first = self.state.step + 1
            say(f"running step {step} again" if first == step else f"running steps {first} to {step} again")
        self.go_to_from_here(step)

    def go_to_from_here(self, step: int) -> None:
        """Runs from the current step of the state."""
        while self.state.step < step:
            self.advance()

    def stored_difference(self) -> Difference | None:
        """The first tensor that differs from the stored checkpoint of this step, to the bit; None without a checkpoint."""
        step = self.state.step
        if not RunDirectory(self.run).checkpoint(step).is_dir():
            return None
        return against_record.of_tensors(self.state, self.store.find(step))

    def advance(self) -> loop.StepReport:
        """Runs the next step as the run did, and compares it with the record. Raises NotFiniteError if it is NaN or infinite."""
        report = self.attempt()
        if report.verdict and not report.is_finished:
            found = self.first_difference
            hint = f"in the run it could: {found}" if found else "the run ended here as well"
            raise NotFiniteError(f"cannot be made: {report.verdict.message}", where=f"step {report.step}", hint=hint)
        return report

    def attempt(self) -> loop.StepReport:
        """The same, but without an update if the figures are NaN or infinite: then the state stays at its step."""
        step = self.state.step + 1
        if self.accelerator.device.type == "cpu":
            torch.set_num_threads(self._world_of(step)["threads"])  # sums are divided among the threads
        as_trained.switch(self.state, step, self._world_of(step), self.kernels)
        report = loop.train_step(self.state, self.plan, self.batches_of(step), judge=self.judge)
        if not self.columns.rows(step):
            self.unwritten[step] = report.columns
        if self.first_difference is None:
            record = self.steps.get(step) or self.refused.get(step)
            self.first_difference = against_record.of_step(report, record, self.columns) if record else None
        return report

    def slots_of(self, step: int) -> list[list[int]]:
        """The rows of the step in each micro-batch of this rank."""
        made = self.batches_of(step)
        return made.of(self.plan.examples_of(step)).slots[made.rank :: made.world_size]

    def judge(self, step: int, figures: dict[str, float]) -> guard.Verdict | None:
        """Skips the updates that the run skipped, and refuses NaN and infinity."""
        if self.plan.is_left_out(step):
            return guard.without_rows(step)
        return guard.judge(Guard(spike="ignore"), step, figures, lambda quantity, before: (), self.amendments)

    def say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            print(message, file=sys.stderr, flush=True)

    def batches_of(self, step: int) -> Batches:
        """Arranged as in the run: each attempt has its own size of micro-batches."""
        budget = self._world_of(step)["micro_batch_tokens"]
        if budget not in self._batches:
            resolved = replace(self.resolved, micro_batch_tokens=budget)
            self._batches[budget] = batches(resolved, resolved.train, self.accelerator)
        return self._batches[budget]

    def _world_of(self, step: int) -> World:
        """The machine facts of the attempt that recorded a step."""
        record = self.steps.get(step)
        return self._worlds.get(record["attempt"], self.facts) if record else self.facts

    def _newest_name(self, step: int) -> int:
        """The newest step up to `step` with a checkpoint directory, verified or not."""
        return max([0, *(each for each in RunDirectory(self.run).stored_steps() if each <= step)])

    def _amendments(self) -> list[Amendment]:
        stored = self.store.checkpoints()
        carried = stored[-1].manifest.amendments if stored else []
        return amendments(carried, self.events)
