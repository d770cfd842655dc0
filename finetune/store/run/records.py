"""The records of a run's journal, one a step or event: every key that may be in one."""

from typing import Literal, NotRequired, Required, TypedDict, TypeGuard

from finetune.plan.facts import World


class StepFigures(TypedDict):
    """What a step must give again when it is run again. A figure that is not finite is read back as its name: "nan", "inf", "-inf"."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int


class Skipped(TypedDict):
    skipped: NotRequired[str]
    """Why the weights stayed as they were."""


class StepRecord(StepFigures, Skipped):
    kind: Literal["step"]
    step: int
    seconds: float
    await_seconds: float
    attempt: str
    time: str


class AmendmentRecord(TypedDict):
    """Steps that do not move the weights, as the journal and every later manifest have them."""

    first: int
    last: int
    action: Literal["skip", "rollback"]
    reason: Literal["not_finite", "spike"]
    step: int


class ParentRecord(TypedDict):
    """The checkpoint before, as a manifest names it; without a digest where that is the base."""

    ref: str
    digest: str | None


class EventRecord(TypedDict, total=False):
    """Something that happened beside the steps. Which of the other keys it has follows from its name; `evaluated` has the task's figures too."""

    kind: Required[Literal["event"]]
    event: Required[str]
    attempt: Required[str]
    time: Required[str]
    step: int
    # started, extended, branched; `steps` also of the event `averaged`, which a package's record has
    plan_id: str
    changes: list[str]
    world: World
    previous: str | None
    steps: list[int]
    schedule: str
    ref: str
    run: str
    digest: str | None
    # damaged, not_exact, spike, not_finite, amended, skipped_save
    check: str
    file: str
    tensor: str | None
    message: str
    quantity: str
    first: int
    last: int
    action: Literal["skip", "rollback"]
    reason: Literal["not_finite", "spike"]
    to: int
    # a step that was not made, evaluated
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    perplexity: float
    loss_stderr: float
    rows: int
    # committed
    newest_step: int
    bytes: int
    blocked_ms: float
    wait_seconds: float
    save_seconds: float
    read_back_seconds: float
    save_cpu_seconds: float


Record = StepRecord | EventRecord


def is_step(record: Record) -> TypeGuard[StepRecord]:
    return record["kind"] == "step"


def is_event(record: Record) -> TypeGuard[EventRecord]:
    return record["kind"] == "event"


def is_rollback(record: Record) -> TypeGuard[EventRecord]:
    return is_event(record) and record["event"] == "amended" and record["action"] == "rollback"


def is_number(value: object) -> TypeGuard[float | str]:
    """Whether a field of a record is a figure; one that JSON has no number for is a word there."""
    return isinstance(value, int | float) or value in ("nan", "inf", "-inf")
