"""Facts recorded beside a plan: machine and software. None of them decides the training."""

from typing import Literal, NotRequired, TypedDict, cast

from finetune.recipe.resume_rules import FACT_NAMES, recorded

Metrics = dict[str, float]
"""Held-out figures by name. One that is not finite is read back from a file as its name: "nan", "inf", "-inf"."""


class World(TypedDict, total=False):
    """The machine, as every manifest and every attempt names it. Older code did not write all of it down."""

    device: str
    world_size: int
    strategy: str
    """How its devices shared the work."""
    hosts: int
    """Of a training whose rows are spread within each host (`hsdp`)."""
    threads: int
    micro_batch_tokens: int
    update_slice: int
    kernels: str
    """`plain`, `compiled`, or the packages of fused kernels with their versions."""


class Machine(World):
    versions: dict[str, str]


class Facts(Machine):
    run: str
    """The run's id."""
    software: NotRequired[dict[str, str]]
    places: NotRequired[dict[str, str]]
    """The places of base and data, if they moved since the plan."""


class Extension(TypedDict):
    """How a run was last extended, as its journal has it."""

    step: int
    steps: list[int]
    schedule: Literal["continue", "restart"]
    plan_id: str


def world_of(facts: Facts) -> World:
    known = recorded(facts)
    absent = {"versions"} if known["hosts"] else {"versions", "hosts"}
    return cast(World, {name: known[name] for name in FACT_NAMES if name not in absent})
