"""Runs an image as an engine without Docker: its entrypoint as PID 1, as its user, on a root file system that is read-only but for volumes
and the host's devices.

`scripts/container` says where the image's files and its configuration are.
"""

import json
import os
import shlex
import signal
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Image:
    root: Path
    """All its files, as a container sees them."""
    config: dict
    archive: Path
    """Its layers, as `docker save` writes them."""

    def layers(self) -> Iterator[tarfile.TarFile]:
        with tarfile.open(self.archive) as archive:
            (facts,) = json.load(archive.extractfile("manifest.json"))
            for name in facts["Layers"]:
                with tarfile.open(fileobj=archive.extractfile(name)) as layer:
                    yield layer

    def command(self, arguments: list[str], user: str, set_variables: Mapping[str, str]) -> list[str]:
        """What runs inside, once `/` is the image: as `docker run --user USER --env … IMAGE ARGUMENTS`."""
        variables = [*self.config["Env"], *(f"{name}={value}" for name, value in set_variables.items())]
        inside = ["env", "--ignore-environment", f"--chdir={self.config['WorkingDir']}", *variables]
        return ["chroot", f"--userspec={user}", "--groups=", str(self.root), *inside, *arguments]


def from_environment() -> Image:
    root, _, place = os.environ["FINETUNE_TEST_IMAGE"].partition(":")
    found = json.loads(Path(place, "image.json").read_text())
    config = found[0]["Config"] if isinstance(found, list) else found["Docker"]["config"]  # of Docker, or of buildah
    return Image(Path(root), config, Path(place, "image.tar"))


class Container:
    """A process with its own pids and mounts. `volumes` are host folders by their place inside; those of `read_only` cannot be written there."""

    def __init__(
        self,
        image: Image,
        *arguments: object,
        volumes: Mapping[str, Path],
        read_only: Mapping[str, Path] | None = None,
        user: str | None = None,
        **variables: str,
    ):
        self.image, self.user = image, user or image.config["User"]
        self.variables = {"OMP_NUM_THREADS": "1"} | variables
        words = [str(argument) for argument in arguments] or image.config["Cmd"]
        root = shlex.quote(str(image.root))
        lines = ["set -eu", f"mount --bind {root} {root}", f"mount -o remount,bind,ro {root}"]
        lines += [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        for place, folder in volumes.items():
            lines.append(f"mount --bind {shlex.quote(str(folder))} {root}{place}")
        for place, folder in (read_only or {}).items():
            lines += [f"mkdir -p {root}{place}", f"mount --bind {shlex.quote(str(folder))} {root}{place}"]
            lines.append(f"mount -o remount,bind,ro {root}{place}")
        inside = image.command([*image.config["Entrypoint"], *words], self.user, self.variables)
        lines.append(f"exec {shlex.join(inside)}")
        command = [
            "unshare",
            "--pid",
            "--fork",
            "--mount",
            "--ipc",
            "--uts",
            "sh",
            "-c",
            "\n".join(lines),
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: object) -> None:
        for first in psutil.Process(self.process.pid).children() if self.process.poll() is None else ():
            first.kill()  # all of the container ends with it
        self.process.communicate()

    @property
    def pid_1(self) -> psutil.Process:
        return psutil.Process(self.process.pid).children()[0]

    def stop(self) -> None:
        """As `docker stop`, which waits before it kills."""
        self.pid_1.send_signal(getattr(signal, self.image.config["StopSignal"]))

    def execute(self, *words: str) -> subprocess.CompletedProcess:
        """As `docker exec`."""
        enter = ["nsenter", f"--target={self.pid_1.pid}", "--pid", "--mount", "--ipc", "--uts"]
        inside = self.image.command([*words], self.user, self.variables)
        return subprocess.run([*enter, *inside], capture_output=True, text=True, timeout=60)

    def end(self, seconds: float = 300) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, when it has ended."""
        stdout, stderr = self.process.communicate(timeout=seconds)
        return self.process.returncode, stdout, stderr
