"""Checkpoints whose files are divided, as large ones are, and read back by every rank."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.tensor_files import INDEX, kind_of
from finetune.store.checkpoints.verify import verify
from finetune.store.run import journal

pytestmark = pytest.mark.slow

SIZE = 20_000


def files(run: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Store(run).find(step).path.glob("*.safetensors")}


def kinds(run: Path, step: int) -> dict[str, int]:
    """How many files there are of each kind."""
    found: dict[str, int] = {}
    for name in files(run, step):
        found[kind_of(name)] = found.get(kind_of(name), 0) + 1
    return found


def losses(run: Path) -> list[float]:
    steps = journal.steps(journal.read(run))
    return [steps[step]["loss"] for step in sorted(steps)]


def test_any_number_of_ranks_divides_a_checkpoint_alike_and_transformers_loads_it(write_recipe, workers, tmp_path):
    """A learning rate of almost nothing: every update is far below a weight's last bit."""
    recipe = write_recipe("fsdp", "frozen", rate=1e-30, ema=0.9)
    for ranks in (1, 2, 3):
        workers(ranks).train(recipe, tmp_path / str(ranks), file_bytes=SIZE)
    found = {ranks: files(tmp_path / str(ranks), 4) for ranks in (1, 2, 3)}
    assert min(kinds(tmp_path / "2", 4).values()) > 1 and len(kinds(tmp_path / "2", 4)) == 4
    for ranks in (2, 3):
        assert found[ranks].keys() == found[1].keys()
        assert all(data == found[1][name] for name, data in found[ranks].items() if not name.startswith("optimizer"))
    workers(2).train(recipe, tmp_path / "whole")
    assert set(kinds(tmp_path / "whole", 4).values()) == {1}
    stored = Store(tmp_path / "2").find(4)
    assert verify(stored.path) == []
    loaded, whole = (
        AutoModelForCausalLM.from_pretrained(Store(tmp_path / name).find(4).path).state_dict()
        for name in ("2", "whole")
    )
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())
    frozen = next(name for name in found[2] if kind_of(name) == "model-frozen.safetensors")
    assert (stored.path / frozen).samefile(Store(tmp_path / "2").find(2).path / frozen)
    assert INDEX in stored.manifest.files


def tensors(directory: Path, kind: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob(f"{kind}*.safetensors")):
        found |= load_file(path)
    return found


def test_what_is_made_of_divided_files_is_what_is_made_of_whole_ones(write_recipe, workers, finetune, tmp_path):
    recipe, made = write_recipe("fsdp", "frozen", ema=0.9), {}
    for name, size in (("whole", None), ("divided", SIZE)):
        run = tmp_path / name
        workers(1).train(recipe, run, file_bytes=size)
        for words in (("--last", 2), ("--kept-ema",)):
            told = finetune("average", f"{run}@4", *words, "--no-evaluate", "--output", run / "averages" / words[0][2:])
            assert told.returncode == 0, told.stderr
        told = finetune("package", f"{run}@4", tmp_path / f"{name}-package")
        assert told.returncode == 0, told.stderr
        found = [tensors(run / "averages" / each, "model") for each in ("last", "kept-ema")]
        made[name] = [*found, tensors(tmp_path / f"{name}-package")]
    assert all(len(each) > 10 for each in made["whole"])
    for divided, whole in zip(made["divided"], made["whole"], strict=True):
        assert divided.keys() == whole.keys()
        assert all(torch.equal(divided[name], tensor) for name, tensor in whole.items())


def test_a_divided_checkpoint_is_branched_demoted_and_restored(write_recipe, workers, finetune, tmp_path):
    run = tmp_path / "run"
    workers(1).train(write_recipe("fsdp", "frozen"), run, file_bytes=SIZE)
    told = finetune("branch", f"{run}@2", "--run", tmp_path / "branch", "--set", "optimizer.learning_rate=0.01")
    assert told.returncode == 0, told.stderr
    assert losses(tmp_path / "branch")[-2:] == losses(run)[-2:]
    store = Store(run)
    demoted = store.demote(store.find(2))
    assert verify(demoted.path) == [] and demoted.manifest.kind == "weights"
    assert not list(demoted.path.glob("optimizer*")) and list(demoted.path.glob("model-trained-*"))
    frozen = next(store.find(4).path.glob("model-frozen-*"))
    frozen.chmod(0o644)
    data = bytearray(frozen.read_bytes())
    data[-1] ^= 1
    frozen.write_bytes(data)
    told = finetune("train", write_recipe("fsdp", "frozen", steps=6), "--run", run)
    assert told.returncode == 0, told.stderr
    assert f"restored checkpoints/step-00000004/{frozen.name} from the base" in told.stderr
    assert "resumed from step 4" in told.stderr


def test_a_run_goes_on_from_files_that_are_divided_in_another_way_to_the_bit(write_recipe, workers, tmp_path):
    recipe, whole, run = write_recipe("fsdp", steps=8, ema=0.9), tmp_path / "whole", tmp_path / "run"
    workers(2).train(recipe, whole)
    for size, until in ((SIZE, 2), (None, 4), (2 * SIZE, 8)):
        workers(2).train(recipe, run, file_bytes=size, until=until)
    assert losses(run) == losses(whole)
    workers(2).train(write_recipe("fsdp", steps=10, ema=0.9), run)
    workers(2).train(write_recipe("fsdp", steps=10, ema=0.9), whole)
    assert files(run, 10) == files(whole, 10)


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_a_bit_that_turned_in_one_file_of_many_costs_the_steps_since_the_checkpoint_before(
    kind, write_recipe, workers, tmp_path
):
    """The ranks verify a checkpoint together: each of these files is another rank's to read."""
    recipe, run = write_recipe("fsdp"), tmp_path / "run"
    workers(2).train(recipe, run, file_bytes=SIZE)
    before = losses(run), files(run, 4)
    damaged = sorted(path for path in Store(run).find(4).path.glob(f"{kind}-*.safetensors"))[-1]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.chmod(0o644)
    damaged.write_bytes(data)
    assert workers(2).train(recipe, run, file_bytes=SIZE) == "finished"
    told = [record for record in journal.read(run) if record.get("event") == "damaged"]
    assert [each["file"] for each in told] == [f"step-00000004/{damaged.name}"]
    assert re.fullmatch("tensor .* has other bytes than were committed", told[0]["message"])
    assert (losses(run), files(run, 4)) == before
