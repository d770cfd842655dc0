"""Weights, gradients and moments spread over ranks: each reads its rows of the base and writes its rows of a checkpoint.

`test_rank_matrix` compares their steps with those of one process.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from finetune.model.base import Place, unread
from finetune.store.checkpoints.store import Store
from finetune.store.run import journal
from tests import forks
from tests.stories.workers import two_ranks

pytestmark = pytest.mark.slow


def losses(run: Path) -> list[float]:
    steps = journal.steps(journal.read(run))
    return [steps[step]["loss"] for step in sorted(steps)]


def files(run: Path, step: int = 4) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Store(run).find(step).path.glob("*.safetensors")}


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_sharded_run_in_bf16_is_the_same_every_time(weights, write_recipe, workers, tmp_path):
    recipe = write_recipe("fsdp", precision="bf16", weights=weights)
    for name in ("first", "second"):
        workers(2).train(recipe, tmp_path / name)
    assert files(tmp_path / "first") == files(tmp_path / "second")
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_costs_a_save_with_its_message(rank, write_recipe, workers, tmp_path):
    recipe, whole, run = write_recipe("fsdp", steps=6), tmp_path / "whole", tmp_path / "run"
    workers(2).train(recipe, whole)
    assert workers(2).train(recipe, run, full_disk=(2, rank)) == "finished"
    skipped = [record for record in journal.read(run) if record.get("event") == "skipped_save"]
    assert [record["step"] for record in skipped] == [2]
    who = "rank 1: " if rank else ""
    assert skipped[0]["message"] == f"{who}cannot write: no space left on device"
    assert [each.step for each in Store(run).checkpoints()] == [4, 6]
    assert not list((run / "attempts").iterdir())
    assert files(run, 6) == files(whole, 6)
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_the_same_ranks_replay_a_sharded_run_to_the_bit_and_write_no_state(strategy, write_recipe, workers, tmp_path):
    workers(2).train(write_recipe(strategy), tmp_path / "run")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    replay = [*launcher, "finetune", "replay", str(tmp_path / "run"), "--steps"]
    replayed = forks.run([*replay, "2..4", "--json"], capture_output=True, text=True, timeout=240)
    assert replayed.returncode == 0, replayed.stderr
    found = json.loads(replayed.stdout)
    assert (found["identical"], found["notes"]) == (True, [])
    if strategy == "hsdp":  # which is refused in the same place
        return
    refused = forks.run([*replay, "3", "--materialize"], capture_output=True, text=True, timeout=240)
    assert refused.returncode != 0
    assert "a state that is spread over ranks is written by a training alone" in refused.stderr
    assert [each.step for each in Store(tmp_path / "run").checkpoints()] == [2, 4]


@pytest.mark.parametrize("rank", [1, 3])
def test_of_two_hosts_only_one_writes(rank, write_recipe, workers, tmp_path):
    recipe, run = write_recipe("hsdp", steps=4), tmp_path / "run"
    assert workers(4, hosts=2).train(recipe, run, full_disk=(2, rank)) == "finished"
    assert [each.step for each in Store(run).checkpoints()] == ([4] if rank == 1 else [2, 4])


def test_ranks_that_hold_rows_save_memory_in_the_other_ways_too(write_recipe, workers, tmp_path):
    """Each looks at the layers of a model whose weights are not there when it is made."""
    saving = {"activation_checkpointing": True, "mlp_chunk_tokens": 16, "ema": 0.9}
    for strategy in ("ddp", "fsdp"):
        workers(2).train(write_recipe(strategy, **saving), tmp_path / strategy)
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-5)


LOADED_WHOLE = """
from finetune.training import build
build.unread_model = lambda *_: None
from finetune.cli import main
from tests import forks
main()
"""


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_that_is_loaded_whole_first_gives_the_bits_of_one_that_is_read_by_rows(
    method, write_recipe, workers, tmp_path
):
    recipe = write_recipe("fsdp", method, "experts", precision="bf16")
    workers(2).train(recipe, tmp_path / "rows")
    both = two_ranks("-c", LOADED_WHOLE, "train", recipe, "--run", tmp_path / "whole")
    said = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "each rank loads the whole base before it keeps its rows" in said[0]
    assert losses(tmp_path / "rows") == losses(tmp_path / "whole")
    assert files(tmp_path / "rows") == files(tmp_path / "whole")


BAD_DISK = """
import errno, os
pread = os.preadv

def fail(*arguments):
    if os.environ["RANK"] == "RANK":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return pread(*arguments)

os.preadv = fail
from finetune.cli import main
from tests import forks
main()
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_read_its_rows_ends_all_with_its_message(rank, write_recipe, tmp_path):
    code = BAD_DISK.replace('== "RANK"', f'== "{rank}"')
    both = two_ranks("-c", code, "train", write_recipe("fsdp"), "--run", tmp_path / "run")
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1], said
    told = "cannot be read (OSError: [Errno 5] Input/output error)"
    assert told in said[rank] and f"rank {rank}: " not in said[rank]
    assert f"rank {rank}: {told}" in said[1 - rank]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_rank_that_is_killed_while_it_reads_ends_the_others(write_recipe, tmp_path):
    code = BAD_DISK.replace('== "RANK"', '== "1"').replace(
        "raise OSError(errno.EIO, os.strerror(errno.EIO))", "os.kill(os.getpid(), 9)"
    )
    both = two_ranks("-c", code, "train", write_recipe("fsdp"), "--run", tmp_path / "run")
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [1, -9], said
    assert "rank 0: lost another rank" in said[0]


def test_a_rank_with_a_flipped_bit_in_its_copy_of_the_base_is_refused(write_recipe, bases, tmp_path):
    hosts = [tmp_path / "host-0", tmp_path / "host-1"]
    for host in hosts:
        shutil.copytree(bases["tied"], host / "base")
    weights = hosts[1] / "base" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    recipe = write_recipe("fsdp")
    recipe.write_text(recipe.read_text().replace(str(bases["tied"]), "base"))
    both = two_ranks("-m", "finetune", "train", recipe, "--run", tmp_path / "run", hosts=hosts)
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1], said
    assert all("ranks [1] have another base, or other data, than rank 0" in each for each in said), said


def test_experts_are_read_whole_one_layer_at_a_time_and_dense_weights_by_rows(bases):
    for name, made in (("tied", 0), ("untied", 0), ("experts", 2)):
        found = unread(bases[name], torch.float32, None, Place(torch.device("cpu")))
        layers = AutoConfig.from_pretrained(bases[name]).num_hidden_layers
        assert len(found._made) == made * layers
