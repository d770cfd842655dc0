"""The section `data`: sources of rows, and the held-out ones."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from finetune.recipe import conditions
from finetune.recipe.schema.patterns import Pattern, PatternWithField
from finetune.recipe.schema.values import CountOrShare, Names, Section, Weight, listed

Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "text", "tokens"]


class Source(Section):
    """Rows of local files, or of a Hub data set."""

    path: str | None = Field(default=None, min_length=1)
    """A local file, a glob like `data/*.jsonl.gz`, or a folder, relative to the working directory. Formats: `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.arrow`, `.feather`, `.txt`, `.md`, `.markdown`, `.rst`; text formats also packed, as `.gz`, `.zst`, `.bz2` or `.xz`."""
    dataset: str | None = Field(default=None, min_length=1)
    """A Hub data set (`owner/name`), instead of `path`."""
    name: str | None = None
    """The configuration of a Hub data set, if it has several."""
    split: str | None = None
    """The split of a Hub data set. Default: `train`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set; the plan pins it to a commit."""
    files: Names = []
    """Files of a Hub data set to read, as names or globs like `[en/*.parquet]`, instead of its configuration."""
    weight: Weight | None = None
    """The source's part of the drawn rows, relative to the other sources' weights. Give all sources a weight, or none. Without weights you draw every row once an epoch. With `order: curriculum`, a list: a weight for each stage."""
    epochs: float | None = Field(default=None, gt=0)
    """How many times an epoch of the run draws the rows of this source, like `2` or `0.5`. Default: once. An epoch draws exactly that many; the next one goes on where it stopped."""
    columns: dict[str, str] = {}
    """The column of each field, as `field: column`. Chat reads `messages`, or `prompt` and `completion`, and `system` and `tools` if you have them. Text reads `text`."""
    format: Format = "auto"
    """The shape of the rows; `auto` decides by the first row, and `plan` shows the decision. Chat reads `messages`, `sharegpt`, `alpaca` and `prompt`. Text reads `text` and `tokens`."""
    prompt: Pattern | None = None
    """A pattern over columns, like `"{context}\\n\\n{question}"`: the prompt of each row. Goes with `completion`."""
    completion: PatternWithField | None = None
    """A pattern over columns, like `"{answers.text[0]}"`: the answer of each row."""
    text: PatternWithField | None = None
    """A pattern over columns, like `"# {title}\\n{body}"`: the text of each row, for the text task."""
    skip: Names = []
    """Columns and fields of messages to skip, like `[reasoning_content]`. If the template drops content of a chat row, the row is refused, unless you name the content here."""
    row: Literal["file", "paragraph", "line"] | None = None
    """What a row of text and Markdown files is. Paragraphs are separated by blank lines. Default: `file`."""
    where: str | None = Field(default=None, min_length=1)
    """Reads only rows for which this is true, like `language == en and meta.score >= 0.5`, by the file's own column names. Operators: `==`, `!=`, `<`, `<=`, `>`, `>=`, `in [...]`, joined by `and`."""
    take: int | None = Field(default=None, gt=0)
    """Reads only the first N rows, after `where`."""

    @property
    def stage_weights(self) -> tuple[float, ...]:
        """A weight for each stage of a curriculum; none without such a list."""
        return self.weight if isinstance(self.weight, tuple) else ()

    @property
    def place(self) -> str:
        """The file, or the data set."""
        return self.path or self.dataset or ""

    @field_validator("where")
    @classmethod
    def _is_condition(cls, where: str | None) -> str | None:
        if where is not None:
            conditions.parse(where)
        return where

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("needs either `path` or `dataset`")
        if self.path is not None and (self.name is not None or self.revision is not None or self.split is not None):
            raise ValueError("`name`, `split` and `revision` go with `dataset`, not with `path`")
        return self

    @model_validator(mode="after")
    def _one_reading(self) -> "Source":
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("`prompt` and `completion` go together")
        if self.prompt is not None and self.text is not None:
            raise ValueError("has both `prompt` and `text`; give one")
        if self.format != "auto" and (self.prompt is not None or self.text is not None):
            raise ValueError("a pattern says how rows are read, so `format` does not go with it")
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
    order: Literal["shuffled", "sequential", "curriculum"] = "shuffled"
    """`shuffled`: all sources mixed, each in an order of the seed. `sequential`: rows as in the files, one source after another; with weights or a temperature the sources are mixed. `curriculum`: one source after another, each shuffled; with a list of weights a source, that many stages of an epoch."""
    temperature: float = Field(default=1.0, gt=0)
    """Draws a source of n examples in proportion to n^(1/temperature): over 1, small sources come more often."""
    split_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Decides which rows a count or share holds out. Default: the seed of the run of `base.checkpoint`, or else 0."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What happens to a row that cannot be read, or does not fit. `stop` refuses the data. `skip` skips the row, and `plan` counts and lists such rows; more than half is refused."""
    seen: Literal["refuse", "allow"] = "refuse"
    """A count or share may hold out rows that an earlier run behind the base or branch trained on. `refuse` refuses such a plan. `allow` allows it, and marks its figures everywhere."""
    allow: Annotated[list[Gate], BeforeValidator(listed)] = []
    """What a new run may start with: `cut_rows` (over 5 % of the rows lose learnt tokens), `lost_text` (a template drops content of rows), `nothing_learnt` (rows without a learnt token), `seen_holdout` (held-out rows of named sources, or rows of an evaluation set, are trained on), `unlearnt_stop` (answers end without a stop token)."""


def has_holdout(data: Data) -> bool:
    return bool(data.holdout) and not (isinstance(data.holdout, str) and float(data.holdout[:-1]) == 0)


def is_drawn(data: Data) -> bool:
    """Whether held-out rows are drawn from the training sources."""
    return drawn_of(data) is not None


def drawn_of(data: Data) -> int | str | None:
    """The count or the share that is drawn from them; None where none is."""
    return data.holdout if not isinstance(data.holdout, list) and has_holdout(data) else None
