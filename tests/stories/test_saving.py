"""What a save costs and leaves: frozen weights once, milestones as weights alone, and a full disk or a silent rank costs a save at most."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from finetune.errors import CheckpointError
from finetune.store.checkpoints.manifest import read
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.store.run import journal, row_losses
from finetune.training.saving import room
from tests import forks
from tests.stories.test_processes import events, start, wait_for_step

FROZEN = {"name": "frozen", "freeze": ["model.embed_tokens.*", "model.layers.0.*"]}
ALL = {"every": "2 steps", "keep": {"last": 20}}


def steps_of(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in Store(run).checkpoints()]


@pytest.mark.slow
def test_frozen_weights_are_written_once_and_every_checkpoint_loads(recipe_file, train, tiny_base, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    run = train(recipe_file(adapter=FROZEN, checkpoint=ALL), tmp_path / "run")
    checkpoints = [checkpoint.path for checkpoint in Store(run).checkpoints()]
    assert len(checkpoints) == 5
    assert len({(path / "model-frozen.safetensors").stat().st_ino for path in checkpoints}) == 1
    assert not verify(checkpoints[-1])
    model, base = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (checkpoints[-1], tiny_base))
    changed = {name for name in base if not torch.equal(model[name], base[name])}
    assert changed and not [name for name in changed if name.startswith(("model.embed_tokens", "model.layers.0."))]
    committed = [record["bytes"] for record in events(run, "committed")]
    frozen = (checkpoints[0] / "model-frozen.safetensors").stat().st_size
    assert max(committed[1:]) < committed[0] - 0.9 * frozen


@pytest.mark.slow
def test_damaged_frozen_weights_are_restored_from_the_base_and_cost_no_step(
    recipe_file, train, tmp_path, capsys
) -> None:
    run = train(recipe_file(adapter=FROZEN, checkpoint=ALL), tmp_path / "run")
    for checkpoint in Store(run).checkpoints():
        file = checkpoint.path / "model-frozen.safetensors"
        file.chmod(0o644)
        content = bytearray(file.read_bytes())
        content[-9] ^= 4
        file.write_bytes(content)
    assert verify(checkpoint.path)[0].file == "model-frozen.safetensors"
    capsys.readouterr()
    train(recipe_file(adapter=FROZEN, checkpoint=ALL), run)
    said = capsys.readouterr().err
    assert "restored checkpoints/step-00000010/model-frozen.safetensors from the base\n" in said
    assert "resumed from step 10\n" in said
    assert not [damage for checkpoint in Store(run).checkpoints() for damage in verify(checkpoint.path)]


@pytest.mark.slow
def test_milestones_lose_what_only_a_resume_needs_and_are_never_resumed_from(recipe_file, train, tmp_path) -> None:
    keep = {"last": 1, "weights_every": "2 steps"}
    run = train(recipe_file(checkpoint={"every": "5 steps", "keep": keep}), tmp_path / "run")
    kinds = {checkpoint.step: checkpoint.manifest.kind for checkpoint in Store(run).checkpoints()}
    assert kinds == {2: "weights", 4: "weights", 6: "weights", 8: "weights", 10: "full"}
    for checkpoint in Store(run).checkpoints():
        assert not verify(checkpoint.path)
        is_full = checkpoint.step == 10
        assert (checkpoint.path / "optimizer.safetensors").exists() == is_full
        assert (checkpoint.path / "adapter_model.safetensors").exists()
    eighth = read(run / "checkpoints/step-00000008")
    committed = {record["step"] for record in events(run, "committed")}
    assert committed == {2, 4, 5, 6, 8, 10}
    assert read(run / "checkpoints/step-00000010").manifest.parent["digest"] == eighth.manifest.demoted_from
    newest = run / "checkpoints/step-00000010/optimizer.safetensors"
    newest.chmod(0o644)
    newest.write_bytes(newest.read_bytes()[:-1])
    assert Store(run).newest_sound()[0] is None


@pytest.mark.slow
def test_pruning_by_hand_says_first_what_it_would_do(recipe_file, train, finetune, tmp_path) -> None:
    run = train(recipe_file(checkpoint=ALL), tmp_path / "run")
    arguments = ("prune", run, "--last", 1, "--weights-every", 4, "--json")
    dry = json.loads(finetune(*arguments, "--dry-run").stdout)
    assert [(item["action"], item["step"]) for item in dry["actions"]] == [
        ("demote", 4),
        ("demote", 8),
        ("remove", 2),
        ("remove", 6),
    ]
    assert steps_of(run) == [2, 4, 6, 8, 10] and dry["freed_bytes"] > 0
    before = sum(path.stat().st_size / path.stat().st_nlink for path in run.glob("checkpoints/*/*"))
    real = json.loads(finetune(*arguments).stdout)
    after = sum(path.stat().st_size / path.stat().st_nlink for path in run.glob("checkpoints/*/*"))
    assert real["actions"] == dry["actions"]
    assert before - after == pytest.approx(real["freed_bytes"], rel=0.1)  # a demoted manifest shrinks as well
    assert steps_of(run) == [4, 8, 10]
    assert [record["step"] for record in events(run, "demoted")] == [4, 8]
    assert finetune("prune", run, "--last", 1, "--weights-every", 4).stdout == "freed 0 B\n"


@pytest.mark.slow
def test_a_save_without_room_is_skipped_loudly_and_the_next_one_makes_up_for_it(
    recipe_file, train, tmp_path, monkeypatch, capsys
) -> None:
    answers = iter([1 << 40, 1 << 10, 1 << 40, 1 << 40, 1 << 40])
    monkeypatch.setattr(room, "free_bytes", lambda _: next(answers))
    recipe = recipe_file(checkpoint=ALL)
    run = train(recipe, tmp_path / "run")
    said = capsys.readouterr().err
    assert "save of step 4 skipped: it needs " in said
    assert " and the disk has 1.0 KiB left; training goes on\n" in said
    assert steps_of(run) == [2, 6, 8, 10]
    assert [record["step"] for record in events(run, "skipped_save")] == [4]
    assert all(row_losses.read_rows(run, step) for step in range(1, 11))


def test_a_last_save_without_room_is_an_error(recipe_file, train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda _: 1 << 10)
    with pytest.raises(
        CheckpointError, match="the last step is not committed: it needs .* and the disk has 1.0 KiB left\nhint: free"
    ):
        train(recipe_file(), tmp_path / "run")


@pytest.mark.slow
def test_what_a_save_cost_is_in_the_journal(recipe_file, train, tmp_path) -> None:
    run = train(recipe_file(checkpoint=ALL), tmp_path / "run")
    for record in events(run, "committed"):
        assert record["bytes"] > 0 and record["save_cpu_seconds"] > 0
        assert record["blocked_ms"] > 0 and record["save_seconds"] > 0 and record["read_back_seconds"] >= 0


@pytest.mark.slow
def test_back_pressure_is_in_the_journal(recipe_file, train, tmp_path, monkeypatch) -> None:
    commit = Store.commit

    def slowly(self: Store, *arguments: object) -> object:
        time.sleep(0.3)
        return commit(self, *arguments)

    monkeypatch.setattr(Store, "commit", slowly)
    run = train(recipe_file(checkpoint={"every": "1 step", "keep": {"last": 20}}), tmp_path / "run")
    waited = [record["wait_seconds"] for record in events(run, "committed")]
    assert waited[0] == 0 and max(waited) > 0.05


@pytest.mark.slow
def test_a_user_signal_saves_now_and_training_goes_on(recipe_file, tmp_path) -> None:
    long = {"steps": 60, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
    recipe, run = recipe_file(train=long, checkpoint={"every": "60 steps", "keep": {"last": 9}}), tmp_path / "run"
    process = start("train", recipe, "--run", run)
    wait_for_step(run, 5)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    first, last = steps_of(run)
    assert 5 <= first < 60 and last == 60


SILENT_RANK = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from finetune.training.saving import rank_reports
from finetune.recipe.load import load
from finetune.training.run import train
from torch.optim.optimizer import register_optimizer_step_post_hook

rank_reports.REPORT_SECONDS = 3
begin = rank_reports.Reports.begin

def forgetful(self, step, plan_id):
    if step == 20 and os.environ["RANK"] == "1":
        if sys.argv[3] == "wrong":
            return begin(self, 99, plan_id)
        return SimpleNamespace(wait=lambda: None)
    return begin(self, step, plan_id)

def slow(optimizer, *_):
    if sys.argv[3] == "not" and optimizer.state and next(iter(optimizer.state.values()))["step"] == 30:
        time.sleep(6)  # else the report of step 40 might come in time for the save of step 20

rank_reports.Reports.begin = forgetful
register_optimizer_step_post_hook(slow)
train(load(Path(sys.argv[1]), []), Path(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("not", "rank 1 did not report within 3 seconds"),
        ("wrong", "rank 1 is at step 99, or follows another plan"),
    ],
)
def test_a_rank_that_does_not_report_costs_a_save_and_not_the_training(how, said, recipe_file, tmp_path) -> None:
    (tmp_path / "silent.py").write_text(SILENT_RANK)
    long = {"steps": 60, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
    recipe = recipe_file(train=long, checkpoint={"every": "20 steps", "keep": {"last": 99}})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(tmp_path / "silent.py"), str(recipe), str(tmp_path / "run"), how]
    root = Path(__file__).parents[2]
    result = forks.run(command, capture_output=True, text=True, timeout=200, env=os.environ | {"PYTHONPATH": str(root)})
    assert result.returncode == 0, result.stderr
    assert f"save of step 20 skipped: {said}; training goes on" in result.stderr
    assert "finished at step 60" in result.stderr.splitlines()
    assert steps_of(tmp_path / "run") == [40, 60]


SLOW_DISK = """
import time
from finetune import cli
from finetune.store.checkpoints.store import Store

