"""Ranks that show each other that they are alive: one that is killed, hangs, fails or is a stranger."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.hosts.presence import Loss, Presence, UnreachableError

TOKEN, SILENCE_SECONDS = "secret", 0.5
RANK = """
import sys, time
from finetune.hosts.presence import Presence
presence = Presence(int(sys.argv[1]), float(sys.argv[3]), print)
presence.connect(["127.0.0.1"], int(sys.argv[2]), "secret", "here")
time.sleep(60)
"""


class Found:
    """What a rank was told."""

    def __init__(self) -> None:
        self.losses: list[Loss] = []
        self.is_there = threading.Event()

    def __call__(self, loss: Loss) -> None:
        self.losses.append(loss)
        self.is_there.set()


@pytest.fixture
def begin() -> Iterator[Callable[..., tuple[Presence, Found]]]:
    """Begins rank 0, and then others of it, in this process."""
    begun: list[Presence] = []
    port = 0

    def of(rank: int, silence_seconds: float = SILENCE_SECONDS, token: str = TOKEN) -> tuple[Presence, Found]:
        nonlocal port
        found = Found()
        begun.append(presence := Presence(rank, silence_seconds, found))
        if rank == 0:
            port = presence.listen(TOKEN, is_local=True)
        else:
            presence.connect(["127.0.0.1"], port, token, "here")
        presence.port = port  # type: ignore[attr-defined]
        return presence, found

    yield of
    for presence in reversed(begun):
        presence.leave()


@pytest.fixture
def process() -> Iterator[Callable[[int, int], subprocess.Popen]]:
    """Begins a rank in another process."""
    begun: list[subprocess.Popen] = []

    def of(rank: int, port: int) -> subprocess.Popen:
        words = [sys.executable, "-S", "-c", RANK, str(rank), str(port), str(SILENCE_SECONDS)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        begun.append(each := subprocess.Popen(words, env=environment))
        return each

    yield of
    for each in begun:
        each.kill()
        each.wait()


def introduced(presence: Presence, rank: int) -> bool:
    deadline = time.monotonic() + 20
    while all(peer.rank != rank for peer in list(presence._peers.values())):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return True


def test_ranks_that_live_and_leave_are_not_lost(begin) -> None:
    ranks = [begin(rank) for rank in range(3)]
    time.sleep(2 * SILENCE_SECONDS)
    for presence, _ in reversed(ranks):
        presence.leave()
    assert [found.losses for _, found in ranks] == [[], [], []]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_hangs_is_named_to_all_others(how, begin, process) -> None:
    # On a busy machine a living rank may be late by more than half a second.
    (first, found), (_, found_of_2) = begin(0, 3), begin(2, 3)
    one = process(1, first.port)
    assert introduced(first, 1)
    one.send_signal(how)
    assert found.is_there.wait(20) and found_of_2.is_there.wait(20)
    why = "has ended" if how == signal.SIGKILL else "gave no sign of life for 3 seconds"
    expected = Loss(1, socket.gethostname(), why, is_silent=how == signal.SIGSTOP)
    assert found.losses == found_of_2.losses == [expected]


def test_a_rank_that_fails_says_why_to_all_others(begin) -> None:
    (_, found), (failing, _), (_, found_of_2) = begin(0), begin(1), begin(2)
    failing.leave("runs/a: cannot write: no space left on device", "checkpoint")
    late = begin(3)[1]
    for each in (found, found_of_2, late):
        assert each.is_there.wait(20)
    assert found.losses == found_of_2.losses == late.losses
    (loss,) = found.losses
    assert (loss.rank, loss.why, loss.code) == (
        1,
        "failed: runs/a: cannot write: no space left on device",
        "checkpoint",
    )


def test_when_rank_0_ends_the_others_know(begin) -> None:
    (first, _), (_, found) = begin(0), begin(1)
    introduced(first, 1)
    first.leave(is_silent=True)
    assert found.is_there.wait(20)
    assert [(loss.rank, loss.why) for loss in found.losses] == [(0, "has ended")]


def test_a_stranger_and_garbage_change_nothing(begin) -> None:
    first, found = begin(0)
    begin(1, token="guessed")
    begin(1)
    said = (
        b"\xff\n",
        b"[]\n",
        b"7\n",
        b'{"lost": {}}\n',
        b"x" * 100_000,
        b'{"rank": "x", "host": "", "token": "secret"}\n',
        b'{"rank": 1, "host": "", "token": "\\ud800"}\n',
        b"[" * 19_000 + b"\n",
        b"",
    )
    for words in said:
        with socket.create_connection(("127.0.0.1", first.port)) as stranger:
            stranger.sendall(words)
    quiet = socket.create_connection(("127.0.0.1", first.port))
    assert introduced(first, 1)
    time.sleep(2 * SILENCE_SECONDS)
    assert quiet.recv(1000) == b""
    quiet.close()
    assert found.losses == [] and first._thread.is_alive()


def test_ranks_that_were_all_paused_blame_no_one(begin, monkeypatch) -> None:
    (first, found), (_, others) = begin(0), begin(1)
    assert introduced(first, 1)
    monotonic, paused = time.monotonic, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + paused)
    paused = 100.0
    time.sleep(2 * SILENCE_SECONDS)
    assert found.losses == others.losses == []


def test_an_address_without_a_rank_0_is_an_error_with_its_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    presence = Presence(1, SILENCE_SECONDS, print)
    with pytest.raises(UnreachableError, match=f"127.0.0.1:{port}: .*refused"):
        presence.connect(["127.0.0.1"], port, TOKEN, "here")
