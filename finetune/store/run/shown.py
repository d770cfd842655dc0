"""What `log`, `show` and `verify` print about runs and checkpoints with `--json`."""

from typing import TypedDict

from finetune.plan.facts import Metrics, World
from finetune.store.run.records import MemberRecord, ParentRecord


class Steps(TypedDict):
    planned: int
    recorded: int


class Commit(TypedDict):
    ref: str
    step: int
    path: str
    kind: str
    metrics: Metrics
    parent: ParentRecord | None
    training_loss: float | None
    created: str
    pinned: bool


class Incident(TypedDict):
    step: int
    kind: str
    message: str
    time: str


class ParentOfRun(TypedDict):
    """`Plan.parent`."""

    ref: str
    run: str
    step: int
    digest: str | None
    plan_id: str
    changes: list[str]


class RunLog(TypedDict):
    """What `log --json` prints."""

    run: str
    parent: ParentOfRun | None
    steps: Steps
    checkpoints: list[Commit]
    averages: list[Commit]
    incidents: list[Incident]
    notes: list[str]
    seen: list[str]
    branches: "list[BranchLog]"


class BranchLog(RunLog):
    is_comparable: bool
    """Whether it has the same held-out rows as the run it comes from."""


class FileSummary(TypedDict):
    bytes: int
    digest: str
    tensors: int


class Description(TypedDict):
    """What `show --json` prints."""

    ref: str
    path: str
    step: int
    kind: str
    run: str
    attempt: str
    created: str
    plan_id: str
    digest: str | None
    parent: ParentRecord | None
    members: list[MemberRecord]
    """Of an average."""
    method: str
    metrics: Metrics
    versions: dict[str, str]
    world: World
    files: dict[str, FileSummary]


class Verification(TypedDict):
    """What `verify --json` prints; of a package more."""

    ok: bool
    problems: "list[ProblemReport]"


class ProblemReport(TypedDict):
    """A problem, as `verify --json` prints it."""

    check: str
    file: str
    tensor: str | None
    message: str
