"""Any order of saves, kills, disk errors, retention, demotion and damage leaves a sound checkpoint, and loses no step that was committed."""

import errno
import itertools
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from finetune.errors import CheckpointError
from finetune.recipe.schema import Keep
from finetune.store.checkpoints import pruning
from finetune.store.checkpoints.manifest import Manifest, read
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.store.tensors import Tensor
from tests.lengths import length

OPERATIONS = ("open", "mkdir", "fsync", "link", "rename", "replace", "unlink", "rmdir")


class Killed(BaseException):
    """The process is gone: nothing catches it, and no file operation happens after it."""


@contextmanager
def struck(number: int, error: int | None):
    """The Nth file operation fails with an error number; without one, neither it nor any after it happens."""
    calls = itertools.count(1)

    def strike(operation):
        def struck_operation(*arguments, **options):
            now = next(calls)
            if error is None and now >= number:
                raise Killed
            if now == number:
                raise OSError(error, os.strerror(error))
            return operation(*arguments, **options)

        return struck_operation

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, strike(getattr(os, name)))
        yield


# None: no fault. A number of operations until a kill, or until an error.
FAULTS = st.none() | st.tuples(
    st.integers(1, 12) | st.integers(1, 45), st.sampled_from([None, errno.EIO, errno.ENOSPC])
)
RULES = st.builds(
    Keep,
    last=st.integers(1, 3),
    best=st.none() | st.integers(1, 2),
    every=st.none() | st.just("4 steps"),
    weights_every=st.sampled_from(["1 step", "2 steps", None]),
)


class Interleavings(RuleBasedStateMachine):
    """`held` says of each step what may be in its place now: `full`, `weights`, `damaged`, or None: nothing."""

    def __init__(self):
        super().__init__()
        # in memory, where there is such a place: this is about what happens in which order, not about a disk
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.place = Path(tempfile.mkdtemp(prefix="interleavings-", dir=memory))
        self.store = Store(self.place / "run")
        self.held: dict[int, set[str | None]] = {}
        self.losses: dict[int, float] = {}
        self.kinds: dict[tuple, str] = {}
        self.step = 0

    def teardown(self):
        shutil.rmtree(self.place)

    def attempt(self, work, fault) -> bool:
        """Does some work under a fault; whether all of it happened. After a fault the run is opened anew, and swept."""
        if fault is None:
            work()
            return True
        try:
            with struck(*fault):
                work()
        except (CheckpointError, Killed):
            self.store = Store(self.place / "run")
            self.store.sweep()
            return False
        return True

    def commit(self, step, loss):
        attempt = self.store.begin(step, "a1")
        attempt.write_tensors("model.safetensors", [Tensor("w", "F32", (2,), step.to_bytes(8, "big"))], {})
        attempt.write_tensors("optimizer.safetensors", [Tensor("m", "F32", (2,), bytes(8))], {})
        attempt.write_json("state.json", {"step": step})
        if newest := max(
            (item for item in self.store.checkpoints() if self.kind(item.path) != "damaged" and item.step != step),
            default=None,
            key=step_of,
        ):
            attempt.link("tokenizer.json", newest.path / "tokenizer.json", newest.manifest.files["tokenizer.json"])
        else:
            attempt.write_bytes("tokenizer.json", b"{}")
        facts = Manifest(run="r", attempt="a1", step=step, parent=None, plan_id="p", metrics={"loss": loss})
        committed = self.store.commit(attempt, facts)
        self.store.read_back(committed, attempt.files.keys())

    @rule(loss=st.integers(0, 5), fault=FAULTS)
    def save(self, loss, fault):
        self.step += 1
        self.losses[self.step] = loss
        is_done = self.attempt(lambda: self.commit(self.step, loss), fault)
        self.held[self.step] = {"full"} if is_done else {"full", None}

    @precondition(lambda self: self.again())
    @rule(fault=FAULTS)
    def save_again(self, fault):
        """After a fall-back, the step of a damaged or demoted checkpoint is reached and committed again."""
        step = self.again()[0]
        is_done = self.attempt(lambda: self.commit(step, self.losses[step]), fault)
        before = self.held[step]
        self.held[step] = {"full"} if is_done else before | ({"full"} if "weights" in before else {"full", None})

    @precondition(lambda self: len(self.steps("full")) > 1)
    @rule(fault=FAULTS, choice=st.integers(0, 20))
    def demote(self, fault, choice):
        older = sorted(self.steps("full"))[:-1]
        step = older[choice % len(older)]
        is_done = self.attempt(lambda: self.store.demote(self.store.find(step)), fault)
        self.held[step] = {"weights"} if is_done else {"full", "weights"}

    @precondition(lambda self: len(self.steps("full")) > 1)
    @rule(keep=RULES, fault=FAULTS)
    def prune(self, keep, fault):
        actions = pruning.due(self.store, keep, {}, {f"step-{step:08d}" for step in self.steps("damaged")})
        best = min(self.steps("full", "weights"), key=lambda step: (self.losses[step], -step), default=None)
        removed = {item.step for item, action in actions if action == "remove"}
        assert not removed & {best, max(self.steps("full"), default=None)}
        is_done = self.attempt(lambda: pruning.apply(self.store, actions, lambda *_: None), fault)
        for item, action in actions:
            after = "weights" if action == "demote" else None
            self.held[item.step] = {after} if is_done else self.held[item.step] | {after}

    @precondition(lambda self: len(self.steps("full")) > 1 and not self.steps("damaged"))
    @rule(name=st.sampled_from(["state.json", "model.safetensors", "manifest.json"]))
    def damage_the_newest(self, name):
        step = max(self.steps("full"))
        path = self.store.directory / f"step-{step:08d}" / name
        content = bytearray(path.read_bytes())
        content[-10] ^= 1
        path.unlink()  # it is read-only
        path.write_bytes(content)
        self.held[step] = {"damaged"}

    @invariant()
    def what_was_committed_is_there_and_sound(self):
        paths = self.store.directory.iterdir() if self.store.directory.is_dir() else ()
        found = {int(path.name.removeprefix("step-")): self.kind(path) for path in paths}
        assert found.keys() <= self.held.keys()
        for step, may_be in self.held.items():
            assert found.get(step) in may_be, (step, found.get(step), may_be)
        self.held = {step: {kind} for step, kind in found.items()}
        newest, _ = self.store.newest_sound()
        assert (newest and newest.step) == max(self.steps("full"), default=None)

    def kind(self, path: Path) -> str:
        """What is in a checkpoint's place; the same bytes are verified once."""
        content = tuple(sorted((entry.name, Path(entry).read_bytes()) for entry in os.scandir(path)))
        if content not in self.kinds:
            self.kinds[content] = "damaged" if verify(path) else read(path).manifest.kind
        return self.kinds[content]

    def steps(self, *kinds: str) -> list[int]:
        return [step for step, may_be in self.held.items() if may_be <= set(kinds)]

    def again(self) -> list[int]:
        """The steps that a resume from the newest full checkpoint comes to again, in their order."""
        newest = max(self.steps("full"), default=0)
        return sorted(step for step in self.steps("damaged", "weights") if step > newest)


def step_of(checkpoint) -> int:
    return checkpoint.step


def check(examples: int) -> None:
    run_state_machine_as_test(
        Interleavings,
        settings=settings(
            max_examples=examples,
            stateful_step_count=20,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_random_interleavings_lose_nothing():
    check(examples=length(200, 1000))
