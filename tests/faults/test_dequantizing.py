"""A base is dequantized on a full disk, by two processes at once, and until it is killed or the power fails: it is whole, or made again."""

import array
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.errors import FinetuneError
from finetune.model import base
from finetune.model.base.dequantized import files
from finetune.recipe.schema import Base
from finetune.store import cache
from scripts.faults.disk import mounted
from tests import forks
from tests.faults.test_disks import FS_IOC_SHUTDOWN, NO_FLUSH, fill, image  # noqa: F401 a fixture
from tests.model.quantizing import quantize

SAID = "dequantizing small (fp8), once"
FILES, CACHE = "finetune.model.base.dequantized.files", "finetune.store.cache"
SHARD_BYTES = 10_000
DEQUANTIZE = f"""
import importlib, os, signal, sys
from finetune.model import base
from finetune.model.base.dequantized import files
from finetune.recipe.schema import Base
files.SHARD_BYTES = {SHARD_BYTES}
named, *killed_at = Base(checkpoint=sys.argv[1]), *sys.argv[2:]
if killed_at:
    owner, name, left = importlib.import_module(killed_at[0]), killed_at[1], [int(killed_at[2])]
    original = getattr(owner, name)
    def killing(*arguments):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)
    setattr(owner, name, killing)
base.directory(named, base.pin(named))
"""


@pytest.fixture
def small(tiny_base, tmp_path, monkeypatch) -> tuple[Base, dict[str, torch.Tensor]]:
    """A base in fp8 that becomes several shards, in a cache of this test, and the numbers that it stands for."""
    numbers = quantize(tiny_base, tmp_path / "small", "fp8")
    monkeypatch.setattr(files, "SHARD_BYTES", SHARD_BYTES)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return Base(checkpoint=str(tmp_path / "small")), numbers


def made(named: Base) -> Path:
    return base.directory(named, base.pin(named))


def assert_whole(directory: Path, numbers: dict[str, torch.Tensor]) -> None:
    shards = sorted(directory.glob("*.safetensors"))
    found = {name: tensor for file in shards for name, tensor in load_file(file).items()}
    assert len(shards) > 3 and found.keys() == numbers.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in numbers.items())
    assert cache.is_sound(directory)
    assert [each.name for each in directory.parent.iterdir()] == [directory.name], "nothing half-made is left"


def start(named: Base, *killed_at: object) -> subprocess.Popen:
    """A process that dequantizes. It may be killed as it comes to a function (module, name) for the so many-th time."""
    command = [sys.executable, "-c", DEQUANTIZE, named.checkpoint, *map(str, killed_at)]
    return forks.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> tuple[int, int]:
    """Its exit code, and how often it said that it dequantizes."""
    said = process.communicate(timeout=100)[1]
    assert "Traceback" not in said, said
    return process.returncode, said.count(SAID)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (FILES, "_save", 1),
        (FILES, "_save", 3),
        (FILES, "write_small_files", 1),
        (CACHE, "_seal", 1),
        (CACHE, "_put", 1),
    ],
    ids=["first shard", "third shard", "small files", "seal", "name"],
)
def test_a_killed_dequantizing_leaves_nothing_half_made(module, name, call, small) -> None:
    named, numbers = small
    assert ended(start(named, module, name, call)) == (-signal.SIGKILL, 1)
    assert all(each.name.endswith(cache.UNFINISHED) for each in (cache.root() / "dequantized").iterdir())
    assert ended(start(named)) == (0, 0 if name == "_put" else 1), "a sealed one only needs its name"
    assert_whole(made(named), numbers)


@pytest.mark.slow
def test_two_processes_dequantize_a_base_once(small) -> None:
    named, numbers = small
    found = [ended(process) for process in [start(named), start(named)]]
    assert sorted(found) == [(0, 0), (0, 1)]
    assert_whole(made(named), numbers)


@pytest.mark.slow
@pytest.mark.parametrize("room", [20 << 10, 64 << 10], ids=["in a shard", "later"])
def test_a_full_disk_is_said_and_leaves_nothing_half_made(room, small, image, tmp_path, monkeypatch) -> None:  # noqa: F811
    named, numbers = small
    with mounted(image, tmp_path / "disk"):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "disk"))
        (cache.root() / "dequantized").mkdir()
        fill(tmp_path / "disk/filler")
        with (tmp_path / "disk/filler").open("r+b") as filler:
            filler.truncate(filler.seek(0, os.SEEK_END) - room)
        with pytest.raises(FinetuneError, match="the cache entry cannot be written: No space left on device") as caught:
            made(named)
        assert caught.value.hint == "set FINETUNE_CACHE to another disk"
        assert list((cache.root() / "dequantized").iterdir()) == []
        (tmp_path / "disk/filler").unlink()
        assert_whole(made(named), numbers)


@pytest.mark.slow
@pytest.mark.parametrize("is_midway", [True, False], ids=["midway", "when it was made"])
def test_after_a_power_cut_a_dequantized_base_is_whole_or_made_again(
    is_midway,
    small,
    image,  # noqa: F811
    tmp_path,
    monkeypatch,
) -> None:
    named, numbers = small
    with mounted(image, tmp_path / "disk"):
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "disk"))
        assert ended(start(named, *((FILES, "_save", 3) if is_midway else ())))[1] == 1
        place = os.open(tmp_path / "disk", os.O_RDONLY)
        fcntl.ioctl(place, FS_IOC_SHUTDOWN, array.array("I", [NO_FLUSH]))
        os.close(place)
    with mounted(image, tmp_path / "disk"):
        assert ended(start(named)) == (0, int(is_midway))
        assert_whole(made(named), numbers)
