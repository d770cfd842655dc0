"""Floor 0. What lies in run directories, read without torch: the commands `log`, `show` and `verify`."""

from pathlib import Path

from finetune import journal
from finetune.checkpoints.manifest import Checkpoint, verify
from finetune.checkpoints.refs import find, parse
from finetune.checkpoints.store import Store
from finetune.errors import CheckpointError, RunError
from finetune.estimate import readable


def checkpoints(run: Path) -> list[dict]:
    """The committed checkpoints of a run, oldest first, as `log --json` prints them."""
    if not (run / "plan.json").exists():
        raise RunError(
            "is not a run directory: it has no plan.json",
            where=str(run),
            hint="name a directory that `finetune train` made",
        )
    records = journal.read(run)
    trained, evaluated = journal.steps(records), journal.evaluations(records)
    return [
        _summary(run, checkpoint, trained.get(checkpoint.step, {}), evaluated.get(checkpoint.step, {}))
        for checkpoint in Store(run).checkpoints()
    ]


def table(rows: list[dict]) -> str:
    """The same for a reader, one line a checkpoint."""
    if not rows:
        return "no checkpoint yet"
    lines = [f"{'checkpoint':32}{'training loss':>14}{'held-out loss':>14}  parent"]
    for row in rows:
        losses = (_figure(row["training_loss"]), _figure(row["metrics"].get("loss")))
        parent = row["parent"]["ref"] if row["parent"] else "the base"
        lines.append(f"{row['ref']:32}{losses[0]:>14}{losses[1]:>14}  {parent}")
    return "\n".join(lines)


def describe(text: str) -> dict:
    """What a checkpoint says of itself, as `show --json` prints it."""
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
        "metrics": manifest.metrics,
        "versions": manifest.versions,
        "world": manifest.world,
        "files": {
            name: {"bytes": file.bytes, "digest": file.digest, "tensors": len(file.tensors)}
            for name, file in manifest.files.items()
        },
    }


def listing(facts: dict) -> str:
    """The same for a reader."""
    lines = [f"{name:10}{facts[name]}" for name in ("path", "step", "kind", "created", "plan_id", "digest")]
    lines.append(f"{'parent':10}{facts['parent']['ref'] if facts['parent'] else 'the base'}")
    for part in ("metrics", "versions", "world"):
        lines.append(f"{part:10}" + "  ".join(f"{name} {_figure(value)}" for name, value in facts[part].items()))
    lines += [
        f"{name:28}{readable(file['bytes']):>12}  {file['tensors'] or '':>4}  {file['digest']}"
        for name, file in facts["files"].items()
    ]
    return "\n".join(lines)


def problems(text: str) -> list[dict]:
    """Everything wrong with a checkpoint, or with every directory in a checkpoint's place of a run; files as in the run."""
    ref = parse(text)
    if ref.kind not in ("run", "checkpoint"):
        raise CheckpointError(
            "is neither a run nor a checkpoint of one", where=text, hint="name RUN, RUN@STEP or a checkpoint directory"
        )
    if ref.is_implied:
        store = Store(ref.run)
        paths = sorted(item.path for item in [*store.checkpoints(), *store.unreadable()])
        found = [(f"checkpoints/{path.name}/", damage) for path in paths for damage in verify(path)]
    else:
        path = ref.run / "checkpoints" / f"step-{ref.step:08d}" if isinstance(ref.step, int) else find(ref).path
        found = [("", damage) for damage in verify(path)]
    return [
        {"check": d.check, "file": f"{prefix}{d.file}", "tensor": d.tensor, "message": d.message} for prefix, d in found
    ]


def _checkpoint(text: str) -> Checkpoint:
    return find(parse(text))


def _summary(run: Path, checkpoint: Checkpoint, record: dict, evaluated: dict) -> dict:
    return {
        "ref": f"{run}@{checkpoint.step}",
        "step": checkpoint.step,
        "path": str(checkpoint.path),
        "kind": checkpoint.manifest.kind,
        "metrics": checkpoint.manifest.metrics or evaluated,
        "parent": checkpoint.manifest.parent,
        "training_loss": record.get("loss"),
        "created": checkpoint.manifest.created,
    }


def _figure(value: object) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
