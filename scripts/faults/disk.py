"""Small file systems in image files, for the scripts and tests that cut the power, fill a disk or take it away. Needs root."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNMOUNT_TRIES = 50


class CannotMount(Exception):
    """This machine or user may not mount images; the message says why."""


def make_image(path: Path, size: str) -> Path:
    """An empty ext4 without space that only root may use."""
    _run("truncate", "-s", size, path)
    _run("mkfs.ext4", "-q", "-m", "0", path)
    return path


@contextmanager
def mounted(image: Path, directory: Path) -> Iterator[str]:
    """The image's file system at the directory; yields the name of the loop device. Unmounts in any case."""
    directory.mkdir(parents=True, exist_ok=True)
    device = _run("losetup", "--find", "--show", image)
    try:
        _run("mount", device, directory)
        try:
            yield Path(device).name
        finally:
            _unmount(directory)
    finally:
        _run("losetup", "--detach", device)


def _unmount(directory: Path) -> None:
    """A process that was just killed may hold a file a little longer."""
    for _ in range(UNMOUNT_TRIES):
        with suppress(CannotMount):
            _run("umount", directory)
            return
        time.sleep(0.2)
    _run("umount", directory)


def _run(*command: object) -> str:
    try:
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CannotMount(str(error)) from error
    if result.returncode:
        raise CannotMount(f"{command[0]}: {result.stderr.strip()}")
    return result.stdout.strip()
