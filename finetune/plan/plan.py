"""The plan: a recipe with everything pinned and counted, frozen, hashed, and written to `plan.json`.

On resume, the plan in the run directory is the authority.
"""

import json
from collections.abc import Sequence
from functools import partial

import blake3
import numpy as np

from finetune.plan import schedules
from finetune.plan.curve import on_curve, warmup_of
from finetune.plan.facts import Extension, Facts
from finetune.plan.mixture import stretches_of
from finetune.plan.pinned import Counts, EarlierOrder, Parent, Pin, PinnedBase, PinnedSet, PinnedSource, Segment, Stage
from finetune.plan.row_order import Order
from finetune.plan.split import Seen, Split
from finetune.recipe.resume_rules import binding
from finetune.recipe.schema import Recipe, Train, amount_of

SCHEMA = 1
ROW_RULES = 2
"""The row rules of a new run: 1 trained on whatever a template kept of a row, 2 refuses a row that would lose something."""


# Fields that `plan.json` has only where they say something: of extended runs, branches, and newer code.
OPTIONAL = (
    *("schedule_start", "segments", "parent", "earlier_orders", "skipped_rows", "skipped_examples", "date"),
    *("split", "held_out", "seen", "arranged", "pads_least", "reaches_all", "text_of", "parameters_beside_text"),
    *("sets", "active_parameters", "gpu_sums"),
)


class Plan(Pin):
    recipe: Recipe
    base: PinnedBase
    train: tuple[PinnedSource, ...]
    holdout: tuple[PinnedSource, ...]
    """Sources of their own; empty when the held-out rows are drawn from the training sources."""
    encoding: str
    """Digest of tokenizer, template and task settings."""
    counts: Counts
    holdout_counts: Counts
    sizes: tuple[int, ...]
    """Training examples of each source."""
    steps: int
    warmup_steps: int
    """Of the last curve of the learning rate, after the segments."""
    total_parameters: int
    trainable_parameters: int
    schedule_start: int = 0
    """That curve begins after this step."""
    segments: tuple[Segment, ...] = ()
    """Earlier plans of the run, oldest first; empty unless it was extended."""
    parent: Parent | None = None
    """The origin of a branch; its first step is the next one."""
    earlier_orders: tuple[EarlierOrder, ...] = ()
    """Oldest first; empty unless a branch changed its seed or batch size after a step."""
    skipped_rows: tuple[int, ...] = ()
    """Rows that a branch skips ..."""
    skipped_examples: tuple[int, ...] = ()
    """... and their examples."""
    date: str | None = None
    """The day for a chat template that prints one (YYYY-MM-DD). Older plans have none."""
    row_rules: int = 1
    """See `ROW_RULES`: a run keeps its first ones."""
    split: Split | None = None
    """The rule of held-out rows in the training sources. None: separate sources, no rows, or rows drawn by an older version, by
    position and `train.seed`."""
    held_out: str = ""
    """Digest of the content of the held-out rows."""
    stages: tuple[Stage, ...] | None = None
    """The runs that trained the base or the parent of a branch, the last one first. None: an older version did not record them."""
    seen: tuple[Seen, ...] = ()
    """Held-out rows that these, or the run itself, train on."""
    sets: tuple[PinnedSet, ...] = ()
    """The evaluation sets of the recipe. They bind no run, and a resume may change them."""
    arranged: str | None = None
    """The arrangement of rows (`padded`, `alone`), if it differs from the recipe's because the base cannot pack them."""
    pads_least: bool = False
    """Whether padded rows are grouped for least padding; runs of older code filled their micro-batches. Groups, like their size, bind no run."""
    reaches_all: bool = False
    """Whether the adapter reaches what its recipe names, if older code reached something else: of runs of that code it is false."""
    keeps_fp32: bool = False
    """Whether tensors in fp32 beside bf16 weights of the base stay in fp32; runs of older code rounded them."""
    text_of: str | None = None
    """The class of a base that also reads images or sound: its text side is trained. Runs of older code train all of a causal LM."""
    parameters_beside_text: int = 0
    """The parameters of that class that are not of its text side: they stay as in the base, to the byte."""
    active_parameters: int = 0
    """Parameters that a token uses, with the adapter's; 0 where it uses all, and in plans of older code. It decides nothing."""
    gpu_sums: bool = False
    """Whether sums are taken as a GPU takes them fastest, which rounds otherwise: of a plan made on a GPU. Runs of older code took them as
    on a CPU."""

    @property
    def plan_id(self) -> str:
        """Digest of everything that decides the training; two plans with one id train the same."""
        # without defaults, so a key added later does not change the id of an old plan
        facts = self.model_dump(mode="json", exclude_defaults=True)
        facts["recipe"] = binding(facts["recipe"])
        # the first two are about other runs
        for name in ("stages", "seen", "sets", "pads_least", "active_parameters"):
            facts.pop(name, None)
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return "blake3:" + blake3.blake3(canonical.encode()).hexdigest()

    @property
    def arrangement(self) -> str:
        """The arrangement of rows: `packed` in one sequence, `padded` to one length, or each `alone`."""
        return self.arranged or ("packed" if self.recipe.task.packing else "padded")

    @property
    def quantization(self) -> str | None:
        """How frozen linear layers are quantized in the training: as the base's files store them, or while these are read."""
        asked = self.recipe.base.quantization
        return self.base.stored or (asked if asked in ("nf4", "int8") else None)

    @property
    def plan_ids(self) -> frozenset[str]:
        """The plan ids that checkpoints of the run may have: this one, and those before each extension."""
        return frozenset({self.plan_id, *(segment.plan_id for segment in self.segments)})

    @property
    def extension(self) -> Extension | None:
        """None if it never was."""
        if not self.segments:
            return None
        last = self.segments[-1]
        return {
            "step": last.until,
            "steps": [last.steps, self.steps],
            "schedule": "continue" if self.schedule_start == last.schedule_start else "restart",
            "plan_id": self.plan_id,
        }

    @property
    def kept_rule(self) -> str | None:
        """The run whose rule for held-out rows this one keeps."""
        return next((stage.ref for stage in self.stages or () if self.split and stage.split == self.split), None)

    @property
    def seen_told(self) -> list[str]:
        """A line for each run that trained on held-out rows, or may have."""
        return [item.told(self.holdout_counts.rows) for item in self.seen]

    @property
    def order(self) -> Order:
        return order_of(self.recipe, self.sizes, self.earlier_orders)

    def examples_of(self, step: int) -> np.ndarray:
        """Example ids (int64) of update `step`. If all are to be skipped, the step keeps them, and is not made (`is_left_out`)."""
        ids = self.order.examples_of(step)
        if not self.skipped_examples:
            return ids
        kept = ids[~np.isin(ids, self.skipped_examples)]
        return kept if len(kept) else ids

    def is_left_out(self, step: int) -> bool:
        """Whether all examples of a step are skipped."""
        return bool(self.skipped_examples) and bool(np.isin(self.order.examples_of(step), self.skipped_examples).all())

    def learning_rate(self, step: int) -> float:
        optimizer = self.recipe.optimizer
        segment = next((segment for segment in self.segments if step <= segment.until), None)
        curve = segment or self
        changes = [each for each in self.earlier_orders if segment is None or each.until < segment.until]
        at, length = on_curve(step, curve.steps, changes, curve.schedule_start)
        start = curve.schedule_start
        peak, schedule, own = optimizer.learning_rate, optimizer.schedule, optimizer.schedule_settings
        floor, warmup = amount_of(optimizer.min_learning_rate, peak), curve.warmup_steps
        return schedules.learning_rate(
            peak, schedule, warmup, length - start, at - start, min_learning_rate=floor, **own
        )

    def extended(self, train: Train, recorded: int, schedule: str) -> "Plan":
        """This plan with the length in `train`. The first `recorded` steps keep their learning rates forever.

        `continue` stretches the curve of the learning rate to the new end and continues there; `restart` begins
        another one, warm-up included, with the first unrecorded step. Rows do not depend on the length.
        """
        earlier = Segment(
            until=recorded,
            plan_id=self.plan_id,
            steps=self.steps,
            warmup_steps=self.warmup_steps,
            schedule_start=self.schedule_start,
        )
        start = recorded if schedule == "restart" else self.schedule_start
        steps = steps_of(train, self.order)
        return self.model_copy(
            update={
                "recipe": self.recipe.model_copy(update={"train": train}),
                "steps": steps,
                "warmup_steps": warmup_of(self.recipe, steps, start, self.earlier_orders),
                "schedule_start": start,
                "segments": (*self.segments, earlier),
            }
        )

    def dump(self, facts: Facts) -> bytes:
        """`plan.json`: the plan, its id, and the recorded facts (versions, devices) of the run's start."""
        unused = {name for name in OPTIONAL if not getattr(self, name)}
        unused |= {"stages"} if self.stages is None else set()
        fields = self.model_dump(mode="json", exclude=unused)
        record = {"schema": SCHEMA, "plan_id": self.plan_id, **fields, "facts": facts}
        return (json.dumps(record, indent=1) + "\n").encode()


