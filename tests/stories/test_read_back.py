"""Every rank reads files of a save back: a disk or a rank that fails, and what a rank holds meanwhile."""

import re

import pytest

from finetune.store.checkpoints.store import Store
from finetune.store.run import journal
from tests.stories.workers import ranks_on_hosts, two_ranks

pytestmark = pytest.mark.slow


def test_a_rank_that_cannot_read_back_costs_a_save_with_its_message(write_recipe, workers, tmp_path):
    run = tmp_path / "run"
    assert workers(2).train(write_recipe("fsdp"), run, unreadable=(2, 1)) == "finished"
    skipped = [record for record in journal.read(run) if record.get("event") == "skipped_save"]
    assert [(each["step"], each["message"]) for each in skipped] == [(2, "rank 1: cannot read: input/output error")]
    assert [each.step for each in Store(run).checkpoints()] == [4]
    assert not list((run / "attempts").iterdir())


TURNED = """
import os
from finetune.store.checkpoints import assembled
write_rows = assembled.write_rows

def turned(path, made):
    parts = write_rows(path, made)
    if os.environ["RANK"] == "RANK":
        with open(path, "r+b") as file:
            file.seek(parts[-1].end - 1)
            last = file.read(1)[0]
            file.seek(parts[-1].end - 1)
            file.write(bytes([last ^ 1]))
            os.fsync(file.fileno())
    return parts

assembled.write_rows = turned
from finetune.cli import main
from tests import forks
main()
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bit_that_the_disk_turned_in_rows_of_a_rank_is_found_and_its_rank_named(rank, write_recipe, tmp_path):
    code = TURNED.replace('== "RANK"', f'== "{rank}"')
    both = two_ranks("-c", code, "train", write_recipe("fsdp"), "--run", tmp_path / "run")
    said = [process.communicate(timeout=120)[1] for process in both]
    assert both[0].returncode == 1, said  # the other one has lost rank 0, or is done by then
    assert f"does not read back as rank {rank} wrote it" in said[0]
    assert "hint: this disk cannot be trusted: use another one" in said[0]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


KILLED = """
import os
from finetune.store.checkpoints import assembled
read_back = assembled.read_back

def die(*arguments):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    return read_back(*arguments)

assembled.read_back = die
from finetune.cli import main
from tests import forks
main()
"""


def test_a_rank_that_is_killed_while_it_reads_back_ends_the_others_and_commits_nothing(write_recipe, tmp_path):
    both = two_ranks("-c", KILLED, "train", write_recipe("fsdp"), "--run", tmp_path / "run")
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [1, -9], said
    assert "rank 1 is gone" in said[0] or "lost another rank" in said[0]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_damage_is_found_where_hosts_have_different_numbers_of_ranks(write_recipe, tmp_path):
    recipe, run = write_recipe("fsdp"), tmp_path / "run"
    for damaged in (None, "optimizer.safetensors", "model.safetensors"):
        if damaged:
            file = Store(run).checkpoints()[-1].path / damaged
            file.chmod(0o600)
            file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
        ranks = ranks_on_hosts([2, 1], "-m", "finetune", "train", recipe, "--run", run)
        said = [process.communicate(timeout=120)[1] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0, 0], said
        assert not damaged or f"damaged: step-00000004/{damaged}" in said[0], said[0]


HELD = """
import sys
import numpy as np
from finetune.training.saving import reading, snapshot as snapshots
files_of, of_file = snapshots.files_of, reading._of_file

def tell(what, own, whole):
    print(what, f"{own / whole:.2f}", file=sys.stderr, flush=True)

def saved(snapshot, *arguments, **settings):
    files = files_of(snapshot, *arguments, **settings)
    tensors = [tensor for each in files.values() for tensor in each]
    parts = [np.frombuffer(tensor.data, np.uint8) for tensor in tensors if len(tensor.data)]
    tell("saves", sum(part.nbytes for part in parts), sum(tensor.bytes for tensor in tensors))
    copies = {tensor.data_ptr() for tensor in snapshot.copy.tensors.values()}
    assert {part.ctypes.data for part in parts} <= copies  # it is no further copy
    return files

def read(path, rows):
    found = of_file(path, rows)
    tell("reads", sum(tensor.nbytes for tensor in found.values()), path.stat().st_size)
    return found

snapshots.files_of, reading._of_file = saved, read
from finetune.cli import main
from tests import forks
main()
"""


def test_no_rank_holds_more_than_its_rows_while_it_saves_or_resumes(write_recipe, tmp_path):
    told = []
    for until in (2, 4):
        command = ("train", write_recipe("fsdp"), "--run", tmp_path / "run", "--until", until)
        both = two_ranks("-c", HELD, *command)
        said = [process.communicate(timeout=120)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        told.append([re.findall(r"^(saves|reads) (\S+)$", each, re.MULTILINE) for each in said])
    for rank in range(2):
        assert [what for what, _ in told[0][rank]] == ["saves"]
        assert [what for what, _ in told[1][rank]] == ["reads", "reads", "saves"]
        assert all(float(share) <= 0.52 for _, share in told[0][rank] + told[1][rank])
