"""Ranks show each other that they are alive, beside training: each has a connection to rank 0.

A collective tells late of a lost rank (gloo's give up after half an hour), and names none. Here the connection of a killed rank
closes, and one that hangs or was cut off falls silent. It never ends a process: it calls back, once, with what was lost.
"""

import json
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

BEATS = 6  # in the seconds after which a silent rank is lost: a few may be late
SHORTEST_BEAT_SECONDS, LONGEST_BEAT_SECONDS = 0.05, 5.0
REACH_SECONDS = 10.0
LINGER_SECONDS = 1.0
MOST_BYTES = 20_000  # of a line: a stranger may connect too


class UnreachableError(Exception):
    """No address of rank 0 can be reached from here."""


@dataclass(frozen=True)
class Loss:
    """The rank that was lost, and why."""

    rank: int
    host: str
    why: str
    is_silent: bool = False
    """Whether it may still be connected: then no collective fails by itself."""
    code: str = ""
    """That of its error, if it is one for you to fix."""


@dataclass
class _Peer:
    """The other end of a connection."""

    connection: socket.socket
    rank: int | None = None
    """None until it has introduced itself."""
    host: str = ""
    heard: float = field(default_factory=time.monotonic)
    """When something came from it, on the clock `time.monotonic`."""
    bytes: bytes = b""


