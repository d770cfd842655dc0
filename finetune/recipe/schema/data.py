"""The section `data`: sources of rows, and the held-out ones."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from finetune.recipe.schema.values import CountOrShare, Names, Section, listed


class Source(Section):
    """Rows of a local file, or of a Hub data set."""

    path: str | None = Field(default=None, min_length=1)
    """A local `.jsonl`, `.parquet` or `.csv` file, relative to the working directory."""
    dataset: str | None = Field(default=None, min_length=1)
    """A Hub data set (`owner/name`), instead of `path`."""
    name: str | None = None
    """The configuration of a Hub data set, if it has several."""
    split: str | None = None
    """The split of a Hub data set. Default: `train`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set; the plan pins it to a commit."""
    weight: float | None = Field(default=None, gt=0)
    """The source's part of the drawn rows, relative to the other sources' weights. Give all sources a weight, or none. Without weights you draw every row once an epoch."""
    columns: dict[str, str] = {}
    """The column of each field, as `field: column`. Chat reads `messages`, or `prompt` and `completion`, and `system` and `tools` if you have them. Text reads `text`."""
    skip: Names = []
    """Columns and fields of messages to skip, like `[reasoning_content]`. If the template drops content of a chat row, the row is refused, unless you name the content here."""

    @property
    def place(self) -> str:
        """The file, or the data set."""
        return self.path or self.dataset or ""

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("needs either `path` or `dataset`")
        if self.path is not None and (self.name is not None or self.revision is not None or self.split is not None):
            raise ValueError("`name`, `split` and `revision` go with `dataset`, not with `path`")
        return self


Sources = Annotated[list[Source], Tag("sources")]
Holdout = Annotated[
    Annotated[CountOrShare, Tag("count")] | Sources,
    Discriminator(lambda value: "sources" if isinstance(value, list) else "count"),
]


Gate = Literal["cut_rows", "lost_text", "nothing_learnt", "seen_holdout", "unlearnt_stop"]


class Data(Section):
    """The rows you train on, and the held-out rows."""

    train: list[Source] = Field(min_length=1)
    """The sources of training rows."""
    holdout: Holdout = 0
    """Rows kept out of training for evaluation: a count, a share like `5%` (each row of the training sources by its content and `split_seed`), or other sources."""
    split_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Decides which rows a count or share holds out. Default: the seed of the run of `base.checkpoint`, or else 0."""
    seen: Literal["refuse", "allow"] = "refuse"
    """A count or share may hold out rows that an earlier run behind the base or branch trained on. `refuse` refuses such a plan. `allow` allows it, and marks its figures everywhere."""
    allow: Annotated[list[Gate], BeforeValidator(listed)] = []
    """What a new run may start with: `cut_rows` (over 5 % of the rows lose learnt tokens), `lost_text` (a template drops content of rows), `nothing_learnt` (rows without a learnt token), `seen_holdout` (held-out rows of named sources are trained on), `unlearnt_stop` (answers end without a stop token)."""


def has_holdout(data: Data) -> bool:
    return bool(data.holdout) and not (isinstance(data.holdout, str) and float(data.holdout[:-1]) == 0)


def is_drawn(data: Data) -> bool:
    """Whether held-out rows are drawn from the training sources."""
    return drawn_of(data) is not None


def drawn_of(data: Data) -> int | str | None:
    """The count or the share that is drawn from them; None where none is."""
    return data.holdout if not isinstance(data.holdout, list) and has_holdout(data) else None
