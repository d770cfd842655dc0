"""Recipe to plan: pins revisions, encodes and counts rows, and refuses what cannot work before anything is trained.

On resume the pins of the run's own plan are used again, and the plan that comes out must be the same.
"""

from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from finetune.data import preflight
from finetune.data.batches import Examples, select
from finetune.data.example import Encoded
from finetune.data.heldout import draw
from finetune.data.heldout.draw import HeldOut
from finetune.data.row_set import RowSet
from finetune.errors import DataError, RecipeError, RunError
from finetune.model import base
from finetune.plan import older, on_device
from finetune.plan.curve import warmup_of
from finetune.plan.kinds import OfKind, shaped
from finetune.plan.pinned import Counts
from finetune.plan.plan import PinnedBase, PinnedSource, Plan, Stage, order_of, steps_of
from finetune.plan.shape import Shape, shape_of
from finetune.recipe.load import LoadedRecipe
from finetune.recipe.resume_rules import differences
from finetune.recipe.schema import Recipe
from finetune.recipe.schema.rules import SHARDED
from finetune.tasks import TASKS
from finetune.training import base_fit
from finetune.training.counted import counted as count
from finetune.training.device import device, shared
from finetune.training.encoding import Encoding, encoding_of, read
from finetune.training.kernels import Kernels
from finetune.training.trial import arranged_like

# what a resume keeps of a plan, and a new plan does not have
KEPT = ("schedule_start", "segments", "parent", "earlier_orders", "skipped_rows", "skipped_examples", "seen", "sets")


@dataclass(frozen=True)
class Resolved:
    plan: Plan
    base_directory: Path
    """Config and tokenizer of the base; the weights too, once `base.directory` was asked for them."""
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    """The chat template in force; None where rows are not conversations."""
    train: Examples
    holdout: Examples
    strategy: str
    """How devices share the work: as the recipe says, or what `auto` stands for here."""
    micro_batch_tokens: int
    """As the recipe says, or what `auto` stands for here; a run that exists keeps the one that it recorded."""
    held_out: HeldOut
    encoding: Encoding
    notes: tuple[str, ...] = ()
    """What was found out about the base that its user should know."""
    kinds: dict[str, OfKind] = field(default_factory=dict)
    """The base's parameters by kind of module."""
    stand_in: Path | None = None
    """A checkpoint with all weights, where the base is gone: what is loaded to be trained on."""
    sets: tuple[RowSet, ...] = ()
    """The named evaluation sets, once they are read."""
    kernels: Kernels = Kernels()
    """Chosen for what is trained here; else plain."""

    @property
    def shape(self) -> Shape:
        """Of its model, in the kernels that were chosen."""
        found = shaped(shape_of(base.load_config(self.base_directory)), self.kinds)
        return self.kernels.shaped(found)

    @property
    def companions(self) -> base.Companions:
        stops = base.named_stops(self.tokenizer, self.plan.recipe.task.stop_names)
        return base.Companions(self.base_directory, self.template, tuple(stops))


def resolve_own(plan: Plan, where: Path | str, *, is_to_load: bool = False, stand_in: Path | None = None) -> Resolved:
    """The plan of a run once more, with its examples: its pins hold. `where` is what errors name. See `resolve`."""
    return resolve(LoadedRecipe(plan.recipe, "", str(where), {"": 0}), plan, is_to_load, stand_in=stand_in)


def resolve(
    loaded: LoadedRecipe,
    earlier: Plan | None = None,
    is_to_load: bool = False,
    like: Plan | None = None,
    stages: tuple[Stage, ...] | None = None,
    today: date | None = None,
    stand_in: Path | None = None,
) -> Resolved:
    """The plan of a recipe, with its examples. `earlier` is the plan of a run to resume: its pins hold, and nothing else may come out.

    `is_to_load`: the weights will be wanted, so they are read into memory while rows are encoded. `like` is the plan of a run to branch
    off: its pins hold for what the recipe has not changed, and `stages` are the runs that trained what the branch begins with. `today` is
    the day of a new plan, where it is not the clock's. `stand_in` has config and tokenizer of the base, which then is not needed.
    """
    like = earlier or like
    loaded = replace(loaded, recipe=on_device.with_weights(loaded.recipe, like, device().is_gpu))
    recipe = loaded.recipe
    is_same = _has_rows_of(like, loaded)
    opened = open_base(loaded, like, stand_in, is_to_load)
    encoding = encoding_of(recipe, opened.directory, opened.tokenizer, earlier, like, today)
    rows = _read_rows(recipe, encoding, like if is_same else None, like)
    sources = draw.sources(recipe, TASKS[recipe.task.name].content, rows.train, rows.holdout)
    stages = draw.stages(recipe, earlier, stages)
    # Which rows are held out is decided before any is counted: steps and epochs are about the others.
    held_out = draw.held_out(recipe, sources, earlier, draw.origin(recipe, like, stages))
    train, train_counts, holdout, holdout_counts = _selected(loaded, rows, held_out)
    counted = count(loaded, opened.directory, like)
    arranged, notes = arranged_like(recipe, opened.directory, like, is_resumed=earlier is not None)
    plan = Plan(
        recipe=recipe,
        base=opened.pinned,
        train=tuple(rows.train[0]),
        holdout=tuple(rows.holdout[0]),
        encoding=encoding.digest,
        counts=train_counts,
        holdout_counts=holdout_counts,
        sizes=train.sizes,
        **_course(recipe, train.sizes, earlier),
        **counted.in_plan,
        row_rules=encoding.row_rules,
        split=held_out.split,
        # An older plan has no digest here, and gets none: its id must stay what it is.
        held_out=held_out.digest if earlier is None or earlier.held_out else "",
        stages=stages,
        arranged=arranged,
        date=encoding.day,
        **older.ways(recipe, like, device().is_gpu),
    )
    if earlier is not None:
        _refuse_change(earlier, plan)
    plan = plan if earlier is not None else draw.with_seen(plan, held_out, loaded.file)
    strategy, tokens = shared(plan, shaped(shape_of(opened.config), counted.kinds))
    found = (*opened.pinned.notes, *base.notes(opened.directory), *encoding.notes(train_counts), *counted.notes, *notes)
    base_of = opened.directory, opened.tokenizer, encoding.template
    return Resolved(plan, *base_of, train, holdout, strategy, tokens, held_out, encoding, found, counted.kinds)


