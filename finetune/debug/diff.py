"""The differences between two checkpoints and their runs: keys, figures, the first step that differs, weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from finetune.debug import weight_changes
from finetune.debug.weight_changes import ChangeRecord
from finetune.errors import FinetuneError
from finetune.model import base
from finetune.plan.facts import Metrics
from finetune.plan.plan import Plan, are_same_rows
from finetune.recipe.resume_rules import differences
from finetune.recipe.schema import Base
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.refs import find, parse
from finetune.store.run import journal, row_losses, scan
from finetune.store.run.directory import RunDirectory
from finetune.store.run.records import StepRecord

SHOWN_TENSORS = 10


@dataclass(frozen=True)
class Side:
    directory: Path
    run: Path | None
    plan: Plan | None
    checkpoint: Checkpoint | None
    step: int | None


class Entry(TypedDict):
    """What two plans have otherwise."""

    key: str
    a: object
    b: object


class Pair(TypedDict):
    a: float | None
    b: float | None


class FirstStep(TypedDict):
    """The first step that two runs recorded otherwise, and its first quantity."""

    step: int
    quantity: str
    a: object
    b: object
    rows: dict[str, list[int]]


class PlanDifferences(TypedDict):
    recipe: list[Entry]
    plan: list[Entry]


class WeightDifferences(TypedDict):
    total: ChangeRecord
    modules: list[ChangeRecord]
    tensors: list[ChangeRecord]
    others: dict[str, list[str]]


class Comparison(PlanDifferences):
    """What `diff --json` prints."""

    a: str
    b: str
    metrics: dict[str, Pair]
    are_same_rows: bool | None
    first_differing_step: FirstStep | None
    weights: WeightDifferences


def diff(a: str, b: str, picture: Path | None = None) -> Comparison:
    """The object of `diff --json`; the heat map of the weights goes to a file."""
    if picture and not picture.absolute().parent.is_dir():
        raise FinetuneError("there is no such folder", where=str(picture.parent))
    one, two = side_of(a), side_of(b)
    found, others = weight_changes.changes(
        weight_changes.weights_of(one.directory), weight_changes.weights_of(two.directory)
    )
    if picture:
        weight_changes.picture(found, picture)
    return {
        "a": a,
        "b": b,
        **_of_plans(one.plan, two.plan),
        "metrics": _of_metrics(one, two),
        "are_same_rows": are_same_rows(one.plan, two.plan) if one.plan and two.plan else None,
        "first_differing_step": first_differing_step(one.run, two.run),
        "weights": {
            "total": weight_changes.total("all", found).record,
            "modules": [item.record for item in weight_changes.by_module(found)],
            "tensors": [item.record for item in found],
            "others": others,
        },
    }


def side_of(text: str) -> Side:
    base.refuse_foreign(text)
    ref = parse(text)
    if ref.kind == "base":
        plan, _ = RunDirectory(ref.run).plan()
        return Side(base.directory(plan.recipe.base, plan.base), ref.run, plan, None, 0)
    if ref.kind == "run" or ref.kind == "checkpoint":
        checkpoint = find(ref)
        base.refuse_damaged(checkpoint.path)
        run = ref.run if ref.kind == "run" else base.run_around(checkpoint.path)
        return Side(checkpoint.path, run, RunDirectory(run).plan()[0] if run else None, checkpoint, checkpoint.step)
    if ref.kind == "model":
        return Side(ref.path, None, None, None, None)
    named = Base(checkpoint=text)
    return Side(base.directory(named, base.pin(named)), None, None, None, None)


def first_differing_step(one: Path | None, two: Path | None) -> FirstStep | None:
    """The first step whose records differ between two runs, and its first such quantity; None if all common records are equal."""
    if one is None or two is None or one == two:
        return None
    records, others = (scan.read(run).steps for run in (one, two))
    for step in sorted(records.keys() & others.keys()):
        if quantity := journal.difference(_figures(records[step]), _figures(others[step])):
            return {
                "step": step,
                "quantity": quantity,
                "a": records[step].get(quantity),
                "b": others[step].get(quantity),
                "rows": _other_rows(one, two, step),
            }
    return None


def _figures(record: StepRecord) -> dict[str, object]:
    """The record without times."""
    return {name: value for name, value in record.items() if name not in ("await_seconds", "seconds")}


def _other_rows(one: Path, two: Path, step: int) -> dict[str, list[int]]:
    """The rows of a step that only one of the runs has."""
    rows, others = ({item.row for item in row_losses.read_rows(run, step)} for run in (one, two))
    return {"only in A": sorted(rows - others), "only in B": sorted(others - rows)}


def _of_plans(one: Plan | None, two: Plan | None) -> PlanDifferences:
    if one is None or two is None:
        return {"recipe": [], "plan": []}
    # `log` shows the parent of each branch
    was, now = (plan.model_dump(mode="json", exclude={"parent", "stages"}) for plan in (one, two))
    found = list(differences(was, now))
    entries: list[Entry] = [{"key": key.removeprefix("recipe."), "a": old, "b": new} for key, old, new in found]
    keys = [key for key, _, _ in found]
    return {
        "recipe": [entry for entry, key in zip(entries, keys, strict=True) if key.startswith("recipe.")],
        "plan": [entry for entry, key in zip(entries, keys, strict=True) if not key.startswith("recipe.")],
    }


def _of_metrics(one: Side, two: Side) -> dict[str, Pair]:
    """Held-out figures of each side, if it was evaluated at its step."""
    first, second = (_metrics(side) for side in (one, two))
    return {name: {"a": first.get(name), "b": second.get(name)} for name in dict.fromkeys([*first, *second])}


def _metrics(side: Side) -> Metrics:
    if side.run is None or side.step is None:
        return {}
    found: Metrics = side.checkpoint.manifest.metrics if side.checkpoint else {}
    return found or journal.evaluations(scan.events(side.run)).get(side.step, {})


def listing(facts: Comparison) -> str:
    """The same as lines of text."""
    lines = [f"A {facts['a']}", f"B {facts['b']}"]
    for part, differing in (("recipe", facts["recipe"]), ("plan", facts["plan"])):
        lines += [f"{part}: {entry['key']}: {entry['a']} -> {entry['b']}" for entry in differing]
    if facts["metrics"] and facts["are_same_rows"] is False:
        lines.append(
            "held-out figures of A and B are of different rows: evaluate both with one --recipe to compare them"
        )
    lines += [f"held-out {name}: {pair['a']} -> {pair['b']}" for name, pair in facts["metrics"].items()]
    if first := facts["first_differing_step"]:
        lines.append(f"the runs part at step {first['step']}: {first['quantity']} {first['a']!r} -> {first['b']!r}")
    weights = facts["weights"]
    total = weights["total"]
    if total["change"] == 0 and not weights["others"]:
        return "\n".join([*lines, f"weights: equal in all {total['size']:,} numbers"])
    lines += ["", f"{'weights':44}{'change':>12}{'relative':>12}{'largest':>12}"]
    entries = [total, *weights["modules"]]
    lines += [_row(entry) for entry in entries]
    furthest = sorted(weights["tensors"], key=lambda entry: -entry["relative"])[:SHOWN_TENSORS]
    lines += ["", "furthest tensors", *(_row(entry) for entry in furthest)]
    for kind, names in weights["others"].items():
        lines.append(f"{kind}: {', '.join(names[:SHOWN_TENSORS])}{' …' if len(names) > SHOWN_TENSORS else ''}")
    return "\n".join(lines)


def _row(entry: ChangeRecord) -> str:
    return f"{entry['name'][-43:]:44}{entry['change']:12.4g}{entry['relative']:12.3%}{entry['largest']:12.3g}"
