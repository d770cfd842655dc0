"""One file that several processes write: the bytes and the record of one process, or an error."""

from dataclasses import replace

import numpy as np
import pytest

from finetune.errors import CheckpointError
from finetune.store.checkpoints import assembled
from finetune.store.checkpoints.attempt import Attempt
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


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_file_of_several_processes_has_the_bytes_and_the_record_of_one(ranks, tmp_path):
    alone = Attempt(tmp_path / "alone", 1)
    alone.path.mkdir()
    alone.write_tensors("one.safetensors", _whole(), METADATA)
    made, parts = _assembled(tmp_path / "one.safetensors", ranks)
    record = assembled.finished(tmp_path / "one.safetensors", made, parts)
    assert (tmp_path / "one.safetensors").read_bytes() == (alone.path / "one.safetensors").read_bytes()
    assert record == alone.files["one.safetensors"]


def test_rows_that_no_rank_wrote_or_two_did_are_an_error(tmp_path):
    made, parts = _assembled(tmp_path / "file", 3)
    for wrong in ({0: parts[0], 1: parts[1]}, {**parts, 3: parts[1]}, {**parts, 2: parts[2][1:]}):
        with pytest.raises(CheckpointError, match="the rows of the ranks do not make the whole file"):
            assembled.finished(tmp_path / "file", made, wrong)


def test_a_bit_that_the_disk_turned_is_an_error_that_names_the_rank(tmp_path):
    made, parts = _assembled(tmp_path / "file", 3)
    for rank in range(2):
        place = parts[rank][0].start
        with (tmp_path / "file").open("r+b") as file:
            file.seek(place)
            bit = bytes([file.read(1)[0] ^ 1])
            file.seek(place)
            file.write(bit)
        with pytest.raises(CheckpointError, match=f"does not read back as rank {rank} wrote it"):
            assembled.finished(tmp_path / "file", made, parts)
        with (tmp_path / "file").open("r+b") as file:
            file.seek(place)
            file.write(bytes([bit[0] ^ 1]))
