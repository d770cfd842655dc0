"""What a model cost and where it comes from: tokens, seconds, bytes and recipe, from journals and manifests alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypedDict

from finetune.plan.plan import Plan
from finetune.recipe.resume_rules import differences
from finetune.store.checkpoints.refs import find, parse, run_around
from finetune.store.run import scan
from finetune.store.run.directory import RunDirectory


class Cost(TypedDict):
    """None where nothing records it."""

    tokens: int | None
    """Trained on so far, those of the runs that it branched off included."""
    seconds: float | None
    """Of the steps, without evaluations and saves."""
    bytes: int | None
    """Of the checkpoint."""


class Entry(TypedDict):
    """A key that two recipes have otherwise."""

    key: str
    a: object
    b: object


@dataclass(frozen=True)
class Origin:
    text: str
    plan: Plan | None
    """Of the run that trained it."""
    cost: Cost
    step: int | None = None
    """None for a model that no run of ours trained."""


class _Step(NamedTuple):
    step: int
    tokens: int
    seconds: float


def origins(texts: Sequence[str]) -> list[Origin]:
    """Of each ref; a journal is read once, for several refs may be steps of one run."""
    steps, plan = cache(_steps), cache(_plan)
    return [_origin(text, steps, plan) for text in texts]


def recipe_differences(one: Plan | None, two: Plan | None) -> list[Entry]:
    """The recipe keys in which two runs differ; none where one of them is not known."""
    if one is None or two is None or one is two:
        return []
    was, now = (plan.recipe.model_dump(mode="json") for plan in (one, two))
    return [{"key": key, "a": old, "b": new} for key, old, new in differences(was, now)]


def _origin(text: str, steps: Callable[[Path], list[_Step]], plan: Callable[[Path], Plan]) -> Origin:
    ref, unknown = parse(text), Cost(tokens=None, seconds=None, bytes=None)
    if ref.kind == "base":
        return Origin(text, plan(ref.run), {**unknown, "tokens": 0, "seconds": 0.0}, 0)
    if ref.kind == "model":
        size = sum(path.stat().st_size for path in ref.path.iterdir() if path.is_file())
        return Origin(text, None, {**unknown, "bytes": size})
    if ref.kind != "run" and ref.kind != "checkpoint":
        return Origin(text, None, unknown)
    checkpoint = find(ref)
    size = sum(record.bytes for record in checkpoint.manifest.files.values())
    run = ref.run if ref.kind == "run" else run_around(checkpoint.path)
    if run is None:
        return Origin(text, None, {**unknown, "bytes": size})
    made = [each for each in steps(run) if each.step <= checkpoint.step]
    tokens, seconds = sum(each.tokens for each in made), sum(each.seconds for each in made)
    cost: Cost = {"tokens": tokens, "seconds": round(seconds, 3), "bytes": size}
    return Origin(text, plan(run), cost, checkpoint.step)


def _steps(run: Path) -> list[_Step]:
    return [_Step(step, record["tokens"], record["seconds"]) for step, record in scan.read(run).steps.items()]


def _plan(run: Path) -> Plan:
    return RunDirectory(run).plan()[0]
