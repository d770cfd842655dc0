"""The records of a run's journal, one a step or event: every possible key."""

from typing import Literal, NotRequired, Required, TypedDict, TypeGuard

from finetune.plan.facts import World


class Balance(TypedDict):
    router_loss: NotRequired[float]
    """The balance of experts, without its coefficient; only where it is trained."""


class StepFigures(Balance):
    """The figures a step must repeat when it runs again. NaN and infinity are read back as "nan", "inf", "-inf"."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int


class Skipped(TypedDict):
    skipped: NotRequired[str]
    """Why the update was skipped."""


class StepRecord(StepFigures, Skipped):
    kind: Literal["step"]
    step: int
    seconds: float
    await_seconds: float
    memory_bytes: NotRequired[int]
    """Of the process that writes; see `used_bytes`. Older code did not write it down."""
    attempt: str
    time: str


class AmendmentRecord(TypedDict):
    """Skipped steps, as in the journal and in every later manifest."""

    first: int
    last: int
    action: Literal["skip", "rollback"]
    reason: Literal["not_finite", "spike"]
    step: int


class MemberRecord(TypedDict):
    """A member of an average, as its manifest names it."""

    ref: str
    digest: str | None
    """Of its manifest or of its files; None of a step that is not stored, and was made by replay."""
    weight: float


class ParentRecord(TypedDict):
    """The previous checkpoint, as a manifest names it; without a digest if it is the base."""

    ref: str
    digest: str | None


class EventRecord(TypedDict, total=False):
    """An event beside the steps. Its name decides its other keys; `evaluated` has the task's figures, too."""

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
    weights: list[float]
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
    router_loss: float
    perplexity: float
    loss_stderr: float
    rows: int
    # reported, which a package's record has: the figures on the test set
    set: str
    answers: dict[str, float]
    chosen: dict[str, int]
    earlier: int
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
    """Whether a field of a record is a figure; NaN and infinity are words in JSON."""
    return isinstance(value, int | float) or value in ("nan", "inf", "-inf")
