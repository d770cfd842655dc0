"""A checkpoint that a run begins with stays in the run that it comes from: it is pinned there, as a branch pins the one it begins with."""

from pathlib import Path

from finetune.errors import CheckpointError
from finetune.model import base
from finetune.plan.plan import PinnedBase
from finetune.recipe.schema import Base
from finetune.store.checkpoints.refs import find, parse
from finetune.store.checkpoints.store import Store
from finetune.store.run.directory import step_of


def pin_base(named: Base, pinned: PinnedBase, run_id: str, directory: Path | None = None) -> list[str]:
    """Pins a base for the run `run_id` if it is a checkpoint of another run; for an adapter, its base as well. `directory` is
    the place of a base that is not an adapter.

    Returns a line for each that could not be pinned: its run may not be written. Nothing else is wrong then, but it may be pruned.
    """
    is_adapter = pinned.kind == "adapter"
    if is_adapter:
        named = base.located(named, pinned, base.LOOK)
    path = _directory(named.checkpoint) if is_adapter or directory is None else base.source_of(directory).resolve()
    step = step_of(path.name) if path else None
    run = base.run_around(path) if path and step is not None else None
    if path is None or step is None or run is None:
        return []
    lines = pin(run, step, f"base-{run_id}", named.checkpoint)
    # An adapter is of no use once its base is pruned.
    if is_adapter:
        below, pinned_below = base.beneath(path, named.checkpoint)
        lines += pin_base(below, pinned_below, run_id)
    return lines


def pin(run: Path, step: int, reason: str, name: str) -> list[str]:
    """Pins a checkpoint in its run, or returns a line that says why it could not be; `name` is what the line calls it."""
    store = Store(run)
    try:
        # Asked first: a run that you may only read is fine once it is pinned.
        if not store.is_pinned(step, reason):
            store.pin(step, reason)
    except CheckpointError as error:
        return [f"{name} could not be pinned, so its run may prune it: {error.where}: {error.message}"]
    return []


def _directory(checkpoint: str) -> Path | None:
    """Where a base lies, if it is a directory that is there."""
    try:
        ref = parse(checkpoint)
        path = find(ref).path if ref.kind == "run" else ref.path if ref.kind in ("checkpoint", "model") else None
    except CheckpointError:  # gone: what needs it says so
        return None
    return path.resolve() if path else None
