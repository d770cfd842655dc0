"""The sections `train`, `evaluate`, `checkpoint` and `guard`: how a run goes."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from finetune.recipe.schema.values import AutoOrCount, Cadences, Every, Section, StepCadence


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

    every: Cadences = Field(default=[Every(minutes=15.0)], validate_default=True)
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
