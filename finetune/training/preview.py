"""What a recipe will do, before it is trained: the plan with its forecast, as `finetune plan` shows it. Loads no weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from finetune.data import readings, unused
from finetune.data.readings import Readings
from finetune.data.unused import Unused
from finetune.errors import counted
from finetune.plan import forecast, forecast_table, kinds
from finetune.plan.choosing import choosing_rows
from finetune.plan.kinds import KindFacts
from finetune.plan.memory import Work
from finetune.plan.pace import largest_step
from finetune.plan.pinned import PinnedSet
from finetune.plan.plan import Plan
from finetune.plan.shown import WithDevices
from finetune.recipe.load import LoadedRecipe
from finetune.store.run.directory import RunDirectory
from finetune.store.run.lease import refuse_other_directory
from finetune.training import kernels, mirroring
from finetune.training.build import notes_here
from finetune.training.detectable import Detectable, detectable, line
from finetune.training.device import device
from finetune.training.evaluation_sets import with_sets
from finetune.training.readiness import refuse_gated, refuse_unfit_base, refuse_unready
from finetune.training.resolve import Resolved, in_kernels, resolve
from finetune.training.trackers import refuse_absent


class SetFacts(TypedDict):
    name: str
    rows: int
    tokens: int
    is_test_set: bool
    """Whether it is `evaluate.test_set`: nothing is chosen by it."""


class PlanFacts(WithDevices, Unused, Readings):
    """What `plan --json` prints."""

    base_notes: list[str]
    weights: dict[str, KindFacts]
    """By kind of module."""
    detectable: Detectable | None
    """The smallest difference that the held-out rows can show."""
    sets: list[SetFacts]
    """The named evaluation sets."""
    kernels: str
    """`fused` or `plain`, and why."""
    choosing_rows: dict[str, int]
    """The sets by which checkpoints are chosen, with their number of rows; none where only the ends of the training are evaluated."""


@dataclass(frozen=True)
class Preview:
    resolved: Resolved
    run: Path
    is_of_devices: bool
    """Made for other machines: what this one lacks is no reason to refuse."""
    facts: PlanFacts
    loaded: LoadedRecipe

    @property
    def text(self) -> str:
        """The facts for a reader."""
        facts, resolved = self.facts, self.resolved
        listed = kinds.lines(facts["weights"], resolved.plan.recipe.adapter is not None)
        sets = [_line(each) for each in facts["sets"]]
        if by := facts["choosing_rows"]:
            chosen = " and ".join(f"{count:,} {name} rows" for name, count in by.items())
            sets.insert(0, f"checkpoints are chosen by {chosen}")
        shown, rows = facts["detectable"], facts["holdout_rows"]
        noted = [*([line(shown, rows)] if shown else []), *(f"base: {note}" for note in resolved.notes)]
        lines = [
            forecast_table.table(facts),
            f"{'kernels':11}{facts['kernels']}",
            *listed,
            *sets,
            *noted,
            *readings.lines(facts),
            *unused.lines(facts),
        ]
        return "\n".join([*lines, "", forecast_table.devices_table(facts)] if self.is_of_devices else lines)

    def refuse_unready(self) -> None:
        """Raises what `train` would raise before its first step on this machine."""
        if not RunDirectory(self.run).is_run:
            refuse_gated(self.resolved, self.loaded.file)
        if not self.is_of_devices:
            refuse_absent(self.loaded.recipe.track, self.loaded.problem)
            mirroring.refuse_absent(self.loaded.recipe.mirror, self.loaded.problem)
            refuse_unready(self.resolved, self.run)


def preview(
    loaded: LoadedRecipe,
    run: Path,
    ask: Callable[[Resolved], None],
    is_of_devices: bool = False,
    device_gib: float | None = None,
) -> Preview:
    """Resolves a recipe, as `train` will, and adds up what it needs; `ask` may refuse what was resolved.

    `is_of_devices` shows the memory of 1 to 64 GPUs as well, of `device_gib` each; without that, of this machine's kind.
    """
    # A plan for other machines writes nothing here, so this directory does not matter.
    if not is_of_devices:
        refuse_other_directory(run)
    resolved = with_sets(resolve(loaded))
    if not is_of_devices:  # that table is made from the config alone, so the weights may be elsewhere
        refuse_unfit_base(resolved)
    took = kernels.chosen(loaded.recipe, resolved.base_directory, is_refused=not is_of_devices)
    resolved = in_kernels(resolved, took)
    ask(resolved)
    return Preview(resolved, run, is_of_devices, _facts(resolved, run, device_gib), loaded)


def _facts(resolved: Resolved, run: Path, device_gib: float | None) -> PlanFacts:
    plan, here = resolved.plan, device()
    shape = resolved.shape
    work = Work(resolved.micro_batch_tokens, largest_step(plan, resolved.train.lengths))
    device_bytes = round(device_gib * 2**30) if device_gib else here.bytes if here.is_gpu else forecast.CARD_BYTES
    facts = forecast.forecast(plan, shape, work, here, run, resolved.train.tokens_of_sources())
    own = resolved.holdout.said if plan.holdout else []
    for source, read in zip((*facts["train"], *facts["holdout"]), (*resolved.train.said, *own), strict=True):
        source["read"] = read
    facts["notes"] += notes_here(plan.recipe.train)
    return {
        **facts,
        **readings.readings(plan, resolved.train, resolved.holdout),
        "ignored_columns": unused.columns(plan, resolved.train, resolved.holdout),
        **unused.lost(plan, resolved.train),
        "detectable": detectable(resolved, run),
        "base_notes": list(resolved.notes),
        "weights": kinds.facts_of(plan, resolved.kinds),
        "sets": [_set(each, plan) for each in plan.sets],
        "kernels": resolved.kernels.told,
        "choosing_rows": choosing_rows(plan),
        "device_memory_bytes": device_bytes,
        "devices": forecast.on_devices(plan, shape, work, device_bytes),
    }


def _set(pinned: PinnedSet, plan: Plan) -> SetFacts:
    is_test_set = pinned.name == plan.recipe.evaluate.test_set
    counts = pinned.counts
    return {"name": pinned.name, "rows": counts.rows, "tokens": counts.tokens, "is_test_set": is_test_set}


def _line(facts: SetFacts) -> str:
    kind = "test set" if facts["is_test_set"] else "evaluation set"
    use = ", for the card of a package alone" if facts["is_test_set"] else ""
    return f"{kind} {facts['name']}: {counted(facts['rows'], 'row')}{use}"
