"""A run with kills, a fall-back and rollbacks, as its journal tells it, for every tracker; and what a tracker then must have."""

import os
import random
import secrets
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from finetune.recipe.schema.trackers import SECTIONS
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.training.trackers import follow, sent

ROOT = Path(__file__).parents[3]
PLANNED = ROOT / "tests/fixtures/run_before_rooms/runs"
STEPS, EVERY_COMMIT, EVERY_EVALUATION = 24, 4, 3

Figures = dict[str, dict[int, list[float]]]
"""Values by figure and step; more than one where a step is there twice."""


ONE_RUN_A_PROCESS = ("wandb", "aim")


class Killed(BaseException):
    """Stands for SIGKILL: a client does not hear of it."""


class Told:
    """A run whose journal this writes, as trainings would that are killed."""

    def __init__(self, path: Path, name: str, guard: Mapping[str, object] | None = None, source: str = "older"):
        path.mkdir()
        self.run = path
        plan, facts = RunDirectory(PLANNED / source).plan()
        recipe = plan.recipe
        changes = {"track": [SECTIONS[name](name=name)], "guard": recipe.guard.model_copy(update=guard or {})}
        self.plan = plan.model_copy(update={"recipe": recipe.model_copy(update=changes), "steps": STEPS})
        facts["run"] = secrets.token_hex(8)  # some clients keep their place for the life of a process
        RunDirectory(path).plan_file.write_bytes(self.plan.dump(facts))
        self.attempts = 0
        self.step = self.first = self.plan.parent.step if self.plan.parent else 0
        self.skipped: list[int] = []
        """The first step of each span that a rollback skips: from it on, figures are others."""
        self.committed = [self.step]
        self.newest = 0

    def begin(self, step: int) -> None:
        self.attempts += 1
        self.step = step
        self.committed = [each for each in self.committed if each <= step]
        self._event("started", step=step)
        if step == self.first:
            self._evaluate()

    def train(self, until: int) -> None:
        while self.step < until:
            self.step += 1
            self.newest = max(self.newest, self.step)
            loss = 1 / self.step + self._way()
            figures = {"loss": loss, "grad_norm": loss / 2, "learning_rate": 1e-3, "tokens": 100 + self.step}
            self._append({"kind": "step", "step": self.step, **figures, "seconds": 0.5})
            if self.step % EVERY_EVALUATION == 0:
                self._evaluate()
            if self.step % EVERY_COMMIT == 0 or self.step == STEPS:
                self.committed.append(self.step)
                self._event("committed", step=self.step)

    def roll_back(self, span: int) -> None:
        first = self.step + 1 - span + 1
        to = max(each for each in self.committed if each < first)
        about = {"action": "rollback", "reason": "spike", "first": first, "last": self.step + 1, "to": to}
        self._event("amended", step=self.step + 1, message="loss 9 is far above", **about)
        self.committed = [each for each in self.committed if each <= to]
        self.step = to
        self.skipped.append(first)
        self.newest = first - 1

    def _way(self) -> int:
        return sum(first <= self.step for first in self.skipped)

    def _evaluate(self) -> None:
        self._event("evaluated", step=self.step, loss=2 / (self.step + 1) + self._way(), perplexity=3.0)

    def _event(self, name: str, **figures: object) -> None:
        self._append({"kind": "event", "event": name, **figures})

    def _append(self, record: dict) -> None:
        writer = journal.Journal(self.run)
        writer.append({**record, "attempt": f"attempt-{self.attempts}", "time": journal.now()})
        writer.close()

    def expected(self) -> Figures:
        """What the run counts: each figure at its step once."""
        records = journal.read(self.run)
        found: Figures = {}
        for step, record in journal.steps(records).items():
            for name in ("loss", "grad_norm", "learning_rate", "tokens", "seconds"):
                found.setdefault(name, {})[step] = [record[name]]
        for step, metrics in journal.evaluations(records).items():
            found.setdefault("held_out_loss", {})[step] = [metrics["loss"]]
        return found


def feed(run: Path, name: str, write: Callable[..., None] = sent.write) -> None:
    """All that is there now, to its end or until `write` raises `Killed`."""
    if name not in ONE_RUN_A_PROCESS:
        _follow(run, name, write)
    elif pid := os.fork():
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    else:
        code = 1
        try:
            _follow(run, name, write)
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)  # as a kill would: the client does not hear of it


def _follow(run: Path, name: str, write: Callable[..., None]) -> None:
    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(sent, "write", write)
        follow.follow(run, name, lambda seconds: True, lambda line: None, lambda seconds: None)


def tell(told: Told, name: str, kills: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills the training at any step, and the feeding at any batch: before what arrived is written down, or after."""
    draw = random.Random(kills)
    monkeypatch.setattr(follow, "BATCH", 3)
    for kill in range(kills):
        told.begin(draw.choice(told.committed[-2:]))  # a fall-back, where it is not the newest
        told.train(min(told.step + draw.randint(1, 9), STEPS - 1))
        if kill % 7 == 3 and told.plan.recipe.guard.spike == "rollback":
            told.train(told.newest)  # what ran before comes out as it did, so no new spike is among it
            feed(told.run, name)
            told.roll_back(told.plan.recipe.guard.span)
            told.train(min(told.step + 2, STEPS - 1))
        feed(told.run, name, _deadly(draw.randint(0, 3)))
    told.begin(told.committed[-1])
    told.train(STEPS)
    feed(told.run, name)


def _deadly(left: int) -> Callable[..., None]:
    """Kills before or after something is written down."""
    write = sent.write

    def die(*arguments: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            write(*arguments)
        if left <= 0:
            raise Killed

    return die


def assert_each_once(has: Figures, told: Told, lacks: Callable[[str, int], bool] = lambda name, step: False) -> None:
    expected = {
        name: {step: values for step, values in figures.items() if not lacks(name, step)}
        for name, figures in told.expected().items()
    }
    for name, figures in expected.items():
        assert {step: len(values) for step, values in has[name].items()} == dict.fromkeys(figures, 1), name
        for step, values in figures.items():
            assert has[name][step] == pytest.approx(values, rel=1e-6), f"{name} of step {step}"