def _has_rows_of(like: Plan | None, loaded: LoadedRecipe) -> bool:
    """Whether a recipe has the rows of a plan. They are pinned: their files are compared with the pins later. New ones are looked at now."""
    is_same = like is not None and like.recipe.data == loaded.recipe.data
    if not is_same:
        preflight.check(loaded)
    return is_same


@dataclass(frozen=True)
class _Base:
    pinned: PinnedBase
    directory: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase


def open_base(loaded: LoadedRecipe, like: Plan | None, stand_in: Path | None, is_to_load: bool) -> _Base:
    """Config and tokenizer of the base. RecipeError where it and the recipe cannot do together."""
    recipe = loaded.recipe
    # A branch on the same base keeps the pin, so that a new commit on the Hub does not change it under way.
    is_same = like is not None and like.recipe.base == recipe.base
    # Packed bits cannot be spread over devices by rows.
    is_whole = recipe.is_adapted and recipe.train.strategy not in SHARDED
    pinned = like.base if like and is_same else base.pin(recipe.base, is_whole)
    directory = stand_in or base.directory(recipe.base, pinned, with_weights=False)
    if is_to_load:
        # The disk reads weights into memory while the CPU encodes rows.
        base.read_ahead(directory)
    config, tokenizer = base.load_config(directory), base.load_tokenizer(directory)
    if problems := base_fit.problems(loaded, config, tokenizer, pinned):
        raise RecipeError(problems)
    return _Base(pinned, directory, config, tokenizer)


class _Rows(NamedTuple):
    """Pins and examples of each source. Where held-out rows are drawn, they have no sources of their own."""

    train: tuple[list[PinnedSource], list[Encoded]]
    holdout: tuple[list[PinnedSource], list[Encoded]]


def _read_rows(recipe: Recipe, encoding: Encoding, same: Plan | None, like: Plan | None) -> _Rows:
    """`same` is a plan with the same data, whose pins hold."""
    train = read(recipe.data.train, same.train if same else None, encoding, like)
    if not isinstance(recipe.data.holdout, list):
        return _Rows(train, ([], []))
    return _Rows(train, read(recipe.data.holdout, same.holdout if same else None, encoding, like))


def _selected(loaded: LoadedRecipe, rows: _Rows, held_out: HeldOut) -> tuple[Examples, Counts, Examples, Counts]:
    """Examples to train on and held-out ones, with what encoding found. DataError where a source has none to train on."""
    pins, encoded = rows.train
    train, counts = select(encoded, [pin.rows for pin in pins], held_out.untrained, is_kept=False)
    if isinstance(loaded.recipe.data.holdout, list):
        pins, encoded = rows.holdout
    holdout, holdout_counts = select(encoded, [pin.rows for pin in pins], held_out.evaluated, is_kept=True)
    if not all(train.sizes):
        raise DataError("no row is left to train on", where=loaded.file, hint="hold out fewer rows, or give more")
    return train, counts, holdout, holdout_counts


def _course(recipe: Recipe, sizes: tuple[int, ...], earlier: Plan | None) -> dict[str, object]:
    """The steps of a plan, those of its warm-up, and what a resume keeps of how the run came about."""
    orders, start = (earlier.earlier_orders, earlier.schedule_start) if earlier else ((), 0)
    steps = steps_of(recipe.train, order_of(recipe, sizes, orders))
    kept = {name: getattr(earlier, name) for name in KEPT} if earlier else {}
    return {"steps": steps, "warmup_steps": warmup_of(recipe, steps, start, orders), **kept}


def in_kernels(resolved: Resolved, took: Kernels) -> Resolved:
    """What is resolved, in these kernels. Fused ones keep less, so more fits a device."""
    resolved = replace(resolved, kernels=took)
    if took.parts is None:
        return resolved
    strategy, tokens = shared(resolved.plan, resolved.shape)
    return replace(resolved, strategy=strategy, micro_batch_tokens=tokens)


def _refuse_change(earlier: Plan, plan: Plan) -> None:
    # The id covers everything that decides what is trained, so equal ids need no further look.
    if earlier.plan_id == plan.plan_id:
        return
    old, new = earlier.model_dump(mode="json"), plan.model_dump(mode="json")
    changed = [
        f"{key}: {before} -> {after}" for key, before, after in differences(old, new) if not key.startswith("recipe.")
    ]
    # The digest of held-out rows follows from the other lines. Alone, it is all there is to say.
    changed = [line for line in changed if not line.startswith("held_out: ")] or changed
    raise RunError(
        "what the run trains on has changed since it was planned:\n  " + "\n  ".join(changed),
        hint="restore the old files, or train on the new ones in a branch: `finetune branch RUN@STEP`",
    )
