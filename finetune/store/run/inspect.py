"""Reads the content of run directories, without torch."""

from contextlib import suppress
from pathlib import Path
from typing import cast

from finetune.errors import CheckpointError, RunError
from finetune.plan.disk import readable
from finetune.plan.facts import Metrics
from finetune.plan.plan import Plan, are_same_rows
from finetune.plan.retention import Saved
from finetune.store.checkpoints import best
from finetune.store.checkpoints.manifest import MANIFEST, Checkpoint
from finetune.store.checkpoints.refs import CheckpointRef, StepRef, described, find, parse
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.stored import Summary, opened
from finetune.store.checkpoints.verify import verify
from finetune.store.mirror import replica
from finetune.store.run import journal, scan
from finetune.store.run.directory import RunDirectory, step_of
from finetune.store.run.records import EventRecord, StepRecord
from finetune.store.run.shown import BranchLog, Commit, Description, Incident, ParentOfRun, ProblemReport, RunLog

INCIDENTS = (
    "amended",
    "not_finite",
    "spike",
    "not_exact",
    "damaged",
    "skipped_save",
    "stalled_save",
    "no_gradient",
    "starving_experts",
    "stopped_early",
)

MESSAGES = {
    "not_exact": "{quantity} was another one when it ran again",
    "spike": "{quantity} lay far above the last steps",
    "stalled_save": "the save took too long",
    "not_finite": "not a number",
}


def log(run: Path) -> RunLog:
    """A run as `log --json` prints it: its origin, its commits (oldest first), incidents, and its branches in the same folder with the
    same facts."""
    plan, facts = RunDirectory(run).plan()
    events, trained = scan.read(run)
    evaluated = journal.evaluations(events)
    pinned, stored = Store(run).pinned(), Store(run).checkpoints()
    by = plan.recipe.checkpoint.keep.chosen_by
    saved = [Saved.of(Summary.of(item), evaluated, by) for item in stored]
    return {
        "run": replica.name_of(run),
        "parent": cast(ParentOfRun, plan.parent.model_dump(mode="json")) if plan.parent else None,
        "steps": {"planned": plan.steps, "recorded": max(trained, default=0)},
        "checkpoints": [
            _summary(run, item, trained.get(item.step), evaluated.get(item.step, {}), item.step in pinned)
            for item in stored
        ],
        "averages": [_summary(run, item, None, {}, False) for item in _averages(run)],
        "incidents": [incident(record) for record in events if record.get("event") in INCIDENTS],
        "notes": best.notes(saved, evaluated, best.first_step(events), by),
        "seen": plan.seen_told,
        "branches": _branches(run, facts["run"], plan),
    }


def tree(facts: RunLog) -> str:
    """The same for a reader: a line for each checkpoint and incident, by step; a branch stands below its first step."""
    return "\n".join([f"{'':38}{'training loss':>14}{'held-out loss':>14}", *_lines(facts, "")])


def _lines(facts: RunLog, margin: str, are_rows_others: bool = False) -> list[str]:
    """`are_rows_others`: its held-out figures are about other rows than those above."""
    steps, parent = facts["steps"], facts["parent"]
    origin = (
        f", from {parent['ref']}" + (f": {'; '.join(parent['changes'])}" if parent["changes"] else "") if parent else ""
    )
    lines = [f"{margin}{facts['run']}  ({steps['recorded']} of {steps['planned']} steps{origin})"]
    lines += [f"{margin}! {told}" for told in facts["seen"]]
    entries: list[tuple[int, int, str | BranchLog]] = [
        (row["step"], 1, _checkpoint_line(row, are_rows_others)) for row in facts["checkpoints"]
    ]
    entries += [(row["step"], 2, _checkpoint_line(row, are_rows_others)) for row in facts["averages"]]
    entries += [
        (incident["step"], 0, f"! step {incident['step']}: {incident['message']}") for incident in facts["incidents"]
    ]
    entries += [(_parent_step(branch), 3, branch) for branch in facts["branches"]]
    entries.sort(key=lambda entry: entry[:2])
    entries += [(steps["recorded"], 4, f"! {note}") for note in facts["notes"]]
    for place, (_, _, entry) in enumerate(entries):
        is_last = place == len(entries) - 1
        if isinstance(entry, str):
            lines.append(f"{margin}{'└─ ' if is_last else '├─ '}{entry}")
        else:
            head, *rest = _lines(entry, "", are_rows_others or not entry["is_comparable"])
            lines.append(f"{margin}{'└─┬ ' if is_last else '├─┬ '}{head}")
            lines += [f"{margin}{'  ' if is_last else '│ '}{line}" for line in rest]
    return lines if entries else [*lines, f"{margin}└─ no checkpoint yet"]


def _checkpoint_line(row: Commit, are_rows_others: bool) -> str:
    losses = (_figure(row["training_loss"]), _figure(row["metrics"].get("loss")))
    about = [*(["weights alone"] if row["kind"] != "full" else []), *(["pinned"] if row["pinned"] else [])]
    about += ["other held-out rows"] if are_rows_others and "loss" in row["metrics"] else []
    return f"{row['ref']:35}{losses[0]:>14}{losses[1]:>14}  {', '.join(about)}".rstrip()


