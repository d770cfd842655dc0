"""What a human writes: one frozen pydantic model a section, one docstring a key.

`load` checks a file against it, `finetune schema` writes it as JSON Schema, `docs/recipe.md` is generated from it.
Names of tasks, adapters and optimizers appear here as literals, so that a typo is answered without importing torch;
a test keeps them equal to the tables in `tasks/`, `model/adapter.py` and `model/optimizer/`.
"""

import re
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PositiveInt,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from finetune.recipe import rules


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Every(BaseModel):
    """A cadence: so many steps, or so many minutes."""

    model_config = ConfigDict(frozen=True)
    steps: int | None = None
    minutes: float | None = None

    def __str__(self) -> str:
        if self.steps:
            return f"{self.steps} step{'' if self.steps == 1 else 's'}"  # as it is read: without commas
        return f"{self.minutes:g} minute{'' if self.minutes == 1 else 's'}"


def _every(value: object) -> object:
    if isinstance(value, Every):
        return value
    match = re.fullmatch(r"(\d+) steps?|(\d+(?:\.\d+)?) minutes?", value) if isinstance(value, str) else None
    if not match or float(match[1] or match[2]) <= 0:
        raise ValueError("must be like `100 steps` or `15 minutes`")
    return Every(steps=int(match[1])) if match[1] else Every(minutes=float(match[2]))


def _every_steps(value: object) -> object:
    if isinstance(value, Every) and value.steps:
        return value
    match = re.fullmatch(r"(\d+) steps?", value) if isinstance(value, str) else None
    if not match or int(match[1]) <= 0:
        raise ValueError("must be like `100 steps`")
    return Every(steps=int(match[1]))


def _share(value: object) -> object:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    is_share = isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value)
    if not is_count and not is_share:
        raise ValueError("must be a count like `200` or a share like `3%`")
    if is_share and float(value[:-1]) > 100:
        raise ValueError("must be at most 100%")
    return value


def _auto_or_count(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError("must be `auto` or a count like `2048`")


def _pair(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError("must be two numbers like `[0.9, 0.999]`")
    return tuple(value)


def _hub_id(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(_HUB_ID, value):
        raise ValueError("must be like `owner/name`")
    return value


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) or value is None else [value]


_HUB_ID = r"[\w.-]+/[\w.-]+"
_EVERY_SCHEMA = {"type": "string", "pattern": r"^[0-9.]+ (steps?|minutes?)$"}
Cadence = Annotated[Every, BeforeValidator(_every), PlainSerializer(str), WithJsonSchema(_EVERY_SCHEMA)]
StepCadence = Annotated[
    Every,
    BeforeValidator(_every_steps),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "pattern": r"^\d+ steps?$"}),
]
CountOrShare = Annotated[
    int | str,
    BeforeValidator(_share),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\d+(\.\d+)?%$"}]}),
]
AutoOrCount = Annotated[
    int | Literal["auto"],
    BeforeValidator(_auto_or_count),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
]
Beta = Annotated[float, Field(ge=0, lt=1)]
HubId = Annotated[str, BeforeValidator(_hub_id), WithJsonSchema({"type": "string", "pattern": f"^{_HUB_ID}$"})]


def is_drawn(data: "Data") -> bool:
    """Whether held-out rows are drawn from the training sources."""
    return not isinstance(data.holdout, list) and rules.has_holdout(data)


def count_of(value: int | str, total: int) -> int:
    """A count or a share like "3%" as a count of `total`; a share is rounded to the nearest whole."""
    return value if isinstance(value, int) else round(float(value[:-1]) / 100 * total)


class Base(Section):
    """The checkpoint that training starts from."""

    checkpoint: str = Field(min_length=1)
    """A Hub id (`owner/name`), a directory (of transformers, Trainer or peft), a run's checkpoint (`runs/a@best`), or `package:NAME/file.gguf` inside an installed Python package. An adapter is merged onto the base that it names."""
    revision: str | None = None
    """Branch, tag or commit of a Hub checkpoint; the plan pins it to a commit. Default: the main branch."""
    origin: HubId | None = None
    """The Hub checkpoint that a local base is equal to (`owner/name`); with it an adapter of a local base can be published."""
    quantization: Literal["nf4"] | None = None
    """`nf4`: frozen linear layers in 4 bits beneath a LoRA adapter (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). An eighth of their fp32 memory; every product dequantizes first, and what is packaged lies on the unquantized base. Needs bitsandbytes."""


class ChatTask(Section):
    """Conversations; the loss is on assistant tokens only."""

    name: Literal["chat"]
    max_length: PositiveInt = 1024
    """Tokens of the longest example; longer rows are cut, and `plan` says how many and by how much."""
    packing: bool = True
    """Several rows in one sequence, kept apart exactly; changes speed, not the loss."""
    template: str | None = None
    """A file with a chat template (Jinja) to use in place of the base's own."""


