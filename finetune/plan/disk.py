"""The disk that a run needs, by formulas: one checkpoint, a package, the whole run; and the space that there is."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from finetune.errors import RunError
from finetune.plan import activations, cadence, memory
from finetune.plan.memory import state_bytes
from finetune.plan.plan import Plan
from finetune.recipe.schema import Every

COMPANION_BYTES = 8 * 2**20  # tokenizer and configs, at the large end
# of files beside tensors, as measured; each number is of one
TENSOR_BYTES = 1_100  # of a tensor and its moments: records in the manifest, headers, counters
ENTRY_BYTES = 140  # of the history of losses
FILES, BLOCK_BYTES = 9, 4096
STEP_BYTES, EVENT_BYTES = 330, 400  # of the journal
ROW_BYTES, NORM_BYTES = 16, 9  # in Parquet
LAYERS = 32  # of a base without a config here
MATRICES = 7  # of a layer, roughly


def shared_bytes(plan: Plan) -> int:
    """Bytes written by the first checkpoint and linked by later ones: frozen weights, tokenizer and configs."""
    frozen = activations.stored_width(plan) * (plan.total_parameters - plan.trainable_parameters)
    return COMPANION_BYTES + (0 if activations.is_beside(plan) else frozen)


def checkpoint_bytes(plan: Plan) -> int:
    """A whole first checkpoint."""
    return shared_bytes(plan) + state_bytes(plan)


def commit_bytes(plan: Plan, layers: int = LAYERS) -> int:
    """What each commit adds to the ones before it, as on this disk and in a mirror."""
    return state_bytes(plan) + _small_bytes(plan, layers)


def run_bytes(plan: Plan, layers: int = LAYERS) -> int:
    """Most disk space at once, with one checkpoint being written and one milestone packaged; linked files count once."""
    rule, publish = plan.recipe.checkpoint.keep, plan.recipe.publish
    is_evaluated = plan.holdout_counts.examples > 0
    for_good = _multiples(plan, [rule.every, publish.milestones if publish else None])
    milestones = len(_multiples(plan, [rule.weights_every]) - for_good)
    # the lowest losses, and what `@best` names: it may be later than all of these
    best = rule.chosen_by.count + 1 if is_evaluated else 0
    full = rule.last + best + len(for_good) + 1
    small, weights = _small_bytes(plan, layers), memory.trained_bytes(plan) + activations.average_bytes(plan)
    checkpoints = full * (state_bytes(plan) + small) + milestones * (weights + small)
    packages = package_bytes(plan) if publish and publish.milestones else 0
    return shared_bytes(plan) + checkpoints + _history_bytes(plan, layers) + packages


def package_bytes(plan: Plan) -> int:
    """A package: the whole model, or the adapter alone in fp32. With a small adapter it is many times larger than a checkpoint."""
    asked = plan.recipe.package
    if asked.form == "adapter":
        return COMPANION_BYTES + memory.trained_bytes(plan)
    width = 2 if (asked.dtype or plan.recipe.train.precision) == "bf16" else memory.FLOAT
    return COMPANION_BYTES + width * plan.total_parameters


def _multiples(plan: Plan, cadences: Iterable[Every | None]) -> set[int]:
    """The steps at which one of the cadences falls due."""
    steps = [each.steps for each in cadences if each and each.steps]
    return {step for every in steps for step in range(every, plan.steps + 1, every)}


def _small_bytes(plan: Plan, layers: int) -> int:
    """Bytes of a checkpoint beside tensors: manifest, counters, names of tensors, history of losses; files fill blocks."""
    entries = min(plan.steps, cadence.HISTORY_ENTRIES) + _evaluations(plan)
    return _trained_tensors(plan, layers) * TENSOR_BYTES + entries * ENTRY_BYTES + FILES * BLOCK_BYTES


def _history_bytes(plan: Plan, layers: int) -> int:
    """Journal, losses of rows and norms of modules."""
    saves = len(_multiples(plan, [each for each in cadence.saves_at_most(plan.recipe) if each.steps]))
    events = (saves + _evaluations(plan)) * EVENT_BYTES
    steps = plan.steps * (STEP_BYTES + plan.recipe.train.batch_size * ROW_BYTES + (layers + 3) * NORM_BYTES)
    return events + steps


def _evaluations(plan: Plan) -> int:
    every = plan.recipe.evaluate.every
    return plan.steps // every.steps if every and every.steps else 0


def _trained_tensors(plan: Plan, layers: int) -> int:
    """Number of trained tensors, roughly."""
    beside = plan.recipe.adapter.tensors_beside_a_matrix if plan.recipe.adapter else 0
    return MATRICES * beside * layers if beside else 12 * layers + 3


def refuse_small_disk(plan: Plan, run: Path) -> None:
    """Raises RunError when the disk cannot take the first checkpoint and the one that replaces it."""
    needed, free = shared_bytes(plan) + 2 * state_bytes(plan), free_bytes(run)
    if needed > free:
        raise RunError(
            f"two checkpoints need {readable(needed)}, and the disk has {readable(free)} left",
            where=str(run),
            hint="free some space, or use --run on another disk",
        )


def free_bytes(directory: Path) -> int:
    """Free space where `directory` is or will be."""
    existing = next(parent for parent in [directory.absolute(), *directory.absolute().parents] if parent.exists())
    return shutil.disk_usage(existing).free


def readable(size: float) -> str:
    """Like 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