commit = Store.commit

def slowly(self, *arguments):
    time.sleep(3)
    return commit(self, *arguments)

Store.commit = slowly
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_ends_all_with_the_last_step_committed_also_under_a_launcher(
    rank, recipe_file, tmp_path
) -> None:
    """The launcher signals the others as soon as one rank has ended: none may end before the commit."""
    (tmp_path / "slow.py").write_text(SLOW_DISK)
    long = {"steps": 4000, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
    recipe, run = recipe_file(train=long, checkpoint={"every": "4000 steps"}), tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--", str(tmp_path / "slow.py"), "train", str(recipe), "--run", str(run)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = forks.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for_step(run, 5)
    children = psutil.Process(process.pid).children(recursive=True)
    chosen = next(child for child in children if child.environ().get("RANK") == str(rank))
    chosen.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert steps_of(run) == [max(journal.steps(journal.read(run)))], said


HUNG_DISK = """
import os, torch
from finetune import cli
from finetune.training.saving import writer
from tests import forks

writer.STALL_SECONDS = 8.0
fsync = os.fsync

def hang(descriptor):
    while "step-00000004" in os.readlink(f"/proc/self/fd/{descriptor}"):
        torch.ones(3000, 3000).sum()  # the thread comes back from native code while the interpreter ends
    fsync(descriptor)

os.fsync = hang
cli.main()
"""


@pytest.mark.slow
def test_a_disk_that_hangs_ends_the_run_with_one_error_and_the_same_command_resumes(
    recipe_file, finetune, tmp_path
) -> None:
    (tmp_path / "hung.py").write_text(HUNG_DISK)
    recipe, run = recipe_file(checkpoint={"every": "2 steps", "keep": {"last": 9}}), tmp_path / "run"
    command = [sys.executable, str(tmp_path / "hung.py"), "train", str(recipe), "--run", str(run), "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    # a new interpreter: a thread that wakes while one ends is the subject, and forks do not end like that
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert result.returncode == 1, result.stderr
    assert "the save of step 4 has not ended for " in result.stderr and "Traceback" not in result.stderr
    assert steps_of(run) == [2]
    again = finetune("train", recipe, "--run", run, "--quiet")
    assert again.returncode == 0 and again.stderr.startswith("resumed from step 2\n")
