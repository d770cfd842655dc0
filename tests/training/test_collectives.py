"""What ranks do beside their steps: how many there should be, what Accelerate must not be told, and how long they wait for each other."""

import pytest
import torch.distributed as dist

from finetune.store.run import journal
from finetune.training import collectives
from tests.stories.workers import two_ranks

IMPATIENT = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from finetune.training import run
from finetune.training.saving.saver import Saver
from finetune.training.saving.writer import Writer
from finetune.training.recorder import Recorder

def slowed(work):
    def slow(*arguments, **options):
        time.sleep(WORK_SECONDS if dist.get_rank() == 0 else 0)
        return work(*arguments, **options)
    return slow

PATIENCE_SECONDS, WORK_SECONDS = 3, 7

def impatient(start):
    def started(*arguments):
        accelerator = start(*arguments)
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=PATIENCE_SECONDS), dist.group.WORLD)
        return accelerator
    return started

run.start_accelerator = impatient(run.start_accelerator)  # not earlier: to meet each other they may take long
for owner, name in ((run, "open_plan"), (Saver, "recover"), (Writer, "make_room"), (Recorder, "finish")):
    setattr(owner, name, slowed(getattr(owner, name)))
from finetune.cli import main
from tests import forks
main()
"""


@pytest.mark.slow
def test_ranks_wait_for_one_that_works_longer_than_their_collectives_are_patient(recipe_file, tmp_path) -> None:
    """A download, an encoding, a checkpoint that is verified, a save on a slow disk: NCCL gives up after ten minutes."""
    train = {"steps": 2, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
    recipe = recipe_file(train=train, checkpoint={"every": "1 steps"})  # a step follows a save
    both = two_ranks("-c", IMPATIENT, "train", recipe, "--run", tmp_path / "run")
    said = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert max(journal.steps(journal.read(tmp_path / "run"))) == 2


def test_a_rank_that_lost_another_says_so_in_a_line(recipe_file, chat_data, tmp_path) -> None:
    recipe = recipe_file(data={"train": [{"path": str(chat_data / "gone.jsonl")}]})
    both = two_ranks("-m", "finetune", "train", recipe, "--run", tmp_path / "run")
    first, second = (process.communicate(timeout=200)[1].splitlines() for process in both)
    assert [process.returncode for process in both] == [1, 1]
    assert first[0].endswith("gone.jsonl: no such file") and first[1].startswith("hint: ")
    assert len(second) == 1 and second[0].startswith("rank 1: lost another rank: "), second


def test_an_error_of_one_rank_alone_is_a_bug() -> None:
    assert collectives.lost_rank(RuntimeError("shape mismatch")) is None
    assert collectives.lost_rank(dist.DistBackendError("NCCL error: unhandled system error, ncclSystemError")) is None


@pytest.mark.parametrize(
    ("words", "after"),
    [
        ("/usr/bin/python3 /opt/bin/accelerate launch --cpu -m finetune", "--cpu -m finetune"),
        ("/opt/bin/accelerate launch --cpu", "--cpu"),
        ("python /opt/bin/accelerate-launch --cpu", "--cpu"),
        ("python -m accelerate.commands.launch --cpu", "--cpu"),
        ("bash launch accelerate", None),
        ("python train.py --by accelerate launch", None),
    ],
)
def test_accelerate_launch_is_known_by_its_command(words, after) -> None:
    assert collectives._after_accelerate(words.split()) == (None if after is None else after.split())


DIGESTED = """
import os, sys
from finetune.model.base import files

class Noted(dict):
    def __setitem__(self, as_it_is, digest):  # `update`, which takes over what another rank found, does not come here
        super().__setitem__(as_it_is, digest)
        print("digested", as_it_is[2], file=sys.stderr, flush=True)

files.digests = Noted()
from finetune.cli import main
from tests import forks
main()
"""


@pytest.mark.slow
def test_ranks_of_a_host_read_a_base_once_to_digest_it(recipe_file, tiny_base, tmp_path) -> None:
    recipe = recipe_file(train={"steps": 1, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128})
    both = two_ranks("-c", DIGESTED, "train", recipe, "--run", tmp_path / "run")
    said = [process.communicate(timeout=200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    size = (tiny_base / "model.safetensors").stat().st_size
    assert said[0].count(f"digested {size}") == 1
    assert "digested" not in said[1]