class TextTask(Section):
    """Plain text (continued pretraining); the loss is on every token. Long rows become several examples."""

    name: Literal["text"]
    max_length: PositiveInt = 1024
    """Tokens of the longest example; longer rows are divided, nothing is lost."""
    packing: bool = True
    """Several rows in one sequence, kept apart exactly; changes speed, not the loss."""


class Source(Section):
    """Rows of a local file, or of a Hub data set."""

    path: str | None = Field(default=None, min_length=1)
    """A local `.jsonl`, `.parquet` or `.csv` file, seen from the working directory."""
    dataset: str | None = Field(default=None, min_length=1)
    """A Hub data set (`owner/name`), instead of `path`."""
    name: str | None = None
    """The configuration of a Hub data set, where it has several."""
    split: str | None = None
    """The split of a Hub data set. Default: `train`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set; the plan pins it to a commit."""
    weight: float | None = Field(default=None, gt=0)
    """The source's part of the rows drawn, relative to the other sources' weights. Give all sources one, or none: then every row is drawn once an epoch."""
    columns: dict[str, str] = {}
    """Which column holds which field, as `field: column`. Chat reads `messages`, or `prompt` and `completion`, and `system` and `tools` where they are; text reads `text`."""
    skip: Annotated[list[str], BeforeValidator(_listed)] = []
    """Columns, and fields of messages, to train without, like `[reasoning_content]`. A row of chat with content that its text would lack is refused unless that is named here."""

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


class Data(Section):
    """What is trained on, and what is held out."""

    train: list[Source] = Field(min_length=1)
    """The sources of training rows."""
    holdout: Holdout = 0
    """Rows kept out of training for evaluation: a count, a share like `5%` (each row of the training sources by its content and `split_seed`), or other sources."""
    split_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Decides which rows a count or share holds out. Default: that of the run which `base.checkpoint` is of, else 0."""
    seen: Literal["refuse", "allow"] = "refuse"
    """What happens when a count or share holds out rows that an earlier run trained on, which the base or a branch comes from: `refuse` the plan, or `allow` it, marked wherever the figures appear."""


class LoraAdapter(Section):
    """Low-rank matrices beside frozen linear layers (Hu et al. 2021, arXiv 2106.09685)."""

    name: Literal["lora"]
    rank: PositiveInt = 16
    """Rank of the added matrices."""
    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the first added matrix."""
    targets: Annotated[list[str], BeforeValidator(_listed)] = ["all-linear"]
    """Which linear layers get matrices: `all-linear` (all but the output head), or names like `q_proj`."""


class FrozenAdapter(Section):
    """A full fine-tune with some tensors left as they are."""

    name: Literal["frozen"]
    freeze: Annotated[list[str], BeforeValidator(_listed)] = Field(min_length=1)
    """Patterns of parameter names that do not change, like `model.embed_tokens.*` (`*` matches any characters)."""


class Optimizer(Section):
    """How gradients become updates."""

    name: Literal["adamw", "sgd", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """`adamw` (Loshchilov & Hutter 2019, arXiv 1711.05101) or `sgd`. `adamw_8bit` (Dettmers et al. 2021, arXiv 2110.02861) holds the moments of matrices in a quarter of the memory, with other losses than `adamw`; `paged_adamw_8bit` lets a GPU move them to the host when it is full, which is slow when it happens. Both need bitsandbytes."""
    learning_rate: float = Field(gt=0, lt=10)
    """The peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """The learning rate's course after warm-up; `linear` and `cosine` end at zero."""
    warmup: CountOrShare = "3%"
    """Steps, or the share of all steps, in which the learning rate rises from zero."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay, on matrices only (not on biases and norms); decoupled from the gradient for `adamw`."""
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_pair)] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's term against division by zero."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum of `sgd`."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""


class Train(Section):
    """How long, how much at once, and with what arithmetic."""

    epochs: PositiveInt | None = None
    """Passes over the training rows. Give this or `steps`."""
    steps: PositiveInt | None = None
    """Updates. Give this or `epochs`."""
    batch_size: PositiveInt = 32
    """Examples an update, over all devices."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides order, initial adapter weights and dropout, together with the step."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16`: matrix products in bfloat16; `fp32`: all in single precision."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """`fp32`: master weights; `bf16`: weights and gradients in half the memory, moments in fp32, and every update rounded up or down by chance, so that small ones add up: noisier than `fp32`. Matrices of an adapter stay in fp32."""
    micro_batch_tokens: AutoOrCount = "auto"
    """Tokens of one forward on one device. `auto`: the longest example, doubled while a step has more tokens and the forecast stays within nine tenths of the device's memory; on a CPU up to 2,048, as more is no faster there. Decided once a run, and kept when it is resumed."""
    activation_checkpointing: bool = False
    """Keep only the input of each decoder layer for the backward pass and compute the rest again: the same bits, far fewer activations, about a third more time."""
    compile: bool = False
    """Compile the decoder layers with `torch.compile`: what that gains is unmeasured; it costs a compilation at every start, and needs a C++ compiler and `reproducibility: fast`, as kernels depend on which lengths came first."""
    reproducibility: Literal["exact", "fast"] = "exact"
    """`exact`: deterministic kernels, so that resume and replay are equal to the bit (slower on a GPU); `fast`: whatever is fastest."""

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("has both `epochs` and `steps`; give one")
        return self


