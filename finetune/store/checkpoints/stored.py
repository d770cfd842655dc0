"""The entries of `checkpoints/`: a checkpoint, its short record, or something unreadable."""

from dataclasses import dataclass
from pathlib import Path

from finetune.plan.facts import Metrics
from finetune.store.checkpoints.manifest import Checkpoint, ManifestError, read
from finetune.store.checkpoints.verify import Damage, damage_of, verify
from finetune.store.run.directory import step_of


@dataclass(frozen=True)
class Unreadable:
    """A directory in a checkpoint's place with a damaged, foreign or future manifest."""

    path: Path
    step: int
    damage: Damage


@dataclass(frozen=True)
class Summary:
    """The facts about a checkpoint for the keep rules."""

    path: Path
    step: int
    kind: str
    metrics: Metrics

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Summary":
        return cls(checkpoint.path, checkpoint.step, checkpoint.manifest.kind, checkpoint.manifest.metrics)


def is_whole(path: Path) -> bool:
    """Whether any directory holds an intact checkpoint."""
    return {damage.check for damage in verify(path)} <= {"extra"}


def opened(path: Path) -> Checkpoint | Unreadable:
    try:
        return read(path)
    except ManifestError as error:
        return Unreadable(path, step_of(path.name) or 0, damage_of(error))
