"""Floor 0. What will happen: a recipe with everything pinned and counted, frozen, hashed, and written to `plan.json`.

`resolve` makes a plan; everything above reads it. On resume the plan in the run directory is the authority.
"""

import json
from pathlib import Path

import blake3
from pydantic import BaseModel, ConfigDict

from finetune import schedule
from finetune.errors import RunError
from finetune.order import Order
from finetune.recipe.schema import Recipe

SCHEMA = 1
# Sections of the recipe that do not touch what is trained: they may differ from the plan on resume.
FREE_SECTIONS = ("evaluate", "checkpoint", "guard", "package", "publish")


class Pin(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PinnedBase(Pin):
    kind: str
    """`hub`, `directory` or `package`."""
    revision: str | None
    """The commit of a Hub checkpoint."""
    digest: str | None
    """`blake3:…` over the files of a local base."""


class PinnedSource(Pin):
    name: str
    revision: str | None
    fingerprint: str
    """`blake3:…` of the content."""
    rows: int


class Counts(Pin):
    """What encoding found in one set of rows."""

    rows: int
    examples: int
    tokens: int
    supervised_tokens: int
    cut_rows: int
    cut_tokens: int
    left_out_rows: int
    """Rows whose supervised tokens all lie beyond `max_length`: nothing could be learnt from them."""
    longest: int


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
    total_parameters: int
    trainable_parameters: int

    @property
    def plan_id(self) -> str:
        """Digest of all that decides what is trained; two plans with one id train the same."""
        # without defaults, so that a key that a later version adds does not change the id of an old plan
        facts = self.model_dump(mode="json", exclude_defaults=True)
        for section in FREE_SECTIONS:
            facts["recipe"].pop(section, None)
        facts["recipe"].get("train", {}).pop("micro_batch_tokens", None)
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return "blake3:" + blake3.blake3(canonical.encode()).hexdigest()

    @property
    def order(self) -> Order:
        sources = self.recipe.data.train
        weights = None if sources[0].weight is None else tuple(source.weight for source in sources)
        return Order(self.recipe.train.seed, self.recipe.train.batch_size, self.sizes, weights)

    def learning_rate(self, step: int) -> float:
        optimizer = self.recipe.optimizer
        return schedule.learning_rate(optimizer.learning_rate, optimizer.schedule, self.warmup_steps, self.steps, step)

    def dump(self, facts: dict) -> bytes:
        """`plan.json`: the plan, its id, and the recorded facts (versions, devices) of the run's start."""
        record = {"schema": SCHEMA, "plan_id": self.plan_id, **self.model_dump(mode="json"), "facts": facts}
        return (json.dumps(record, indent=1) + "\n").encode()


def load(run: Path) -> tuple[Plan, dict]:
    """The plan of a run, and the facts recorded beside it."""
    path = run / "plan.json"
    damaged_hint = "restore it from a copy, or start a new run"
    try:
        record = json.loads(path.read_bytes())
        schema = record.pop("schema")
        if schema > SCHEMA:
            raise RunError("was written by a newer version of finetune", where=str(path), hint="upgrade finetune")
        facts, plan_id = record.pop("facts"), record.pop("plan_id")
        plan = Plan.model_validate(record)
    except (FileNotFoundError, NotADirectoryError):
        hint = "start it with `finetune train`"
        raise RunError("is not a run directory: it has no plan.json", where=str(run), hint=hint) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # pydantic's errors are ValueErrors
        reason = str(error).partition("\n")[0]
        raise RunError(f"is damaged: {reason}", where=str(path), hint=damaged_hint) from None
    if plan.plan_id != plan_id:
        raise RunError(
            "does not have the content its plan_id stands for",
            where=str(path),
            hint="it was edited: restore it from a copy",
        )
    return plan, facts
