"""States of a run that are not stored, made by replay in one pass: whole weights are added up on the way, adapters are written aside.

It must change nothing in the run, and must not take a state that differs from the run's record.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from finetune.compare.average_choice import Named, step_of_run
from finetune.compare.average_full import Sums, Weights, frozen_of
from finetune.compare.average_members import Member, opened
from finetune.debug.reexecute import Rerun
from finetune.errors import CheckpointError, FinetuneError, counted
from finetune.model import adapters
from finetune.plan import memory
from finetune.plan.disk import free_bytes, readable
from finetune.store.checkpoints.manifest import FileRecord
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.tensor_files import ADAPTER
from finetune.store.checkpoints.verify import is_as_recorded
from finetune.store.run.directory import RunDirectory, step_name
from finetune.store.run.records import MemberRecord
from finetune.training.opened import open_model
from finetune.training.saving.snapshot import Live

SUM_BYTES = 8  # of a number


class Window:
    """Members of one run by their steps; its base may be one of them, before the others."""

    def __init__(self, named: Sequence[Named]):
        self.run, _ = step_of_run(named[-1].ref)
        self.of_base = next((each for each in named if each.ref.endswith("@0")), None)
        self.named = {step_of_run(each.ref)[1]: each for each in named if each is not self.of_base}
        self.absent = sorted(self.named.keys() - set(RunDirectory(self.run).stored_steps()))
        """The steps that have to be made."""

    @property
    def records(self) -> list[MemberRecord]:
        plan, name = RunDirectory(self.run).plan()[0], self.run.absolute().name
        found: list[MemberRecord] = []
        if self.of_base:
            digest = plan.base.digest or plan.base.revision
            found.append({"ref": f"{name}@0", "digest": digest, "weight": self.of_base.weight})
        for step, each in self.named.items():
            stored = None if step in self.absent else Store(self.run).find(step).manifest.digest
            found.append({"ref": f"{name}@{step}", "digest": stored, "weight": each.weight})
        return found

    def begin(self) -> "Replayed":
        """Raises CheckpointError for a step that the run has not made."""
        return Replayed(self, Rerun(self.run))


class Replayed:
    def __init__(self, window: Window, rerun: Rerun):
        self._window, self._rerun = window, rerun
        self.is_adapter = bool((adapter := rerun.plan.recipe.adapter) and adapter.is_peft)
        stored = (frozen_of(item) for item in rerun.store.checkpoints())
        sound = (files for files in stored if files and all(is_as_recorded(*each) for each in files))
        self.frozen: list[tuple[Path, FileRecord]] = next(sound, [])
        """The files of weights that cannot change."""
        self.companions = rerun.resolved.companions
        if lacking := sorted(window.named.keys() - rerun.steps.keys()):
            hint = f"the newest recorded step is {max(rerun.steps, default=0)}"
            raise CheckpointError(f"step {lacking[0]} was never made", where=str(window.run), hint=hint)

    def say_cost(self) -> None:
        """By the record of the run, before anything is run."""
        window, rerun, place, repeated = self._window, self._rerun, 0, list[int]()
        stored = RunDirectory(window.run).stored_steps()
        for step in window.absent if self.is_adapter else window.named:
            repeated += range(max([place, *(each for each in stored if each <= step)]) + 1, step + 1)
            place = step
        numbers = rerun.plan.trainable_parameters if self.frozen else rerun.plan.total_parameters
        memory_bytes, seconds = SUM_BYTES * numbers, sum(rerun.steps[step]["seconds"] for step in repeated)
        takes = f"{readable(self._aside_bytes)} of disk" if self.is_adapter else f"{readable(memory_bytes)} of memory"
        rerun.say(
            f"{len(window.absent)} of {counted(len(window.named), 'step')} not stored: re-running "
            f"{counted(len(repeated), 'step')}, {seconds:.3g} s in the run; {takes}"
        )

    def summed(self) -> Weights:
        """The weighted sum of whole weights, in the order of the steps; without the frozen ones if they have a file."""
        sums, of_base = Sums(), self._window.of_base
        for step, state in self._states(self._window.named):
            if of_base:
                base = adapters.weights(open_model(of_base.ref, is_as_trained=False).model)
                sums.add(of_base.ref, {name: base[name] for name in state}, of_base.weight)
                of_base = None
            sums.add(self._window.named[step].ref, state, self._window.named[step].weight)
        return sums.weights(str(self._window.run))

    def members(self, scratch: Path) -> list[Member]:
        """The adapters of all steps; those that are not stored lie in `scratch`."""
        stored = [each for step, each in self._window.named.items() if step not in self._window.absent]
        found = [*(opened(stored) if stored else ()), *self._written(scratch)]
        return sorted(found, key=lambda member: member.step)

    def _written(self, scratch: Path) -> Iterator[Member]:
        if self._aside_bytes > free_bytes(scratch):
            message = f"the adapters of {counted(len(self._window.absent), 'step')} need {readable(self._aside_bytes)}"
            raise FinetuneError(message, where=str(scratch), hint="free some space, or take fewer steps with --every")
        plan, run = self._rerun.plan, self._window.run
        for step, state in self._states(self._window.absent):
            place = scratch / step_name(step)
            place.mkdir()
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, place / ADAPTER)
            config = adapters.config_of(self._rerun.state.model, plan)
            (place / "adapter_config.json").write_text(json.dumps(config))
            named = self._window.named[step]
            yield Member(
                named.ref, named.weight, place, f"{run.absolute().name}@{step}", None, run, plan, replayed=step
            )

    @property
    def _aside_bytes(self) -> int:
        return len(self._window.absent) * memory.trained_bytes(self._rerun.plan)

    def _states(self, steps: Sequence[int] | dict[int, Named]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """The tensors that change, after each of the steps. They are the live ones: the next step writes to them."""
        threads = torch.get_num_threads()
        for step in sorted(steps):
            self._rerun.go_to(step)
            if found := self._rerun.first_difference:
                hint = "the run was made by other code, data or hardware; `finetune replay` says more"
                raise CheckpointError(
                    f"{found}, so no average can be made by replay", where=str(self._window.run), hint=hint
                )
            live = Live(self._rerun.state)
            yield step, live.trained | live.buffers | ({} if self.frozen else live.frozen)
        torch.set_num_threads(threads)
