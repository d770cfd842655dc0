"""The sections `train`, `checkpoint` and `guard`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from finetune.recipe.schema.evaluation import HELD_OUT
from finetune.recipe.schema.values import AutoOrCount, Cadences, Every, RouterLoss, Section, Short, StepCadence

DECAY = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}


class Judged(Section):
    """A held-out figure that decides something."""

    metric: str = Field(default="loss", min_length=1)
    """The held-out figure that decides: `loss`, another figure of the task, or one of an evaluation set, like `docs/loss`. It must be one that training computes."""
    better: Literal["lower", "higher"] | None = None
    """Which way is better. Default: `lower` for losses and perplexities, else `higher`."""

    @property
    def is_lower(self) -> bool:
        return self.better == "lower" if self.better else self.metric.endswith(("loss", "perplexity"))

    @property
    def parts(self) -> tuple[str, str]:
        """The set of rows, and its figure."""
        rows, _, figure = self.metric.rpartition("/")
        return rows or HELD_OUT, figure

    @property
    def measure(self) -> str:
        """The results of rows that it is made of: a perplexity orders checkpoints as its loss does."""
        return "loss" if self.parts[1] == "perplexity" else self.parts[1]


class EarlyStopping(Judged):
    """Ends the run before its last step, once evaluations at `evaluate.every` show no improvement."""

    patience: PositiveInt = 3
    """The run ends if none of the last N evaluations is better than the best one before them, by a paired test over the rows."""


class Ema(Section):
    """An exponential moving average of the trained weights, in fp32 beside them."""

    decay: float = Field(gt=0, lt=1)
    """The part of the average that stays at each of its updates. It reaches back about 1 / (1 - decay) of them."""
    every: PositiveInt = 1
    """Update the average every N steps."""


def _ema(value: object) -> object:
    return {"decay": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


class Train(Section):
    """The length of the run, the size of a step, and its arithmetic."""

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
    """`fp32`: master weights; `bf16`: weights and gradients in half the memory, moments in fp32, and stochastic rounding of every update, so that small ones add up: noisier than `fp32`. Matrices of an adapter stay in fp32. Default: `fp32`; under an adapter `bf16`, if you plan on a GPU and `precision` is `bf16`. A run keeps what it began with."""
    router_loss: RouterLoss = "off"
    """The weight of the loss that balances experts, as the base's family defines it: a number, `base` for the `router_aux_loss_coef` of its config, or `off`. It is the mean over the tokens of a step of what their micro-batch gives; the loss in the journal and the held-out loss are without it."""
    micro_batch_tokens: AutoOrCount = "auto"
    """Tokens of one forward on one device. `auto`: the longest example, doubled while a step has more tokens and the forecast stays within nine tenths of the device's memory; on a CPU up to 2,048, because more is no faster there. Decided once a run, and kept on resume."""
    activation_checkpointing: bool = False
    """Keep only the input of each decoder layer for the backward pass, and compute the rest again. You get the same bits, far fewer activations, and about a third more time."""
    activation_offload: bool = False
    """Keep the inputs of decoder layers in the host's page-locked memory, and not in that of the GPU. Needs `activation_checkpointing`. You get the same bits, and wait for the copies. On a CPU it changes nothing."""
    mlp_chunk_tokens: PositiveInt | None = None
    """Run the feed-forward of each decoder layer on at most this many tokens at a time, and compute each piece again in the backward pass. For rows of tens of thousands of tokens, together with `activation_checkpointing`. Experts stay whole. Default: all tokens at once."""
    compile: bool = False
    """Compile norms and feed-forwards of decoder layers with `torch.compile`. The gain is unmeasured. You pay a compilation at every start. It needs a C++ compiler and, unless `reproducibility` is `fast`, packed rows: micro-batches are then filled up to fixed lengths, so that kernels do not depend on the order of lengths."""
    kernels: Literal["auto", "plain", "fused"] = "auto"
    """The code of norms, rotary positions and gated feed-forwards. `fused`: a kernel of `liger-kernel` for each (`pip install 'finetune[kernels]'`), which needs a CUDA device. `plain`: the model's own. `auto`: `fused` on a CUDA device if the package is there and a trial finds the same numbers; decided once a run, and kept on resume. Fused kernels give equal bits on resume and replay, but not those of plain ones."""
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How devices share the work. `ddp`: each holds the whole model. `fsdp`: each holds its rows of all weights, gradients and moments, and a layer is whole only while it runs. `hsdp`: so do the devices of a host, and each host holds all rows. `auto`: `fsdp` if the forecast for a whole model is more than nine tenths of a device's memory."""
    ema: Annotated[Ema, BeforeValidator(_ema), Short(DECAY)] | None = None
    """Keep an exponential moving average of the trained weights. A number is its `decay`. Checkpoints hold it as `ema.safetensors`, and evaluations give its figures as `ema_loss` and so on."""
    early_stopping: EarlyStopping | None = None
    """Without this section the run goes to its last step."""
    reproducibility: Literal["exact", "elastic", "fast"] = "exact"
    """`exact`: deterministic kernels, so resume and replay are equal to the bit (slower on a GPU). `elastic`: also at another number of processes. They then exchange gradients with every micro-batch, which suits adapters. `fast`: the fastest kernels."""

    @property
    def has_fixed_lengths(self) -> bool:
        """Whether micro-batches are filled up, so that each length is compiled for itself. With `fast`, lengths share code that depends on
        which of them came first."""
        return self.compile and self.reproducibility != "fast"

    @model_validator(mode="after")
    def _one_length(self) -> "Train":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("has both `epochs` and `steps`; give one")
        return self


