"""Small file systems in image files, for the scripts and tests that cut the power, fill a disk or take it away. Needs root."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
            _run("umount", directory)
    finally:
        _run("losetup", "--detach", device)


def _run(*command: object) -> str:
    try:
        result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise CannotMount(str(error)) from error
    if result.returncode:
        raise CannotMount(f"{command[0]}: {result.stderr.strip()}")
    return result.stdout.strip()
