"""Two hosts on this machine: network namespaces with a cable between them, and a name each. Needs root and `ip` (iproute2)."""

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000  # of sched.h
CABLE = "cable0"


class CannotConnect(Exception):
    """This machine or user may not make network namespaces; the message says why."""


class Host(NamedTuple):
    name: str
    address: str

    def enter(self) -> None:
        """Moves this process, and what it starts from now on, to the host. For `preexec_fn`."""
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = os.open(Path("/var/run/netns", self.name), os.O_RDONLY)
        if libc.setns(descriptor, CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), "cannot enter a namespace")
        os.close(descriptor)
        socket.sethostname(self.name)

    def plug(self, is_in: bool) -> None:
        """Plugs its cable in or out."""
        _ip("-n", self.name, "link", "set", CABLE, "up" if is_in else "down")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both, for as long as the context lasts."""
    names = [f"host-{letter}-{os.getpid()}" for letter in "ab"]
    hosts = Host(names[0], "10.77.0.1"), Host(names[1], "10.77.0.2")
    made = []
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            made.append(host)
        _ip("-n", names[0], "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", CABLE)
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.plug(True)
        yield hosts
    finally:
        for host in made:
            _ip("netns", "delete", host.name)


def _ip(*words: str) -> None:
    try:
        result = subprocess.run(["ip", *words], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CannotConnect(str(error)) from error
    if result.returncode:
        raise CannotConnect(f"ip {' '.join(words)}: {result.stderr.strip()}")
