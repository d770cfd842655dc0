"""The records of a plan: the exact base, rows, earlier runs and origin of a run."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from finetune.plan.split import Seen, Split
from finetune.recipe.schema import Data


class Pin(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PinnedBase(Pin):
    kind: str
    """`hub`, `directory`, `package`, `gguf` (a file, local or on the Hub) or `adapter`; `config` where the weights are drawn at random."""
    revision: str | None
    """The commit of a Hub checkpoint."""
    digest: str | None
    """`blake3:…` over the files of a local base."""
    beneath: "PinnedBase | None" = None
    """The base of an adapter."""
    dequantized: str | None = None
    """How the files of a quantized base store weights. You train the numbers that they stand for, unless they are `stored`."""
    stored: Literal["nf4", "fp4", "int8"] | None = None
    """The bits of bitsandbytes in which they stay under an adapter, as they are in the files."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user of the base should know of it."""
        if self.dequantized is None:
            return ()
        told = f"its files are quantized ({self.dequantized})"
        if self.stored:
            return (f"{told}, and stay so under the adapter",)
        return (f"{told}; you train the numbers that they stand for, written once to the cache",)

    @model_serializer(mode="wrap")
    def _without_what_is_not(self, serialized: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Plans of other bases have no key for it, like those of older code."""
        facts: dict[str, object] = serialized(self)
        for name in ("dequantized", "stored"):
            if getattr(self, name) is None:
                facts.pop(name, None)
        return facts


class PinnedSource(Pin):
    name: str
    revision: str | None
    fingerprint: str
    """`blake3:…` of the content."""
    rows: int


class Counts(Pin):
    """Counts of one set of encoded rows."""

    rows: int
    examples: int
    tokens: int
    supervised_tokens: int
    cut_rows: int
    cut_tokens: int
    left_out_rows: int
    """Rows skipped because all their supervised tokens lie beyond `max_length`."""
    longest: int
    bad_rows: int = 0
    """Training rows skipped with `data.on_bad_row: skip`."""


class PinnedSet(Pin):
    """A named set of rows to evaluate, as it was when an attempt began."""

    name: str
    sources: tuple[PinnedSource, ...]
    counts: Counts
    contents: str
    """Digest of the content of its rows."""
    seen: tuple[Seen, ...] = ()
    """Rows of it that this run or an earlier one trains on."""


class Segment(Pin):
    """An earlier plan of an extended run: it holds for the steps recorded before, also if they run again."""

    until: int
    """The last of those steps."""
    plan_id: str
    steps: int
    warmup_steps: int
    schedule_start: int = 0


class Parent(Pin):
    """The checkpoint of another run at the start of a branch."""

    ref: str
    """`<name of the run>@<step>`."""
    run: str
    """The other run's id."""
    step: int
    digest: str | None
    """Of the checkpoint's manifest; None for the base, step 0."""
    plan_id: str
    changes: tuple[str, ...] = ()
    """A line for every changed recipe key, and for other changes."""


class EarlierOrder(Pin):
    """The seed and batch size for a branch's steps up to `until`, if the branch changed them."""

    until: int
    drawn: int
    """Examples drawn by these steps: the next step continues after them."""
    seed: int
    batch_size: int
    steps: int
    """Of the whole earlier plan; the learning rate covers the rest of its curve in the new steps."""


class Stage(Pin):
    """An earlier run that trained the weights, with the rows they know from there."""

    ref: str
    """`<name of the run>@<step>`."""
    task: str | None = None
    """None, like `data`, if the run's plan could not be found."""
    data: Data | None = None
    train: tuple[PinnedSource, ...] = ()
    seed: int = 0
    """`train.seed`: plans without a split drew their held-out rows by it."""
    row_rules: int = 1
    split: Split | None = None
