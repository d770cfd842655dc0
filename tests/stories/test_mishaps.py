"""What people and machines do to run directories and caches: nothing wrong is trained on, and nothing sound is given up."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from finetune.errors import BaseError, DataError, FinetuneError, RunError, Stopped
from finetune.store import cache as caches
from finetune.store.checkpoints.refs import find, parse
from finetune.store.checkpoints.verify import verify
from finetune.store.run import journal
from finetune.training.loop import Wishes


def flip(file: Path, at: int = -7) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)


@pytest.mark.slow
def test_a_damaged_tokenizer_is_restored_from_the_base(recipe_file, train, train_once, tmp_path, capsys) -> None:
    run = train_once(recipe_file(checkpoint={"every": "4 steps", "keep": {"last": 3}}), tmp_path / "run")
    flip(run / "checkpoints/step-00000010/tokenizer.json")  # one file, linked into all three
    assert all(verify(path) for path in (run / "checkpoints").iterdir())
    capsys.readouterr()
    train(recipe_file(checkpoint={"every": "4 steps", "keep": {"last": 3}}), run)
    said = capsys.readouterr().err.splitlines()
    assert "restored checkpoints/step-00000010/tokenizer.json from the base" in said
    assert said[-2:] == ["resumed from step 10", "finished at step 10"]
    assert not any(verify(path) for path in (run / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_not_taken_for_a_step_of_this_one(
    recipe_file, train, train_once, tmp_path
) -> None:
    run, other = train_once(recipe_file(), tmp_path / "run"), train(recipe_file(), tmp_path / "other", "train.seed=1")
    shutil.rmtree(run / "checkpoints/step-00000010")
    shutil.copytree(other / "checkpoints/step-00000010", run / "checkpoints/step-00000010")
    with pytest.raises(RunError, match="step-00000010: belongs to another run or plan"):
        train(recipe_file(), run)


@pytest.mark.slow
def test_a_run_without_its_plan_does_not_get_a_new_one(recipe_file, train, train_once, tmp_path) -> None:
    run = train_once(recipe_file(), tmp_path / "run")
    (run / "plan.json").unlink()
    with pytest.raises(RunError, match="belongs to another run or plan"):
        train(recipe_file(), run, "optimizer.learning_rate=0.5")


def test_lost_checkpoints_are_missed(recipe_file, train, train_once, tmp_path, capsys) -> None:
    run = train_once(recipe_file(), tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step-00000010")
    capsys.readouterr()
    train(recipe_file(), run)
    assert "step 10 was committed and is gone: re-running 2 steps\nresumed from step 8\n" in capsys.readouterr().err


def test_a_stray_file_among_the_attempts_does_no_harm(recipe_file, train, train_once, tmp_path) -> None:
    run = train_once(recipe_file(), tmp_path / "run")
    (run / "attempts/.DS_Store").touch()
    train(recipe_file(), run)
    assert not list((run / "attempts").iterdir())


@pytest.mark.slow
def test_an_evaluation_that_a_signal_cuts_short_is_made_up_on_resume(
    recipe_file, train, train_once, tmp_path, monkeypatch
) -> None:
    from finetune.training import evaluation

    recipe = recipe_file(checkpoint={"every": "4 steps", "keep": {"last": 3, "best": 1}})
    whole = train_once(recipe, tmp_path / "whole")
    evaluate = evaluation.row_results

    def cut(accelerator, objective, batches, wishes, tell):
        return evaluate(accelerator, objective, batches, lambda: Wishes(stop=is_last()), tell=tell)

    def is_last() -> bool:
        return max(journal.steps(journal.read(tmp_path / "cut")), default=0) == 10

    monkeypatch.setattr(evaluation, "row_results", cut)
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "cut")
    assert find(parse(f"{tmp_path / 'cut'}@last")).step == 10
    monkeypatch.undo()
    train(recipe, tmp_path / "cut")
    assert journal.evaluations(journal.read(tmp_path / "cut")) == journal.evaluations(journal.read(whole))
    assert find(parse(f"{tmp_path / 'cut'}@best")).step == find(parse(f"{whole}@best")).step


@pytest.mark.slow
def test_a_damaged_cache_is_made_anew(recipe_file, train, cache, tmp_path) -> None:
    whole = train(recipe_file(), tmp_path / "whole")
    for file in (cache / "encoded").glob("*/tokens.npy"):
        tokens = np.load(file)
        np.save(file, np.zeros_like(tokens))
    again = train(recipe_file(), tmp_path / "again")
    first, second = (journal.steps(journal.read(run))[1] for run in (whole, again))
    assert journal.difference(first, second) is None


def test_a_cache_entry_can_be_shared_with_other_users(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    entry = caches.built("kind", "key", lambda directory: (directory / "file").write_text("content") and None)
    assert (oct(os.stat(entry).st_mode & 0o777), oct(os.stat(entry / "file").st_mode & 0o777)) == ("0o755", "0o644")


def test_a_share_that_holds_out_nothing_is_refused(recipe_file, train, chat_data, tmp_path) -> None:
    data = {"train": [{"path": str(chat_data / "train.jsonl")}], "holdout": "0.1%"}
    with pytest.raises(DataError, match="data.holdout takes none of 40 rows"):
        train(recipe_file(data=data), tmp_path / "run")


def test_a_model_with_another_tokenizer_is_not_evaluated_on_these_rows(recipe_file, tiny_base, tmp_path) -> None:
    from finetune.compare.evaluate import evaluate

    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert evaluate([str(tiny_base)], recipe_file(), [])[0]["metrics"]["loss"] > 5
    with pytest.raises(FinetuneError, match="has another tokenizer than the rows were encoded with"):
        evaluate([str(other)], recipe_file(), [])


@pytest.mark.slow
def test_stop_tokens_count_in_the_encoding(recipe_file, train, tiny_base, tmp_path) -> None:
    train(recipe_file(), tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    config = json.loads((other / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises((DataError, BaseError), match="not with a stop token"):
        train(recipe_file(base={"checkpoint": str(other)}), tmp_path / "second")
