"""Weights, gradients and moments spread over ranks: the steps of one process, and checkpoints that know no number of ranks.

Long because all of it shares workers and bases, which take longer to start and to make than to use.
"""

import json
import shutil
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.model.base import Place, unread
from finetune.store.checkpoints.store import Store
from finetune.store.run import journal
from tests import forks
from tests.stories.workers import Workers, two_ranks

pytestmark = pytest.mark.slow

METHODS = {
    "lora": {"name": "lora", "rank": 2, "alpha": 4},  # dropout is in test_exactness; experts take none
    "full": None,
    "frozen": {"name": "frozen", "freeze": ["model.layers.0.*"]},
}
BASES = ("tied", "untied", "experts")
TRAIN = {"steps": 4, "batch_size": 9, "precision": "fp32", "micro_batch_tokens": 128}
CHECKPOINT = {"every": "2 steps", "keep": {"last": 9}}


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """A function of a world size, and of the hosts that it is on: its workers."""
    logs, started = tmp_path_factory.mktemp("logs"), {}

    def of(world_size: int, hosts: int = 1) -> Workers:
        return started.setdefault((world_size, hosts), Workers(world_size, logs, hosts))

    yield of
    for each in started.values():
        each.close()


@pytest.fixture(scope="module")
def bases(tiny_base, tiny_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """The tiny Llama, the same with a head of its own, and a model with experts."""
    made = {"tied": tiny_base}
    experts = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4, "head_dim": 8}
    for name, kind, changed in (("untied", "llama", {}), ("experts", "qwen3_moe", experts)):
        config = AutoConfig.from_pretrained(tiny_base).to_dict() | {"tie_word_embeddings": False, **changed}
        made[name] = tmp_path_factory.mktemp("bases") / name
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "model_type": kind})).save_pretrained(
            made[name]
        )
        tiny_tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture
def write_recipe(recipe_file, bases) -> Callable[..., Path]:
    def write(
        strategy: str,
        method: str = "full",
        base: str = "tied",
        packing: bool = True,
        rate: float = 0.01,
        **train: object,
    ) -> Path:
        return recipe_file(
            name=strategy,
            base={"checkpoint": str(bases[base])},
            adapter=METHODS[method],
            optimizer={"learning_rate": rate},
            task={"name": "chat", "max_length": 64, "packing": packing},
            train={**TRAIN, "strategy": strategy, **train},
            checkpoint=CHECKPOINT,
        )

    return write


def losses(run: Path) -> list[float]:
    steps = journal.steps(journal.read(run))
    return [steps[step]["loss"] for step in sorted(steps)]


def files(run: Path, step: int = 4) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Store(run).find(step).path.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("base", "method", "packing"),
    list(product(BASES, METHODS, (True, False))),
    ids=lambda value: {True: "packed", False: "padded"}.get(value, value),
)
def test_ranks_that_hold_rows_take_the_steps_of_ranks_that_hold_all(
    base, method, packing, write_recipe, workers, tmp_path
):
    whole, spread = tmp_path / "whole", tmp_path / "spread"
    workers(2).train(write_recipe("ddp", method, base, packing), whole)
    workers(2).train(write_recipe("fsdp", method, base, packing), spread)
    assert losses(spread) == pytest.approx(losses(whole), rel=1e-5)
    assert {name: len(data) for name, data in files(spread).items()} == {
        name: len(data) for name, data in files(whole).items()
    }


def test_the_file_of_a_sharded_save_is_that_of_one_process_with_the_same_state(write_recipe, workers, tmp_path):
    """A learning rate of almost nothing: every update is far below a weight's last bit."""
    runs = {}
    for ranks in (1, 2, 3):
        recipe = write_recipe("fsdp", rate=1e-30)
        workers(ranks).train(recipe, tmp_path / str(ranks))
        runs[ranks] = files(tmp_path / str(ranks))["model.safetensors"]
    assert runs[1] == runs[2] == runs[3]


def test_a_sharded_checkpoint_is_resumed_by_any_number_of_ranks(write_recipe, workers, tmp_path):
    recipe, whole, moved = write_recipe("fsdp", steps=8), tmp_path / "whole", tmp_path / "moved"
    workers(2).train(recipe, whole)
    for ranks, until in ((3, 2), (1, 4), (2, 6), (3, 8)):
        workers(ranks).train(recipe, moved, until=until)
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-4)
    workers(1).train(write_recipe("ddp", steps=8), tmp_path / "single")
    assert losses(moved) == pytest.approx(losses(tmp_path / "single"), rel=1e-4)


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
    refused = forks.run([*replay, "3", "--materialize"], capture_output=True, text=True, timeout=240)
    assert refused.returncode != 0
    assert "a state that is spread over ranks is written by a training alone" in refused.stderr
    assert [each.step for each in Store(tmp_path / "run").checkpoints()] == [2, 4]


@pytest.mark.parametrize("method", METHODS)
def test_ranks_of_two_hosts_that_each_hold_all_rows_take_the_same_steps(method, write_recipe, workers, tmp_path):
    """As 2 x 2: rows are spread within a host."""
    workers(2).train(write_recipe("ddp", method, "experts"), tmp_path / "whole")
    recipe = write_recipe("hsdp", method, "experts")
    for name in ("first", "second"):
        workers(4, hosts=2).train(recipe, tmp_path / name)
    assert losses(tmp_path / "first") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert files(tmp_path / "first") == files(tmp_path / "second")
    manifest = Store(tmp_path / "first").find(4).manifest
    assert (manifest.world["strategy"], manifest.world["hosts"]) == ("hsdp", 2)


def test_a_checkpoint_of_two_hosts_is_that_of_one_process_and_resumed_by_any_number(write_recipe, workers, tmp_path):
    recipe = write_recipe("hsdp", rate=1e-30, ema=0.9)
    workers(4, hosts=2).train(recipe, tmp_path / "spread")
    workers(1).train(recipe, tmp_path / "single")
    for name in ("model.safetensors", "ema.safetensors"):
        assert files(tmp_path / "spread")[name] == files(tmp_path / "single")[name]
    recipe, moved = write_recipe("hsdp", steps=8), tmp_path / "moved"
    workers(1).train(recipe, tmp_path / "whole")
    workers(4, hosts=2).train(recipe, moved, until=2)
    for ranks, hosts, until in ((1, 1, 4), (4, 2, 6), (2, 1, 8)):
        workers(ranks, hosts).train(recipe, moved, until=until)
    assert losses(moved) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


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