class Best(Judged):
    """How the best checkpoints are chosen, and how many of them stay. `@best` names one of them. A count is short for `{count: N}`."""

    count: PositiveInt = 1
    """How many to keep."""


def _best(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return {"count": value}
    if isinstance(value, dict | Best) or value is None:
        return value
    raise ValueError("must be a count like `1`, or a section like `{count: 1, metric: accuracy}`")


class KeepWhole(Section):
    """The checkpoints to keep. The newest and the best always stay."""

    last: PositiveInt = 2
    """Keep the newest N checkpoints."""
    best: Annotated[Best | None, BeforeValidator(_best), Short({"type": "integer", "exclusiveMinimum": 0})] = None
    """Keep the N checkpoints with the lowest held-out loss, or the best of another figure."""
    every: StepCadence | None = None
    """Keep every multiple of N steps for good."""

    @property
    def chosen_by(self) -> Best:
        return self.best or Best()


class Keep(KeepWhole):
    """The checkpoints to keep. The newest and the best always stay."""

    best: Annotated[Best | None, BeforeValidator(_best), Short({"type": "integer", "exclusiveMinimum": 0})] = None
    """Keep the N checkpoints with the lowest held-out loss, or the best of another figure. Every checkpoint is then evaluated at its step."""
    every: StepCadence | None = None
    """Keep every multiple of N steps for good. These are committed whatever `checkpoint.every` says."""
    weights_every: StepCadence | None = None
    """Keep every multiple of N steps for good, as weights alone: a third of the bytes of a full fine-tune's. You can evaluate, compare and package them, but not resume from them."""


class Checkpoint(Section):
    """When to commit the state to disk. This always happens at the end and on SIGTERM, SIGINT or SIGHUP."""

    every: Cadences = Field(default=[Every(minutes=15.0)], validate_default=True)
    """One cadence or several, like `[100 steps, 15 minutes]`."""
    save_best: bool = True
    """Also commit every step with the lowest held-out loss so far, whatever `every` says (with `keep.best: N`, one of the N lowest). With `false` you lose a better evaluation between two commits."""
    keep: Keep = Keep()
    """The checkpoints to keep."""
    grace_seconds: PositiveInt = 120
    """Seconds that `finetune launch` waits for the final commit after a signal before killing the ranks."""


class Guard(Section):
    """What to do if the loss or gradients go wrong. The update waits for the guard, so a refused one never reaches the weights."""

    spike: Literal["ignore", "warn", "skip", "rollback", "stop"] = "warn"
    """A loss or gradient norm far above the last 128 steps: `warn` prints a warning; `skip` skips the update; `rollback` goes back to the last checkpoint before `span` and skips all updates of that span; `stop` commits the state before the step and ends the run."""
    not_finite: Literal["stop", "skip"] = "stop"
    """A NaN or infinite loss or gradient norm: `stop` commits the state before the step and ends the run, `skip` skips the update."""
    span: PositiveInt = 1
    """The number of steps that a rollback skips: the one with the spike and those before it."""
    limit: PositiveInt = 10
    """How many times the guard may skip steps before the run stops."""
