"""The held-out rows of a plan: inherited from an earlier run, or drawn; and the earlier runs that trained on them.

Rows are held out by content (see `plan/split.py`), never by position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.example import Encoded, Row
from finetune.data.heldout import lineage
from finetune.data.heldout.lineage import Contents, Found
from finetune.errors import DataError, FinetuneError, RunError
from finetune.plan import split as splits
from finetune.plan.plan import PinnedSource, Plan, Stage
from finetune.plan.split import BAD, Split
from finetune.recipe.schema import Recipe, drawn_of, is_drawn


@dataclass(frozen=True)
class Sources:
    """The encoded sources of a recipe: hashes of their rows' content (uint64 each)."""

    pins: Sequence[PinnedSource]
    train: Sequence[np.ndarray]
    holdout: Sequence[np.ndarray]
    contents: Contents

    @property
    def rows(self) -> int:
        return sum(map(len, self.train))

    @property
    def good(self) -> list[np.ndarray]:
        """The content of the training rows without those skipped as bad."""
        return [each[each != BAD] if (each == BAD).any() else each for each in self.train]


@dataclass(frozen=True)
class HeldOut:
    """Row ids count through the training sources; if `holdout` lists its own sources, through those."""

    split: Split | None
    untrained: np.ndarray
    """Training rows (int64, sorted) to skip in training: held-out ones and their copies."""
    evaluated: np.ndarray
    """Each held-out row once."""
    says: np.ndarray
    """Hash of the content of each evaluated row (uint64)."""
    contents: Contents

    @property
    def digest(self) -> str:
        """Digest of the rows, independent of their order; empty without rows."""
        return splits.digest(self.says) if len(self.says) else ""

    def seen_by(self, stages: Sequence[Stage]) -> Found:
        return lineage.seen(self.says, self.split, stages, self.contents)


def held_out(recipe: Recipe, sources: Sources, earlier: Plan | None, origin: Stage | None) -> HeldOut:
    """`earlier` is the plan of a run to resume, `origin` the run that a new one continues. Raises DataError if a side has no rows."""
    nothing, share = np.zeros(0, dtype=np.int64), drawn_of(recipe.data)
    if share is None:
        says = np.concatenate([np.zeros(0, dtype=np.uint64), *sources.holdout])
        evaluated = np.flatnonzero(says != BAD)
        return HeldOut(None, nothing, evaluated, says[evaluated], sources.contents)
    split = earlier.split if earlier else _rule(recipe, share, sources, origin)
    if split is None:
        untrained = evaluated = splits.by_position(share, sources.rows, recipe.train.seed)
    else:
        untrained = splits.held_out_rows(split, sources.train)
        untrained = untrained[_says(sources.train, untrained) != BAD]
        _, firsts = np.unique(_says(sources.train, untrained), return_index=True)
        evaluated = np.sort(untrained[firsts])
    _refuse_empty_side(share, sum(map(len, sources.good)), len(untrained), split, origin)
    return HeldOut(split, untrained, evaluated, _says(sources.train, evaluated), sources.contents)


def _rule(recipe: Recipe, share: int | str, sources: Sources, origin: Stage | None) -> Split | None:
    """The origin's rule, if it has one and the recipe asks for no other; None is the rule of older versions."""
    seed, before = recipe.data.split_seed, drawn_of(origin.data) if origin and origin.data else None
    if origin is None or origin.task != recipe.task.name or before is None:
        return splits.draw(share, seed or 0, sources.good)
    inherited = origin.split.seed if origin.split else None
    is_asked_for = share == before and seed in (None, inherited)
    if is_asked_for and lineage.has_rows_of(origin, sources.train, sources.contents):
        return origin.split or _older_rule(recipe, sources, origin)
    return splits.draw(share, (inherited or 0) if seed is None else seed, sources.good)


