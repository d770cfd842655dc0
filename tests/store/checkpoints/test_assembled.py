"""One file that several processes write: the bytes and the record of one process, or an error."""

import fcntl
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import blake3
import numpy as np
import pytest

from finetune.errors import CheckpointError
from finetune.store import durable
from finetune.store.checkpoints import assembled
from finetune.store.checkpoints.assembled import Digests, UntrustedDiskError, readers
from finetune.store.checkpoints.attempt import Attempt
from finetune.store.durable import O_DIRECT
from finetune.store.tensors import Tensor

SHAPES = {"long": (7, 3), "short": (2, 5), "halves": (9,), "empty": (0, 4), "number": ()}
METADATA = {"format": "pt"}


def _whole() -> list[Tensor]:
    numbers = np.random.default_rng(0)
    made = []
    for name, shape in SHAPES.items():
        kind = ("F16", 2) if name == "halves" else ("F32", 4)
        made.append(Tensor(name, kind[0], shape, numbers.bytes(int(np.prod(shape)) * kind[1])))
    return made


def _of_rank(rank: int, ranks: int) -> list[Tensor]:
    """As `fully_shard` spreads rows: equal parts, the last ones smaller or empty; a number is on the first rank."""
    made = []
    for tensor in _whole():
        rows = tensor.shape[0] if tensor.shape else 1
        size, each = len(tensor.data) // max(rows, 1), -(-rows // ranks)
        first, end = (min(rows, place * each) for place in (rank, rank + 1))
        made.append(replace(tensor, data=tensor.data[first * size : end * size], first=first * size))
    return made


def _assembled(path, ranks):
    made = [assembled.layout(_of_rank(rank, ranks), METADATA) for rank in range(ranks)]
    assembled.create(path, made[0])
    parts = {rank: assembled.write_rows(path, made[rank]) for rank in reversed(range(ranks))}
    return made[0], parts


def _read_back(path, made, parts):
    """As a rank does that knows the file by rank 0's text alone."""
    told = json.loads(json.dumps(assembled.written(path, made, parts)))
    written = assembled.Written.again(*told)
    return assembled.read_back(path, written.layout(METADATA), written.parts)


@contextmanager
def _flipped(path, place):
    data = path.read_bytes()
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    yield
    path.write_bytes(data)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_file_of_several_processes_has_the_bytes_and_the_record_of_one(ranks, tmp_path):
    alone = Attempt(tmp_path / "alone", 1)
    alone.path.mkdir()
    alone.write_tensors("one.safetensors", _whole(), METADATA)
    made, parts = _assembled(tmp_path / "one.safetensors", ranks)
    record = assembled.finished(
        tmp_path / "one.safetensors", made, _read_back(tmp_path / "one.safetensors", made, parts)
    )
    assert (tmp_path / "one.safetensors").read_bytes() == (alone.path / "one.safetensors").read_bytes()
    assert record == alone.files["one.safetensors"]


def test_a_disk_that_cannot_reserve_room_is_written_to_as_glibc_does(tmp_path, monkeypatch):
    """posix_fallocate(3): a byte of each block is read and written again, as with NFS 3."""

    def emulated(descriptor: int, offset: int, size: int) -> None:
        for place in range(offset, size, 16):
            os.pwrite(descriptor, os.pread(descriptor, 1, place) or b"\0", place)
        os.ftruncate(descriptor, max(size, os.fstat(descriptor).st_size))

    _assembled(tmp_path / "whole", 2)
    monkeypatch.setattr(os, "posix_fallocate", emulated)
    _assembled(tmp_path / "emulated", 2)
    assert (tmp_path / "emulated").read_bytes() == (tmp_path / "whole").read_bytes()


def test_rows_that_no_rank_wrote_or_two_did_are_an_error(tmp_path):
    made, parts = _assembled(tmp_path / "file", 3)
    for wrong in ({0: parts[0], 1: parts[1]}, {**parts, 3: parts[1]}, {**parts, 2: parts[2][1:]}):
        with pytest.raises(CheckpointError, match="the rows of the ranks do not make the whole file"):
            assembled.written(tmp_path / "file", made, wrong)


def test_a_bit_that_the_disk_turned_is_an_error_that_names_the_rank(tmp_path):
    made, parts = _assembled(tmp_path / "file", 3)
    for rank in range(2):
        error = pytest.raises(UntrustedDiskError, match=f"does not read back as rank {rank} wrote it")
        with _flipped(tmp_path / "file", parts[rank][0].start), error:
            _read_back(tmp_path / "file", made, parts)
    _read_back(tmp_path / "file", made, parts)


def test_no_bit_turns_unseen_wherever_it_is(tmp_path):
    made, parts = _assembled(tmp_path / "file", 2)
    for place in range(0, made.starts[-1], 13):
        with _flipped(tmp_path / "file", place), pytest.raises(UntrustedDiskError):
            _read_back(tmp_path / "file", made, parts)
    with (tmp_path / "file").open("r+b") as file:
        file.truncate(made.starts[-1] - 1)
    with pytest.raises(UntrustedDiskError, match="does not read back|were written"):
        _read_back(tmp_path / "file", made, parts)


def test_an_empty_file_of_tensors_is_read_back_too(tmp_path):
    """The moments of an optimizer that has none."""
    made = assembled.layout([], METADATA)
    assembled.create(tmp_path / "file", made)
    found = _read_back(tmp_path / "file", made, {0: [], 1: []})
    assert found == Digests(f"blake3:{blake3.blake3((tmp_path / 'file').read_bytes()).hexdigest()}", [])


def test_files_are_shared_out_by_their_bytes_and_rank_0_has_least():
    assert readers(4, 2) == [2, 1, 3, 0]
    sizes = {"a": 5, "b": 5, "c": 5, "d": 4, "e": 1}
    assert assembled.shared_out(sizes, readers(4, 2)) == {2: ["a"], 1: ["b"], 3: ["c"], 0: ["d", "e"]}
    assert assembled.shared_out({"a": 0, "b": 7}, readers(4, 2)) == {2: ["b"], 1: ["a"]}


MOUNTED = "22 1 {device} / /runs rw,relatime shared:1 - {kind} server:/runs rw,vers=4.2\n"


def test_over_nfs_rows_bypass_the_page_cache_byte_by_byte(tmp_path, monkeypatch):
    """On tmpfs, which takes direct writes that begin anywhere, as NFS does."""
    shared = Path(tempfile.mkdtemp(dir="/dev/shm"))
    number = os.stat(shared).st_dev
    is_direct = []
    pwrite = os.pwrite

    def noted(descriptor, data, place):
        is_direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & O_DIRECT))
        return pwrite(descriptor, data, place)

    try:
        for kind in ("nfs4", "ext4"):
            (tmp_path / kind).write_text(
                MOUNTED.format(device=f"{os.major(number)}:{os.minor(number)}", kind=kind)
                + MOUNTED.format(device="9999:1", kind="nfs4" if kind == "ext4" else "ext4")
            )
            monkeypatch.setattr(durable, "MOUNTS", tmp_path / kind)
            made = [assembled.layout(_of_rank(rank, 3), METADATA) for rank in range(3)]
            assembled.create(shared / kind, made[0])
            monkeypatch.setattr(os, "pwrite", noted)
            parts = {rank: assembled.write_rows(shared / kind, made[rank]) for rank in range(3)}
            monkeypatch.undo()
            _read_back(shared / kind, made[0], parts)
            assert set(is_direct) == {kind == "nfs4"}
            is_direct.clear()
    finally:
        shutil.rmtree(shared)