class Presence:
    """A thread that beats and listens. `lost` is called in it at most once, for the first rank that is lost."""

    def __init__(self, rank: int, silence_seconds: float, lost: Callable[[Loss], None]):
        self.rank = rank
        self._silence_seconds = silence_seconds
        self._beat_seconds = min(LONGEST_BEAT_SECONDS, max(SHORTEST_BEAT_SECONDS, silence_seconds / BEATS))
        self._lost = lost
        self._loss: Loss | None = None
        self._token = ""
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, _Peer] = {}
        """By descriptor."""
        self._listener: socket.socket | None = None
        self._wake, self._woken = socket.socketpair()
        self._last_words: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def listen(self, token: str, is_local: bool) -> int:
        """On rank 0: the port that the others connect to. `token`: what they prove with that they belong to this training."""
        self._token = token
        if is_local or not socket.has_dualstack_ipv6():
            self._listener = socket.create_server(("127.0.0.1" if is_local else "", 0))
        else:
            self._listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread.start()
        return int(self._listener.getsockname()[1])

    def connect(self, addresses: list[str], port: int, token: str, host: str) -> None:
        """On any other rank. `host`: the name of rank 0's. UnreachableError if no address answers."""
        problems = []
        for address in dict.fromkeys(addresses):
            try:
                connection = socket.create_connection((address, port), timeout=REACH_SECONDS)
            except OSError as error:
                problems.append(f"{address}:{port}: {error}")
                continue
            peer = self._add(connection, rank=0, host=host)
            self._send(peer, {"rank": self.rank, "host": socket.gethostname(), "token": token})
            self._thread.start()
            return
        raise UnreachableError("; ".join(problems))

    @property
    def is_connected(self) -> bool:
        """Whether any other rank still is."""
        return bool(self._peers)

    def leave(self, error: str | None = None, code: str = "", is_silent: bool = False) -> None:
        """Ends the thread, after it has told the others that this rank ends: well or because another one was lost, or by an error of its
        own, with its code. `is_silent`: it tells nothing, so this rank counts as killed."""
        self._last_words = {} if is_silent else {"ended": error and [error, code]}
        with suppress(OSError):  # it has ended
            self._wake.send(b".")
        self._thread.join()

    def _add(self, connection: socket.socket, rank: int | None = None, host: str = "") -> _Peer:
        connection.setblocking(False)
        peer = self._peers[connection.fileno()] = _Peer(connection, rank, host)
        self._selector.register(connection, selectors.EVENT_READ)
        return peer

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        del self._peers[peer.connection.fileno()]
        peer.connection.close()

    def _run(self) -> None:
        self._selector.register(self._woken, selectors.EVENT_READ)
        beat_at = 0.0
        while self._last_words is None:
            if time.monotonic() >= beat_at:
                for peer in list(self._peers.values()):
                    self._send(peer, {})
                beat_at = time.monotonic() + self._beat_seconds
            self._hear(max(0.0, beat_at - time.monotonic()))
            if time.monotonic() > beat_at + self._beat_seconds:  # this process was paused itself, and perhaps all were
                self._forgive_silence()
            self._judge_silence()
        self._say_goodbye()

    def _hear(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._listener:
                with suppress(OSError):  # it went away again
                    self._add(self._listener.accept()[0])
            elif key.fd in self._peers:
                self._read(self._peers[key.fd])

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(MOST_BYTES)
        except BlockingIOError:
            return
        except OSError:  # reset: its process was killed, or its host gave up
            data = b""
        peer.heard = time.monotonic()
        peer.bytes += data
        *lines, peer.bytes = peer.bytes.split(b"\n")
        for line in lines:
            if not self._take(peer, line):
                self._drop(peer)
                return
        if len(peer.bytes) > MOST_BYTES or (not data and peer.rank is None):
            self._drop(peer)
        elif not data:
            self._drop(peer)
            self._conclude(Loss(peer.rank or 0, peer.host, "has ended"))

    def _take(self, peer: _Peer, line: bytes) -> bool:
        """Whether the connection stays."""
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            return False
        if peer.rank is None:
            return self._introduce(peer, said)
        if lost := said.get("lost"):
            self._conclude(Loss(**lost))
        elif "ended" in said:
            if error := said["ended"]:
                self._conclude(Loss(peer.rank, peer.host, f"failed: {error[0]}", code=error[1]))
            return False
        return True

    def _introduce(self, peer: _Peer, said: object) -> bool:
        """Whether it belongs to this training. Anybody may connect and say anything."""
        match said:
            case {"rank": int(rank), "host": str(host), "token": str(token)}:
                if secrets.compare_digest(token.encode(errors="surrogatepass"), self._token.encode()):
                    peer.rank, peer.host = rank, host
                    if self._loss:  # it came late
                        self._send(peer, {"lost": asdict(self._loss)})
        return peer.rank is not None

    def _forgive_silence(self) -> None:
        for peer in self._peers.values():
            peer.heard = time.monotonic()

    def _judge_silence(self) -> None:
        now = time.monotonic()
        for peer in list(self._peers.values()):
            if now - peer.heard <= self._silence_seconds:
                continue
            if peer.rank is None:
                self._drop(peer)
            elif not self._loss:
                why = f"gave no sign of life for {self._silence_seconds:g} seconds"
                self._conclude(Loss(peer.rank, peer.host, why, is_silent=True))

    def _conclude(self, loss: Loss) -> None:
        if self._loss or self._last_words is not None:
            return
        self._loss = loss
        if self.rank == 0:  # it alone sees all
            for peer in list(self._peers.values()):
                self._send(peer, {"lost": asdict(loss)})
        self._lost(loss)

    def _send(self, peer: _Peer, words: dict[str, Any]) -> None:
        if peer.rank is None:
            return
        with suppress(OSError):  # full: the other end does not read, and is silent soon; closed: reading tells
            peer.connection.send(json.dumps(words).encode() + b"\n")

    def _say_goodbye(self) -> None:
        """Waits a moment for the others to read it: closing with unread bytes would throw away what was sent."""
        for peer in list(self._peers.values()):
            if self._last_words:
                self._send(peer, self._last_words)
            with suppress(OSError):
                peer.connection.shutdown(socket.SHUT_WR)
        self._selector.unregister(self._woken)
        until = time.monotonic() + LINGER_SECONDS
        while self._peers and (left := until - time.monotonic()) > 0:
            self._hear(left)
        for peer in list(self._peers.values()):
            self._drop(peer)
        if self._listener:
            self._listener.close()
        self._selector.close()
        self._wake.close()
        self._woken.close()
