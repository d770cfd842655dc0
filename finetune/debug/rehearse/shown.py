"""What `rehearse` prints with `--json`."""

from typing import TypedDict


class DifferenceRecord(TypedDict):
    step: int
    quantity: str
    uninterrupted: object
    resumed: object


class PackageOutcome(TypedDict):
    problem: str | None
    checks: list[str]
    seconds: float


class CheckpointCost(TypedDict):
    bytes: int
    blocked_seconds: float
    save_seconds: float
    cpu_seconds: float
    has_free_core: bool


class Interval(TypedDict):
    steps: int
    minutes: float


class Costs(TypedDict):
    step_seconds: float
    checkpoint: CheckpointCost
    smallest_interval: Interval
    every: list[str]
    share: float
    run_bytes: int
    free_bytes: int


class Outcome(Costs):
    """What `rehearse --json` prints."""

    ok: bool
    steps: int
    resumed_from: int
    killed_at: int
    first_difference: DifferenceRecord | None
    compared: dict[str, int]
    package: PackageOutcome | None
    reproducibility: str
    seconds: float
