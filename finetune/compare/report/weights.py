"""How far the weights of a run's last checkpoint are from its base. Reads every tensor, so only a report that is asked to has it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from finetune.store.run.directory import RunDirectory


class ModuleChange(TypedDict):
    module: str
    relative: float
    """Norm of the change over the norm of the base's weights."""
    largest: float
    """The largest change of one number."""


class Weights(TypedDict):
    run: str
    ref: str
    total: float
    modules: list[ModuleChange]


def weights(runs: Sequence[Path]) -> tuple[Weights, ...]:
    """Of each run with a checkpoint."""
    return tuple(_weights(run) for run in dict.fromkeys(runs) if RunDirectory(run).stored_steps())


def _weights(run: Path) -> Weights:
    from finetune.debug import weight_changes
    from finetune.debug.diff import side_of

    sides = [side_of(f"{run}@{step}") for step in ("0", "last")]
    found, _ = weight_changes.changes(*(weight_changes.weights_of(side.directory) for side in sides))
    return {
        "run": str(run),
        "ref": f"{run}@{sides[1].step}",
        "total": weight_changes.total("all", found).relative,
        "modules": [
            {"module": change.name, "relative": change.relative, "largest": change.largest}
            for change in weight_changes.by_module(found)
        ],
    }