def _older_rule(recipe: Recipe, sources: Sources, origin: Stage) -> Split | None:
    if list(origin.train) == list(sources.pins) and origin.seed == recipe.train.seed:
        return None  # the same positions in the same rows
    try:
        return lineage.named(origin, sources.contents)
    except FinetuneError as error:
        message = f"has held-out rows that an older version drew, and they cannot be found again: {error.where}: {error.message}"
        hint = "restore those rows, or draw others with data.split_seed: figures then cannot be compared"
        raise RunError(message, where=origin.ref, hint=hint) from error


def _says(sources: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Hashes of the content of rows that count through the sources (sorted)."""
    firsts = np.cumsum([0, *map(len, sources)])
    edges = np.searchsorted(rows, firsts)
    parts = [
        contents[rows[start:end] - first]
        for contents, first, start, end in zip(sources, firsts, edges, edges[1:], strict=False)
    ]
    return np.concatenate([np.zeros(0, dtype=np.uint64), *parts])


def _refuse_empty_side(
    holdout: int | str, rows: int, untrained: int, split: Split | None, origin: Stage | None
) -> None:
    if untrained == 0:
        hint = "hold out a larger share, or a count"
        if origin and split == origin.split:
            hint = f"they are drawn by the rule of {origin.ref}; hold out rows of another source, or none"
        raise DataError(f"data.holdout takes none of {rows} rows", hint=hint)
    if untrained >= rows:
        count = max(holdout, untrained) if isinstance(holdout, int) else untrained
        message = f"data.holdout takes {count} of {rows} rows, so none is left to train on"
        raise DataError(message, hint="hold out fewer")


def with_seen(plan: Plan, held_out: HeldOut, file: str) -> Plan:
    """The plan with its held-out rows that it or an earlier run trains on. Raises RunError if such rows are drawn, unless the recipe
    allows it. Rows of named sources, and rows drawn by an older version, are only counted."""
    found = held_out.seen_by((lineage.stage_of(plan, lineage.THIS_RUN), *(plan.stages or ()))).seen
    trained_on = [item.told(len(held_out.says)) for item in found if item.rows]
    if trained_on and held_out.split and plan.recipe.data.seen == "refuse":
        hint = "keep data.holdout and data.split_seed of the run it goes on from, hold out other rows, or set data.seen: allow"
        raise RunError("; ".join(trained_on), where=f"{file}: data.holdout", hint=hint)
    return plan.model_copy(update={"seen": found})


def sources(
    recipe: Recipe,
    content: Callable[[Row], object],
    train: tuple[Sequence[PinnedSource], Sequence[Encoded]],
    holdout: tuple[Sequence[PinnedSource], Sequence[Encoded]],
) -> Sources:
    """The content of the rows of all sources; `train` and `holdout` are pins and examples of each."""
    named = recipe.data.holdout if isinstance(recipe.data.holdout, list) and holdout[0] else ()
    keys = map(lineage.source_key, (*recipe.data.train, *named), (*train[0], *holdout[0]))
    known = dict(zip(keys, (each.contents for each in (*train[1], *holdout[1])), strict=True))
    says, says_held_out = ([each.contents for each in side] for side in (train[1], holdout[1]))
    return Sources(train[0], says, says_held_out, Contents(recipe.task.name, content, known))


def stages(recipe: Recipe, earlier: Plan | None, given: tuple[Stage, ...] | None) -> tuple[Stage, ...] | None:
    """The runs that trained the start of a plan: as recorded in `earlier`, as given for a branch, or else those behind its base."""
    if earlier is not None:
        return earlier.stages
    if given is not None:
        return given
    return lineage.stages(recipe.base.checkpoint) if recipe.base.random_weights is None else ()


def origin(recipe: Recipe, like: Plan | None, stages: Sequence[Stage] | None) -> Stage | None:
    """The run whose held-out rows stay held out: the parent of a branch, or the last run behind the base that drew some."""
    if like is not None:
        return lineage.stage_of(like, "the run that it branches off")
    same = (stage for stage in stages or () if stage.task == recipe.task.name)
    return next((stage for stage in same if stage.data and is_drawn(stage.data)), None)
