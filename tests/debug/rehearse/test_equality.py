"""What differs first between two runs of one plan."""

import shutil

import pytest

from finetune.debug.rehearse.equality import compared, first_difference
from finetune.store.run import journal, row_losses

LAST = 4


@pytest.fixture
def pair(recipe_file, train_once, tmp_path):
    """Two equal runs of four steps."""
    settings = ["train.steps=4", "checkpoint.every=2 steps"]
    return [train_once(recipe_file(), tmp_path / name, *settings) for name in ("one", "two")]


@pytest.mark.slow
def test_two_runs_of_one_plan_are_equal(pair) -> None:
    assert first_difference(*pair, LAST) is None
    assert compared(pair[0], LAST) == {"steps": 4, "rows": 24, "tensors": 84, "files": 7}


@pytest.mark.slow
def test_the_first_step_that_differs_is_named_with_both_values(pair, recipe_file, train, tmp_path) -> None:
    other = train(recipe_file(), tmp_path / "other", "train.steps=4", "train.micro_batch_tokens=64")
    records = [journal.steps(journal.read(run)) for run in (pair[0], other)]
    step = next(step for step in records[0] if journal.difference(records[0][step], records[1][step]))
    found = first_difference(pair[0], other, LAST)
    assert (found.step, found.uninterrupted, found.resumed) == (
        step,
        records[0][step][found.quantity],
        records[1][step][found.quantity],
    )
    assert found.uninterrupted != found.resumed


def test_a_step_that_ran_twice_has_to_be_equal_both_times(pair) -> None:
    path = pair[1] / "journal.jsonl"
    record = journal.steps(journal.read(pair[1]))[3]
    path.write_text(journal.to_json(record | {"loss": 9.5}) + "\n" + path.read_text())
    found = first_difference(*pair, LAST)
    assert (found.step, found.quantity, found.uninterrupted, found.resumed) == (3, "loss", record["loss"], 9.5)


def test_a_row_loss_that_differs_is_found(pair) -> None:
    losses = row_losses.read_rows(pair[1], 4)
    changed = row_losses.Columns([*losses[:2], losses[2]._replace(loss=9.5), *losses[3:]])
    changed.write(pair[1], journal.read(pair[1])[-1]["attempt"])
    found = first_difference(*pair, LAST)
    assert (found.step, found.quantity, found.resumed) == (4, f"loss of row {losses[2].row}", 9.5)


def test_a_tensor_that_differs_is_named(pair, recipe_file, train, tmp_path) -> None:
    other = train(recipe_file(), tmp_path / "other", "train.steps=4", "train.seed=1")
    shutil.rmtree(pair[1] / "checkpoints/step-00000004")
    shutil.copytree(other / "checkpoints/step-00000004", pair[1] / "checkpoints/step-00000004")
    found = first_difference(*pair, LAST)
    assert found.quantity.startswith("tensor base_model.")
    assert found.uninterrupted.startswith("F32[") and "xxh3-128:" in found.resumed


def test_a_damaged_byte_is_found_though_the_manifests_agree(pair) -> None:
    file = pair[1] / "checkpoints/step-00000004/optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    found = first_difference(*pair, LAST)
    assert (found.quantity, found.uninterrupted) == ("bytes on the disk", None)
    assert found.resumed.startswith("optimizer.safetensors: tensor ")
