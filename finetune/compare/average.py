"""A weighted average of checkpoints, as a checkpoint with its own lineage: weights alone, which no training resumes from."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired, TypedDict

from finetune.compare import average_members, average_parts
from finetune.compare.average_choice import Choices, Named, chosen, folder_name
from finetune.compare.average_parts import Parts
from finetune.compare.average_replay import Window
from finetune.compare.evaluate import evaluate
from finetune.data.heldout import lineage
from finetune.errors import CheckpointError, FinetuneError
from finetune.model import base
from finetune.plan import metrics
from finetune.plan.facts import Metrics
from finetune.plan.plan import Stage
from finetune.store.beside import staged
from finetune.store.checkpoints.attempt import Attempt
from finetune.store.checkpoints.manifest import MANIFEST, Checkpoint, Manifest, of_attempt
from finetune.store.checkpoints.refs import find, parse, run_of
from finetune.store.durable import failures, rename, replace_file, sync_tree
from finetune.store.rank import is_alone
from finetune.store.run.directory import CHECKPOINTS, RunDirectory
from finetune.store.run.records import MemberRecord, ParentRecord

SHOWN = 12  # members that are listed
ATTEMPT = "average"  # in the manifest, where a training has the name of its attempt


class MemberFacts(TypedDict):
    ref: str
    weight: float


class Averaged(TypedDict):
    """What `average --json` prints."""

    ref: str
    members: list[MemberFacts]
    metrics: Metrics
    """Held-out figures of the average; empty if it was not evaluated."""
    form: str
    """`adapter` or `whole weights`."""
    notes: list[str]
    lost: NotRequired[float]
    """With `--rank`: the part of the norm of the change that the smaller rank loses."""


def average(refs: Sequence[str], choices: Choices, output: Path | None = None, is_evaluated: bool = True) -> Averaged:
    """Writes the average of the members that refs and choices name, and evaluates it if its run holds out rows."""
    refuse_launcher()
    named = chosen(refs, choices)
    home = _home(named, choices, output)
    with ExitStack() as files:
        with failures(home.output):
            staging = files.enter_context(staged(home.output))
            scratch = files.enter_context(staged(Path(f"{home.output}.scratch")))
        parts, records = _made(named, choices, files, scratch)
        attempt = Attempt(staging, home.step)
        parts.write(attempt)
        stages = [stage.model_dump(mode="json", exclude_defaults=True) for stage in _stages(named)]
        attempt.write_json(lineage.STAGES, stages)
        manifest = replace(home.manifest(records, choices), files=attempt.files)
        with failures(home.output):  # it is evaluated as what it will be
            replace_file(staging / MANIFEST, manifest.to_bytes())
        figures = _metrics(staging) if is_evaluated and base.run_around(staging) else {}
        with failures(home.output):
            replace_file(staging / MANIFEST, replace(manifest, metrics=figures).to_bytes())
            sync_tree(staging)
            rename(staging, home.output)
    facts: Averaged = {
        "ref": str(home.output),
        "members": [{"ref": each.ref, "weight": each.weight} for each in named],
        "metrics": figures,
        "form": parts.form,
        "notes": [*parts.notes, *home.notes],
    }
    return facts if parts.lost is None else {**facts, "lost": parts.lost}


def refuse_launcher() -> None:
    if not is_alone(os.environ):
        hint = "run it without a launcher; steps that only several processes can replay: `finetune replay --materialize` first"
        raise FinetuneError("an average is made by one process", hint=hint)


def _made(
    named: Sequence[Named], choices: Choices, files: ExitStack, scratch: Path
) -> tuple[Parts, list[MemberRecord]]:
    window = Window(named) if choices.like else None
    if window is None or not window.absent:
        members = average_members.opened(named)
        return average_parts.of_members(members, choices, files, scratch), [member.record for member in members]
    replayed = window.begin()
    replayed.say_cost()
    return average_parts.of_window(replayed, choices, files, scratch), window.records


@dataclass(frozen=True)
class _Home:
    """Where the average goes, and the run whose plan and held-out rows it has."""

    output: Path
    run: Path | None
    step: int
    parent: Checkpoint | None

    def manifest(self, members: list[MemberRecord], choices: Choices) -> Manifest:
        made = Manifest(run="", attempt=ATTEMPT, step=0, parent=None, plan_id="")
        if self.run:
            plan, facts = RunDirectory(self.run).plan()
            ref = f"{self.run.absolute().name}@{self.step}"
            of_step: ParentRecord | None = {"ref": ref, "digest": self.parent.manifest.digest} if self.parent else None
            made = of_attempt(facts, plan.plan_id, ATTEMPT, self.step, of_step)
        amendments = self.parent.manifest.amendments if self.parent else []
        return replace(made, kind="average", members=members, method=choices.words, amendments=amendments)

    @property
    def notes(self) -> list[str]:
        if self.run is None or base.run_around(self.output):
            return []
        return [
            "outside its run: `evaluate` needs --recipe, for an adapter also --base, and `package` a checkpoint in a run"
        ]


def _home(named: Sequence[Named], choices: Choices, output: Path | None) -> _Home:
    """The run's own place for averages, or the one that is given. CheckpointError for one that is taken, or is for other things."""
    runs = [(each, run) for each in named if (run := run_of(parse(each.ref)))]
    step, parent, run = 0, None, runs[0][1] if runs else None
    for each, of_member in runs:
        if run and of_member.resolve() == run.resolve():
            step, parent = max((step, parent), _place(each.ref), key=lambda place: place[0])
    if output is None and run is None:
        raise FinetuneError(
            "no member is part of a run, so the average has no place", hint="give one with --output DIR"
        )
    place = output or RunDirectory(run or Path()).averages / folder_name(step, len(named), choices)
    around = base.run_around(place)
    is_wrong = around and (
        run is None or around.resolve() != run.resolve() or place.absolute().parent.name == CHECKPOINTS
    )
    if is_wrong:
        hint = "omit --output, or name a folder outside runs"
        raise CheckpointError("is a place for something else in a run", where=str(place), hint=hint)
    if place.exists():
        raise CheckpointError(
            "is there already", where=str(place), hint="name another folder with --output, or remove this one"
        )
    return _Home(place, run, step, parent)