def order_of(recipe: Recipe, sizes: tuple[int, ...], earlier: Sequence[EarlierOrder] = ()) -> Order:
    """The order of a recipe's examples, after the earlier orders of branches."""
    stretches = stretches_of(recipe.data, sizes)
    given = [source.weight for source in recipe.data.train if isinstance(source.weight, float)]  # of all, or of none
    weights = tuple(given) if given and not stretches else None
    mixed = partial(
        Order, sizes=sizes, weights=weights, stretches=stretches, is_shuffled=recipe.data.order != "sequential"
    )
    begins = [(each.until, each.drawn) for each in earlier]
    (seed, batch_size), *later = [
        *((each.seed, each.batch_size) for each in earlier),
        (recipe.train.seed, recipe.train.batch_size),
    ]
    order = mixed(seed, batch_size)
    for (seed, batch_size), (until, start) in zip(later, begins, strict=True):
        order = mixed(seed, batch_size, before=order, until=until, start=start)
    return order


def steps_of(train: Train, order: Order) -> int:
    """Number of updates; none crosses the end of an epoch."""
    return train.steps or order.last_step_of(train.epochs or 0)


def are_same_rows(one: Plan, two: Plan) -> bool:
    """Whether the held-out figures of both are about the same examples."""
    if (one.encoding, one.holdout_counts) != (two.encoding, two.holdout_counts):
        return False
    if one.held_out and two.held_out:
        return one.held_out == two.held_out
    if isinstance(one.recipe.data.holdout, list):
        return one.holdout == two.holdout
    # a list has rows of the other's, an older version's run: as many are all of them
    if any(plan.split and plan.split.contents for plan in (one, two)):
        return one.split is None or two.split is None
    drawn = [(plan.train, plan.recipe.train.seed, plan.recipe.data.holdout, plan.split) for plan in (one, two)]
    return drawn[0] == drawn[1]
