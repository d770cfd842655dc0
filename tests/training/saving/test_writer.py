"""One save after the other, two at most; what goes wrong in one is heard by training, and a disk that hangs holds nothing up for ever."""

import threading

import pytest

from finetune.errors import CheckpointError
from finetune.training.saving import writer as writers
from finetune.training.saving.writer import Writer


@pytest.fixture
def gate():
    """An event that saves wait for; set at the end, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def writer(gate):
    made = Writer()
    yield made
    gate.set()
    made.close()


def test_saves_are_done_in_their_order(writer):
    done = []
    for step in range(20):
        writer.make_room()
        writer.submit(step, 0, lambda step=step: done.append(step))
    writer.finish()
    assert done == list(range(20))


def test_a_third_save_waits_for_the_first(writer, gate):
    writer.submit(1, 0, gate.wait)
    writer.make_room()
    writer.submit(2, 0, gate.wait)
    waiting = threading.Thread(target=writer.make_room, daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    gate.set()
    waiting.join(60)
    assert not waiting.is_alive()


def test_what_goes_wrong_is_raised_to_whoever_asks_and_later_saves_are_not_begun(writer):
    done = []

    def fail() -> None:
        raise CheckpointError("the disk said no")

    writer.submit(1, 0, fail)
    writer.submit(2, 0, lambda: done.append(2))
    for ask in (writer.finish, writer.make_room, writer.check):
        with pytest.raises(CheckpointError, match="the disk said no"):
            ask()
    writer.close()
    assert not done


def test_a_save_that_hangs_is_named_and_only_then_holds_training_up_and_not_for_ever(writer, gate, monkeypatch):
    monkeypatch.setattr(writers, "STALL_SECONDS", 0.2)
    writer.submit(7, 0, gate.wait)
    assert writer.check() is None
    writer.submit(8, 0, gate.wait)
    with pytest.raises(CheckpointError, match="the save of step 7 has not ended for 0 s\nhint: the disk hangs"):
        writer.make_room()
    assert writer.check() == 7
    with pytest.raises(CheckpointError, match="the save of step 7"):
        writer.finish()
    writer.close()


def test_large_saves_have_more_time(writer, gate):
    writer.submit(1, int(100 * writers.SLOWEST_DISK), gate.wait)
    assert writer._jobs[0].limit_seconds == writers.STALL_SECONDS + 100


def test_a_writer_that_died_is_noticed(monkeypatch):
    monkeypatch.setattr(Writer, "_run", lambda self: None)
    writer = Writer()
    writer._thread.join()
    for ask in (writer.check, writer.make_room, writer.finish):
        with pytest.raises(CheckpointError, match="the writer of checkpoints died\nhint: run the same command again"):
            ask()
