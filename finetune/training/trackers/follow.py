"""Feeds one tracker from the journal of a run, until the training has ended and all has arrived.

The journal is the queue: nothing is lost if this ends early, and the next one goes on.
"""

from importlib import import_module
from pathlib import Path

from finetune.store import lock
from finetune.store.companion import Alarm, HasEnded, Say
from finetune.store.durable import make_directory
from finetune.store.run.directory import RunDirectory
from finetune.store.run.follow import Follower
from finetune.store.told import without_secrets
from finetune.training.trackers import sent
from finetune.training.trackers.feed import Feed
from finetune.training.trackers.sent import Sent
from finetune.training.trackers.tracker import Has, Start, Starter, TakesBack, Tracker

LOOK_SECONDS = 1.0
CALL_SECONDS = 120
"""A client that takes longer for one batch hangs."""
BATCH = 1000  # records


def follow(run: Path, name: str, has_ended: HasEnded, say: Say, set_alarm: Alarm) -> None:
    """Until the training has ended and its figures are sent. Raises what the client does."""
    directory = RunDirectory(run)
    make_directory(directory.trackers)
    # One process feeds a tracker at a time: that of a killed training may still send its last figures.
    with directory.tracker_lock(name).open("ab") as file:
        lock.take(file.fileno(), is_waiting=True)
        plan, facts = directory.plan()
        start: Starter = import_module(f"{__package__}.{name}").start
        set_alarm(CALL_SECONDS)
        about = Start(directory, facts["run"], plan)
        tracker = start(about)
        say(without_secrets(tracker.place))
        stream = _Stream(about, name, tracker)
        seconds = 0.0
        is_last = False
        while not is_last:
            set_alarm(0)
            is_last, seconds = has_ended(seconds), LOOK_SECONDS
            is_caught_up = False
            while not is_caught_up:
                set_alarm(CALL_SECONDS)
                is_caught_up = stream.pass_on()
        tracker.finish()


class _Stream:
    """From the journal to the tracker, a batch at a time."""

    def __init__(self, about: Start, name: str, tracker: Tracker):
        self._run, self._name, self._tracker = about.run.path, name, tracker
        self._place = without_secrets(tracker.place)
        parent = about.plan.parent
        # The steps of its parent's are no figures of a branch.
        origin = Has(parent.step if parent else 0, parent.step - 1 if parent else -1)
        self._sent = known = sent.read(self._run, name) or Sent(*origin)
        if isinstance(tracker, TakesBack):
            # The newest step is sent again: a kill may come after an evaluation was logged, and before that is written down.
            tracker.back_to(known.step - 1)
            has = Has(known.step - 1, min(known.evaluated, known.step - 1))
        else:
            has = tracker.had or origin
        self._follower = Follower(self._run)
        is_known = has.step >= known.step - 1 and self._follower.go_to(known.read, known.before)
        place = known.read if is_known else self._follower.go_to_start()
        self._feed = Feed(tracker, about.plan, about.settings(name), has, place)
        self._feed.noted = known.noted

    def pass_on(self) -> bool:
        """Reads a batch and logs what it may. Whether that was all for now."""
        is_caught_up = True
        for count, line in enumerate(self._follower.read(), start=1):
            self._feed.hear(line)
            if count == BATCH:
                is_caught_up = False
                break
        self._feed.release(is_caught_up)
        place = self._feed.place_to_go_on
        now = Sent(*self._feed.has, self._feed.noted, place, self._follower.before(place), self._place)
        if now != self._sent:
            self._tracker.flush()
            sent.write(self._run, self._name, now)
            self._sent = now
        return is_caught_up
