"""Keeps the mirror of a run up to date: beside a training until that has ended, or once by hand."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from finetune.errors import MirrorError, RunError
from finetune.recipe.addresses import problem_of
from finetune.recipe.schema import Mirror
from finetune.store import lock
from finetune.store.companion import Alarm, HasEnded, Say
from finetune.store.mirror.opening import opened
from finetune.store.mirror.owner import TakenOverError, UnusableError, Writer
from finetune.store.mirror.sender import Sender
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory

LOOK_SECONDS = 2.0
CALL_SECONDS = 300
"""A client that sends nothing for longer hangs."""
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 2.0, 300.0
LAST_TRIES = 6
"""After the training has ended: in two minutes."""


class Mirrored(TypedDict):
    """What `mirror --json` prints."""

    mirror: str
    sent: list[int]
    """Steps that were sent now."""
    steps: list[int]
    """Steps in the mirror."""
    missing: list[int]
    """Steps that belong there and could not be sent."""


def rules_of(run: Path) -> Mirror | None:
    """The section `mirror` of the run's recipe."""
    return RunDirectory(run).plan()[0].recipe.mirror


def writer_of(run: Path, rules: Mirror) -> Writer:
    """A writer that has not taken the mirror yet. MirrorError if the client for its address is not installed."""
    name = run.absolute().name
    return Writer(opened(rules.place_of(name)), RunDirectory(run).plan()[1]["run"], run, journal.now())


def send(run: Path, to: str | None) -> Mirrored:
    """Sends what the mirror of a run lacks; `to` names another one than the recipe. RunError if another process does it."""
    rules = rules_of(run)
    if to and (problem := problem_of(to)):
        raise MirrorError(f"the address of a mirror {problem}")
    if to:
        rules = Mirror(to=to) if rules is None else Mirror(to=to, every=rules.every, keep=rules.keep)
    if rules is None:
        raise RunError(
            "its recipe names no mirror", where=str(run), hint="name one with --to, or in the recipe with `mirror`"
        )
    writer = writer_of(run, rules)
    with _alone(run, is_waiting=False):
        writer.take(_print)
        sender = Sender(run, rules, writer, _print, lambda: None)
        sent = sender.round(is_last=True)
        missing = sender.lacks()
        writer.release()
    return {"mirror": writer.bucket.place, "sent": sent, "steps": sender.steps, "missing": missing}


def listing(facts: Mirrored) -> str:
    """The same for a reader."""
    lines = [f"{facts['mirror']} has steps {', '.join(map(str, facts['steps'])) or 'none'}"]
    if facts["missing"]:
        lines.append(f"not mirrored: steps {', '.join(map(str, facts['missing']))}")
    return "\n".join(lines)


def follow(run: Path, has_ended: HasEnded, say: Say, set_alarm: Alarm) -> None:
    """Until the training has ended and all is sent. MirrorError if not all could be sent, or another process has taken the mirror over."""
    rules = rules_of(run)
    if rules is None:
        return
    with _alone(run, is_waiting=True):
        writer, sender = writer_of(run, rules), None
        say(writer.bucket.place)
        pause, seconds, tries, is_taken = RETRY_SECONDS, 0.0, 0, False
        while True:
            set_alarm(0)
            is_last = has_ended(seconds)
            set_alarm(CALL_SECONDS)
            try:
                if not is_taken:
                    writer.take(say)
                    is_taken = True
                sender = sender or Sender(run, rules, writer, say, lambda: set_alarm(CALL_SECONDS))
                sender.round(is_last)
                if is_last:
                    writer.release()
                    return
                pause, seconds = RETRY_SECONDS, LOOK_SECONDS
            except (TakenOverError, UnusableError) as error:
                say(f"{error.message}; {error.hint}")
                set_alarm(0)
                while not has_ended(LONGEST_RETRY_SECONDS):
                    continue
                raise
            except MirrorError as error:
                tries += is_last
                if tries == LAST_TRIES:
                    raise
                say(f"{error.message}; trying again")
                sender = None
                seconds, pause = pause, min(2 * pause, LONGEST_RETRY_SECONDS)
                if is_last:
                    set_alarm(0)
                    time.sleep(seconds)


@contextmanager
def _alone(run: Path, is_waiting: bool) -> Iterator[None]:
    """One process mirrors a run directory at a time: one started by hand is refused, the one beside a training waits."""
    with RunDirectory(run).mirror_lock.open("ab") as file:
        try:
            lock.take(file.fileno(), is_waiting)
        except BlockingIOError:
            hint = "it sends all; wait for its end"
            raise RunError("another process mirrors this run", where=str(run), hint=hint) from None
        yield


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