def incident(record: EventRecord) -> Incident:
    """One of `INCIDENTS`, for a reader."""
    kind = record["event"]
    message = record.get("message") or MESSAGES[kind].format(**{"quantity": "something"} | record)
    if kind == "amended":
        first, last = record["first"], record["last"]
        skipped = f"step {first}" if first == last else f"steps {first} to {last}"
        message = f"{message}; {skipped} skipped"
    step = record["step"] if "step" in record else step_of(record["file"].partition("/")[0]) or 0
    return {"step": step, "kind": kind, "message": message, "time": record["time"]}


def _branches(run: Path, identity: str, origin: Plan) -> list[BranchLog]:
    """The runs in the same folder that branch off this one, and whether they share its held-out rows."""
    found: list[BranchLog] = []
    for path in RunDirectory(run).neighbours():
        with suppress(RunError):  # another one's damage is no matter here
            plan, _ = RunDirectory(path).plan()
            if plan.parent and plan.parent.run == identity:
                is_comparable = are_same_rows(plan, origin)
                found.append({**log(run.parent / path.name), "is_comparable": is_comparable})
    return sorted(found, key=_parent_step)


def _parent_step(branch: RunLog) -> int:
    return branch["parent"]["step"] if branch["parent"] else 0


def describe(text: str) -> Description:
    """The facts of a checkpoint, as `show --json` prints them."""
    checkpoint = _checkpoint(text)
    manifest = checkpoint.manifest
    return {
        "ref": text,
        "path": str(checkpoint.path),
        "step": manifest.step,
        "kind": manifest.kind,
        "run": manifest.run,
        "attempt": manifest.attempt,
        "created": manifest.created,
        "plan_id": manifest.plan_id,
        "digest": manifest.digest,
        "parent": manifest.parent,
        "members": manifest.members,
        "method": manifest.method,
        "metrics": manifest.metrics,
        "versions": manifest.versions,
        "world": manifest.world,
        "files": {
            name: {"bytes": file.bytes, "digest": file.digest, "tensors": len(file.tensors)}
            for name, file in manifest.files.items()
        },
    }


def listing(facts: Description) -> str:
    """The same for a reader."""
    lines = [f"{name:10}{facts[name]}" for name in ("path", "step", "kind", "created", "plan_id", "digest")]
    lines.append(f"{'parent':10}{facts['parent']['ref'] if facts['parent'] else 'the base'}")
    lines += [f"{'member':10}{each['weight']:.6f}  {each['ref']}" for each in facts["members"]]
    for part in ("metrics", "versions", "world"):
        lines.append(f"{part:10}" + "  ".join(f"{name} {_figure(value)}" for name, value in facts[part].items()))
    lines += [
        f"{name:28}{readable(file['bytes']):>12}  {file['tensors'] or '':>4}  {file['digest']}"
        for name, file in facts["files"].items()
    ]
    return "\n".join(lines)


def is_model(text: str) -> bool:
    """Whether the target of `verify` is a model folder or a repository, not a run or its checkpoints."""
    path = Path(text)
    if not path.is_dir() or (path / MANIFEST).exists() or RunDirectory(path).is_run:
        return text.startswith("hub:")
    return any(path.glob("*config.json")) or any(path.glob("*.safetensors"))


def problems(text: str) -> list[ProblemReport]:
    """All problems of a checkpoint, or of all checkpoints of a run: then a file begins with `checkpoints/step-…/`."""
    ref = parse(text)
    if not isinstance(ref, StepRef | CheckpointRef):
        raise CheckpointError(
            "is neither a run nor a checkpoint of one", where=text, hint="name RUN, RUN@STEP or a checkpoint directory"
        )
    if isinstance(ref, StepRef) and ref.is_implied:
        store = Store(ref.run)
        for item in store.checkpoints():
            replica.completed(item)
        paths = sorted([*(item.path for item in store.checkpoints()), *(item.path for item in store.unreadable())])
        paths += _places_of_averages(ref.run)
        found = [(f"{path.parent.name}/{path.name}/", damage) for path in paths for damage in verify(path)]
    else:
        found = [("", damage) for damage in verify(_place_of(ref))]
    return [
        {"check": d.check, "file": f"{prefix}{d.file}", "tensor": d.tensor, "message": d.message} for prefix, d in found
    ]


def _averages(run: Path) -> list[Checkpoint]:
    """The averages of a run with a sound manifest, by name."""
    found = map(opened, _places_of_averages(run))
    return [item for item in found if isinstance(item, Checkpoint)]


def _places_of_averages(run: Path) -> list[Path]:
    return sorted(RunDirectory(run).averages.glob("[!.]*"))  # the others are under way


def _place_of(ref: StepRef | CheckpointRef) -> Path:
    """The place of a checkpoint, without opening it: it may be damaged."""
    if isinstance(ref, StepRef) and isinstance(ref.step, int) and not replica.place_of(ref.run):
        return RunDirectory(ref.run).checkpoint(ref.step)
    return find(ref).path


def _checkpoint(text: str) -> Checkpoint:
    return described(parse(text))


def _summary(
    run: Path, checkpoint: Checkpoint, record: StepRecord | None, evaluated: Metrics, is_pinned: bool
) -> Commit:
    is_average = checkpoint.manifest.kind == "average"
    return {
        "ref": str(checkpoint.path) if is_average else f"{replica.name_of(run)}@{checkpoint.step}",
        "step": checkpoint.step,
        "path": str(checkpoint.path),
        "kind": checkpoint.manifest.kind,
        "metrics": checkpoint.manifest.metrics or evaluated,
        "parent": checkpoint.manifest.parent,
        "training_loss": record["loss"] if record else None,
        "created": checkpoint.manifest.created,
        "pinned": is_pinned,
    }


def _figure(value: object) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
