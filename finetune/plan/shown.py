"""What `plan` prints with `--json`, as far as it follows from the plan and this machine."""

from typing import NotRequired, TypedDict


class PinFacts(TypedDict):
    """`PinnedBase`."""

    kind: str
    revision: str | None
    digest: str | None
    beneath: "PinFacts | None"
    dequantized: NotRequired[str]
    stored: NotRequired[str]


class BaseFacts(PinFacts):
    checkpoint: str


class SourceFacts(TypedDict):
    name: str
    revision: str | None
    fingerprint: str
    rows: int
    read: str
    """How: files, format, compression, rows kept."""


class MixtureFacts(TypedDict):
    """How much is drawn of a source."""

    name: str
    examples: int
    examples_per_epoch: int
    epochs: float
    """Of the source itself, over the whole run."""
    token_share: float
    """Of the tokens that the run trains on."""


class RateFacts(TypedDict):
    schedule: str
    peak: float
    warmup_steps: int
    last: float
    """Of the last step."""


class GuardFacts(TypedDict):
    spike: str
    not_finite: str


class Target(TypedDict):
    repo: str
    private: bool


class MirrorFacts(TypedDict):
    """The copy of the run in a bucket."""

    to: str
    every: str
    """Which commits are copied."""
    keep: list[str]
    """The commits that stay there."""
    commit_bytes: int
    """What one sends; the first one also sends frozen weights, if checkpoints have any."""


class Forecast(TypedDict):
    """Sizes in bytes, counts of all epochs unless named otherwise."""

    plan_id: str
    base: BaseFacts
    train: list[SourceFacts]
    holdout: list[SourceFacts]
    order: str
    mixture: list[MixtureFacts]
    learning_rate: RateFacts
    steps: int
    steps_per_epoch: int
    rows: int
    examples: int
    tokens: int
    tokens_per_epoch: int
    supervised_tokens_per_epoch: int
    cut_rows: int
    cut_tokens: int
    left_out_rows: int
    longest: int
    arrangement: str
    """How rows come together; why they are not packed is in `base_notes`."""
    holdout_rows: int
    holdout_tokens: int
    holdout_copies: int
    split: dict[str, object] | None
    seen: list[dict[str, object]]
    notes: list[str]
    total_parameters: int
    trainable_parameters: int
    active_parameters: int
    """Those that a token uses: of experts only some."""
    strategy: str
    """How the processes of this launcher share the work; on one process `ddp`."""
    asked_strategy: str
    """`train.strategy`, or what the launcher asks for where it is `auto`."""
    world_size: int
    micro_batch_tokens: int
    memory_bytes: int
    memory: dict[str, int]
    machine_memory_bytes: int
    host_memory: dict[str, int]
    host_memory_bytes: int
    host_bytes: int
    checkpoint_bytes: int
    run_bytes: int
    free_bytes: int
    guard: GuardFacts
    mirror: MirrorFacts | None
    publish: Target | None
    warnings: list[str]


class OfDevices(TypedDict):
    """The memory of each of several GPUs, where each holds the whole model, and where they share it. Hosts have 8 each."""

    devices: int
    replicated_bytes: int
    replicated_fits: bool
    sharded_bytes: int | None
    """None where rows cannot be shared."""
    sharded_fits: bool
    strategy: str
    """The recipe's, or what `auto` takes there."""
    micro_batch_tokens: int | None
    """What `auto` takes with that strategy; None where not even the longest row fits."""


class WithDevices(Forecast):
    device_memory_bytes: int
    devices: list[OfDevices]
