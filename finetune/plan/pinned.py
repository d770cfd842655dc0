"""The records of a plan: the exact base, rows, earlier runs and origin of a run."""

from pydantic import BaseModel, ConfigDict

from finetune.plan.split import Split
from finetune.recipe.schema import Data


class Pin(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PinnedBase(Pin):
    kind: str
    """`hub`, `directory`, `package` or `adapter`."""
    revision: str | None
    """The commit of a Hub checkpoint."""
    digest: str | None
    """`blake3:…` over the files of a local base."""
    beneath: "PinnedBase | None" = None
    """What an adapter is merged onto."""


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


class Segment(Pin):
    """An earlier plan of a run that was extended: it holds for the steps that were recorded before, also when they run again."""

    until: int
    """The last of those steps."""
    plan_id: str
    steps: int
    warmup_steps: int
    schedule_start: int = 0


class Parent(Pin):
    """The checkpoint of another run that a branch begins with."""

    ref: str
    """`<name of the run>@<step>`."""
    run: str
    """The other run's id."""
    step: int
    digest: str | None
    """Of the checkpoint's manifest; None for the base, step 0."""
    plan_id: str
    changes: tuple[str, ...] = ()
    """A line for every key of the recipe that is another one, and for what else was changed."""


class EarlierOrder(Pin):
    """What chose the examples of a branch's steps up to `until`, where the branch changed it."""

    until: int
    drawn: int
    """Examples that these steps drew: the next step goes on after them."""
    seed: int
    batch_size: int
    steps: int
    """Of the whole plan that was left; the learning rate keeps its course over what was left of it."""


class Stage(Pin):
    """Another run whose training the weights went through before this one's: which rows they know from there."""

    ref: str
    """`<name of the run>@<step>`."""
    task: str | None = None
    """None, like `data`, where the run's plan could not be found."""
    data: Data | None = None
    train: tuple[PinnedSource, ...] = ()
    seed: int = 0
    """`train.seed`, by which plans without a split drew their held-out rows."""
    row_rules: int = 1
    split: Split | None = None