class Evaluate(Section):
    """When the held-out rows are evaluated; always before the first and after the last step."""

    every: StepCadence | None = None
    """Evaluate every so many steps."""


class Keep(Section):
    """Which checkpoints stay; the newest and the best always do."""

    last: PositiveInt = 2
    """The newest so many."""
    best: PositiveInt | None = None
    """The so many with the lowest held-out loss; every checkpoint is then evaluated at its own step."""
    every: StepCadence | None = None
    """Those at multiples of so many steps, for good; they are committed whatever `checkpoint.every` says."""
    weights_every: StepCadence | None = None
    """Those at multiples of so many steps as weights alone, for good: a third of the bytes of a full fine-tune's; they can be evaluated, compared and packaged, but not resumed from."""


class Checkpoint(Section):
    """When the state is committed to disk; always at the end and on SIGTERM, SIGINT or SIGHUP."""

    every: Annotated[list[Cadence], BeforeValidator(_listed)] = Field(
        default=[Every(minutes=15.0)], validate_default=True
    )
    """One cadence or several, like `[100 steps, 15 minutes]`."""
    save_best: bool = True
    """Also commit every step whose held-out loss is the lowest so far, whatever `every` says (with `keep.best: N`, one of the N lowest). `false`: a better evaluation between two commits is not kept."""
    keep: Keep = Keep()
    """Which checkpoints stay."""
    grace_seconds: PositiveInt = 120
    """So long `finetune launch` waits for the last commit after a signal, before it kills."""


class Guard(Section):
    """What happens when the figures go wrong. The update waits for the verdict, so what is refused never reaches the weights."""

    spike: Literal["ignore", "warn", "skip", "rollback", "stop"] = "warn"
    """A loss or gradient norm far above the last 128 steps: `warn` says so; `skip` leaves the update out; `rollback` goes back to the last checkpoint before `span` and leaves all updates of that span out; `stop` commits the state before the step and ends the run."""
    not_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient norm that is not a number: `stop` commits the state before the step and ends the run, `skip` leaves the update out."""
    span: PositiveInt = 1
    """So many steps, the one with the spike and those before it, are left out by a rollback."""
    limit: PositiveInt = 10
    """So often steps may be left out; the next time ends the run."""


class Package(Section):
    """What `finetune package` writes."""

    form: Literal["merged", "adapter"] = "merged"
    """Whole weights, or the adapter alone."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Type of the packaged weights. Default: `train.precision`."""
    max_shard_bytes: PositiveInt = 5_000_000_000
    """Weights over this size are divided into several files."""
    license: str | None = None
    """The licence of the package, by its id on the Hub (`apache-2.0`, `other`). Default: the base's. One that the base's licence does not allow is refused."""
    license_name: str | None = None
    """The name of the licence `other`."""
    license_link: str | None = None
    """Where the text of the licence `other` is."""


class Publish(Section):
    """Where the package goes."""

    repo: HubId
    """The Hub repository, `owner/name`."""
    private: bool = True
    """Whether the repository is private: one that is there and public is refused."""
    milestones: StepCadence | None = None
    """Also publish the checkpoints at multiples of so many steps, while the training goes on, each on a branch `step-00000500`."""


class Recipe(Section):
    """A fine-tuning run, declared."""

    base: Base
    task: Annotated[ChatTask | TextTask, Field(discriminator="name")]
    data: Data
    adapter: Annotated[LoraAdapter | FrozenAdapter, Field(discriminator="name")] | None = None
    """Leave out to train every weight."""
    optimizer: Optimizer
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    package: Package = Package()
    publish: Publish | None = None

    @field_validator("*")
    @classmethod
    def _collect(cls, section: object, info: ValidationInfo) -> object:
        """Shows the caller's context each section that is right, so that `load` can ask the rules beside a broken one."""
        if info.context is not None and info.field_name is not None:
            info.context[info.field_name] = section
        return section

    @model_validator(mode="after")
    def _fit_together(self) -> "Recipe":
        problems = rules.problems(dict(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self
