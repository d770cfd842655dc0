"""Publishes milestones in a separate process beside the training. The training must never stop or wait for it.

`published/` records each one; after a kill or an outage, the next process publishes the missing ones, in order.
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from finetune.errors import FinetuneError, PublishError
from finetune.package import export
from finetune.package.publish.publish import Choices, publish
from finetune.package.publish.repository import CHECKPOINTS, Repository
from finetune.package.publish.to_folder import PREFIX
from finetune.package.verify.contents import sha256
from finetune.store import lock
from finetune.store.beside import remove
from finetune.store.checkpoints.store import Store, make_directory
from finetune.store.durable import replace_file
from finetune.store.run import journal, scan
from finetune.store.run.directory import RunDirectory, step_name

LOOK_SECONDS = 2.0


def start(run: Path) -> subprocess.Popen[bytes]:
    """The process; its output goes to `publish.log`. It ends after its stdin, once nothing is left to publish."""
    make_directory(run)
    command = [sys.executable, "-m", "finetune", "publish", str(run), "--milestones", "--follow"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with RunDirectory(run).publish_log.open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def finish(child: subprocess.Popen[bytes], run: Path) -> None:
    """Lets it publish the rest. Raises PublishError if it could not."""
    if child.stdin:
        child.stdin.close()
    if left := pending(run):
        print(f"publishing steps {left}", file=sys.stderr, flush=True)
    if child.wait():
        hint = f"the training is whole; look at {RunDirectory(run).publish_log}, then `finetune publish {run} --milestones`"
        raise PublishError(f"steps {pending(run)} are not published", where=str(run), hint=hint)


class Figures(TypedDict):
    tokens: int
    loss: float
    held_out_loss: NotRequired[float]
    sha256: dict[str, str]
    """Of the weights, by their files."""


class Milestone(Figures):
    """What is written down of one that is published."""

    run: str
    step: int
    branch: str
    revision: str | None


class Milestones(TypedDict):
    """What `publish --milestones --json` prints."""

    published: list[Milestone]
    pending: list[int]


def follow(
    run: Path, target: str | None, is_following: bool, is_public: bool = False, is_replacing: bool = False
) -> Milestones:
    """Publishes every committed and unpublished milestone; with `--follow`, also those committed until stdin ends. Returns
    {target, published: [{step, branch, revision}], pending}."""
    if target and target.startswith(PREFIX):
        hint = "use --to OWNER/NAME, or publish RUN@STEP to a folder"
        raise PublishError("milestones go to branches, and a folder has none", where=target, hint=hint)
    if not (is_following and run.is_dir()):
        RunDirectory(run).plan()  # RunError if there is no run; with --follow it may not have begun yet
    if is_following:
        os.nice(19)  # the training comes first
    is_last, store = not is_following, Store(run)
    published: list[Milestone] = []
    with _alone(run, is_following):
        while True:
            for step in pending(run, store):
                try:
                    published.append(_push(run, step, target, is_public, is_replacing))
                    print(f"published step {step}", file=sys.stderr, flush=True)
                except FinetuneError as error:
                    if is_last:
                        raise
                    print(f"step {step} has to wait: {error.message}", file=sys.stderr, flush=True)
                    break  # in order; retried in the next round
            if is_last:
                return {"published": published, "pending": pending(run, store)}
            readable, _, _ = select.select([sys.stdin], [], [], LOOK_SECONDS)
            is_last = bool(readable)  # end of stdin; nothing is ever written to it


@contextmanager
def _alone(run: Path, is_waiting: bool) -> Iterator[None]:
    """One process publishes a run at a time: one started by hand is refused, the one beside a training waits. Without locks on the file
    system two may run: their work is done once, or the Hub refuses it."""
    with RunDirectory(run).publish_log.open("ab") as log:
        try:
            lock.take(log.fileno(), is_waiting)
        except BlockingIOError:
            hint = f"wait for it; what it says is in {RunDirectory(run).publish_log}"
            raise PublishError("another process is publishing its milestones", where=str(run), hint=hint) from None
        yield


def pending(run: Path, store: Store | None = None) -> list[int]:
    """Committed and unpublished milestones, oldest first. Pass the same `store` each time: it reads each manifest once."""
    if not RunDirectory(run).is_run:  # the training has not begun yet
        return []
    asked = RunDirectory(run).plan()[0].recipe.publish
    every = asked.milestones.steps if asked and asked.milestones else None
    if every is None:
        return []
    steps = [item.step for item in (store or Store(run)).summaries() if item.step % every == 0]
    published = _published(run)
    return [step for step in steps if step not in published]


def _push(run: Path, step: int, target: str | None, is_public: bool, is_replacing: bool) -> Milestone:
    """One milestone: packaged, published on its own branch, listed on main, and recorded last. After an earlier kill all of this
    repeats, and finished parts change nothing."""
    asked = RunDirectory(run).plan()[0].recipe.publish
    if asked is None:
        raise PublishError("its recipe does not say where to", where=str(run), hint="set publish.repo in the recipe")
    repository, name = target or asked.repo, step_name(step)
    package = RunDirectory(run).package(step)
    if not package.exists():
        export.package(f"{run}@{step}", package)
    is_private = asked.private and not is_public
    facts = publish(package, repository, Choices(branch=name, is_private=is_private, is_replacing=is_replacing))
    record: Milestone = {
        "run": RunDirectory(run).plan()[1]["run"],
        "step": step,
        "branch": name,
        "revision": facts["revision"],
        **_figures(run, step, package),
    }
    _list(record, Repository(repository, is_private), is_replacing)
    remove(package)  # the run and the Hub have the weights
    make_directory(RunDirectory(run).published)
    replace_file(RunDirectory(run).publication(step), json.dumps(record).encode())
    return record


def _figures(run: Path, step: int, package: Path) -> Figures:
    events, steps = scan.read(run)
    evaluated = journal.evaluations(events).get(step, {})
    figures: Figures = {
        "tokens": sum(record["tokens"] for at, record in steps.items() if at <= step),
        "loss": steps[step]["loss"],
        "sha256": {path.name: sha256(path) for path in sorted(package.glob("*.safetensors"))},
    }
    return {**figures, "held_out_loss": evaluated["loss"]} if evaluated else figures


def _list(record: Milestone, repository: Repository, is_replacing: bool) -> None:
    """checkpoints.json on main: all milestones there, also those of other runs on their own branches."""
    head = repository.branches()["main"]
    document: dict[str, Any] = {}
    listed = [record]
    if CHECKPOINTS in repository.tree(head):
        try:
            document = {**json.loads(repository.read(head, CHECKPOINTS))}
            listed += [one for one in document["checkpoints"] if one.get("branch") != record["branch"]]
            listed.sort(key=lambda one: one["step"])
        except (ValueError, KeyError, TypeError, AttributeError):
            if not is_replacing:
                hint = "copy what you want to keep, then use --replace"
                message = f"would overwrite what people added: {CHECKPOINTS}"
                raise PublishError(message, where=repository.name, hint=hint) from None
            document, listed = {}, [record]
    content = json.dumps({**document, "checkpoints": listed}, indent=1) + "\n"
    repository.commit("main", {CHECKPOINTS: content.encode()}, head, f"List step {record['step']}")


def _published(run: Path) -> dict[int, Milestone]:
    """The records by step. An unreadable one is published again; this changes nothing on the Hub."""
    found: dict[int, Milestone] = {}
    for path in RunDirectory(run).publications():
        with suppress(ValueError, KeyError, TypeError):
            record: Milestone = json.loads(path.read_bytes())
            found[record["step"]] = record
    return found