def _place(text: str) -> tuple[int, Checkpoint | None]:
    """The step of a ref in a run, and its checkpoint if it is stored."""
    ref = parse(text)
    if ref.kind == "base":
        return 0, None
    if ref.kind == "run" and isinstance(ref.step, int) and not RunDirectory(ref.run).checkpoint(ref.step).is_dir():
        return ref.step, None
    found = find(ref)
    return found.step, found


def _stages(named: Sequence[Named]) -> list[Stage]:
    """The runs behind all members, each once; of a run its last member's."""
    found: dict[str, Stage] = {}
    for each in reversed(named):
        for stage in lineage.stages(each.ref):
            found.setdefault(stage.model_copy(update={"ref": stage.ref.partition("@")[0]}).model_dump_json(), stage)
    return list(found.values())


def _metrics(checkpoint: Path) -> Metrics:
    """Held-out figures of a checkpoint in a run; empty if the run holds out no rows."""
    plan, _ = RunDirectory(checkpoint.parents[1]).plan()
    if not plan.holdout_counts.examples:
        return {}
    found: Metrics = {}
    for result in evaluate([str(checkpoint)], is_seen_allowed=True):
        found |= metrics.named(result["set"], result["metrics"])
    return found


def listing(facts: Averaged) -> str:
    """The same as lines of text."""
    members = facts["members"]
    shown = members if len(members) <= SHOWN else [*members[: SHOWN // 2], *members[-SHOWN // 2 :]]
    lines = [f"{each['weight']:.6f}  {each['ref']}" for each in shown]
    if len(shown) < len(members):
        lines.insert(SHOWN // 2, f"…  {len(members) - len(shown)} more")
    lines += facts["notes"]
    figures = "  ".join(f"{name} {value:.6g}" for name, value in facts["metrics"].items())
    return "\n".join([*lines, *([figures] if figures else []), f"averaged as {facts['ref']} ({facts['form']})"])
