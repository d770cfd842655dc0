"""The training record in a package: recipe, figures and loss curve. It must hold no paths, hosts or rows.

Everything comes from the plan and the journal, so the same run gives the same bytes.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

from finetune.package.card.figures import WITHIN
from finetune.package.card.pictures import Drawn, plot
from finetune.plan.facts import Metrics
from finetune.plan.plan import Plan
from finetune.recipe.load import to_yaml
from finetune.store.checkpoints.manifest import Manifest
from finetune.store.run import journal
from finetune.store.run.records import EventRecord, Record, is_number
from finetune.store.run.scan import Scan

EVENTS = ("evaluated", "committed")
LEFT_OUT = ("time", "attempt")


def recipe(plan: Plan) -> str:
    """The recipe in force, `--set` included, as YAML: only keys that differ from defaults, without your comments and folders."""
    return to_yaml(public(plan.recipe.model_dump(mode="json", exclude_defaults=True)))


def public_name(text: str) -> str:
    """A path of this machine as its last part; anything else as it is."""
    return Path(text).name if text.startswith(("/", "~")) else text


def public_line(text: str) -> str:
    """A line of words, with the paths of this machine as their last parts."""
    return re.sub(r"(?<![\w.:/])[/~][^\s'\"\]},]+", lambda match: Path(match[0]).name, text)


def figures(found: Scan, step: int) -> list[Record]:
    """Steps, evaluations and commits up to a step, in order, with numbers alone; the last record of each counts."""
    kept = {(number, 0): _numbers(found.steps[number]) for number in found.steps if number <= step}
    for place, event in enumerate(EVENTS, 1):
        of_event = journal.that_count(found.events, partial(_is_called, event))
        kept |= {(number, place): _numbers(record) for number, record in of_event.items() if number <= step}
    return [record for _, record in sorted(kept.items(), key=lambda item: item[0])]


def _is_called(name: str, record: EventRecord) -> bool:
    return record["event"] == name


def of_average(manifests: Sequence[Manifest], metrics: Metrics) -> Record:
    """What is said of the mean of several checkpoints, the last of which has its place in the run."""
    steps = [each.step for each in manifests]
    return cast(Record, {"kind": "event", "event": "averaged", "step": steps[-1], "steps": steps, **metrics})


def of_checkpoint(found: Scan, manifest: Manifest) -> list[Record]:
    """The figures up to a checkpoint. An average has no place of its own in the run: it stands at the step of its last member."""
    records = figures(found, manifest.step)
    if manifest.kind == "average":
        weights = [each["weight"] for each in manifest.members]
        about = {"kind": "event", "event": "averaged", "step": manifest.step, "weights": weights}
        records.append(cast(Record, about | manifest.metrics))
    return records


def to_lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def loss_curve(records: Sequence[Record]) -> bytes:
    """A PNG of training loss and held-out loss over steps, with the 95 % interval of the latter."""
    made = [record for record in records if journal.is_step(record) and "skipped" not in record]
    found = [item for item in records if journal.is_event(item) and item["event"] == "evaluated"]
    steps, losses = [item["step"] for item in made], [float(item["loss"]) for item in made]
    drawn = [Drawn("training, each step", steps, losses, "tab:blue")]
    if found:
        values = [float(item["loss"]) for item in found]
        errors = [WITHIN * float(item.get("loss_stderr", 0.0)) for item in found]
        low, high = ([value + sign * error for value, error in zip(values, errors, strict=True)] for sign in (-1, 1))
        drawn.append(
            Drawn("held-out", [item["step"] for item in found], values, "tab:orange", low, high, are_points=True)
        )
    return plot(drawn, "Loss", "loss (nats per supervised token)")


def _numbers(record: Record) -> Record:
    """With its names and figures alone."""
    names = {name: value for name, value in record.items() if name in ("kind", "event", "skipped")}
    numbers = {key: value for key, value in record.items() if is_number(value) and key not in LEFT_OUT}
    return cast(Record, names | numbers)


def public(value: object) -> object:
    """The same with paths of this machine as their last parts."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    return public_name(value) if isinstance(value, str) else value
