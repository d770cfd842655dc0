"""The search among the usual averages: what it tries, what it says, and what it leaves on the disk."""

import fcntl
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.compare import searched
from finetune.compare.average import average
from finetune.compare.average_choice import Choices, chosen
from finetune.compare.average_search import _Place, search
from finetune.compare.average_usual import Usual, checkpoint_of, usual
from finetune.compare.candidates import compared
from finetune.compare.compare import Question
from finetune.compare.results import Asked
from finetune.errors import CheckpointError, FinetuneError
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.store.run import inspect
from tests import forks
from tests.conftest import chat_row
from tests.stories.test_exactness import METHODS

SHORT = {"steps": 8, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}
HELD_OUT = 20  # rows: of the base's eight, none is enough to tell seven averages apart


@pytest.fixture
def trained(recipe_file, train_once, tmp_path):
    """A function that gives a run of eight steps, the same as in the tests of averages."""

    def trained(method: str = "full", every: int = 1, **sections: object) -> Path:
        checkpoint = {"every": f"{every} step{'s' if every > 1 else ''}", "keep": {"last": 20}}
        recipe = recipe_file(adapter=METHODS[method], train=SHORT, checkpoint=checkpoint, **sections)
        return train_once(recipe, tmp_path / f"{method}-{every}")

    return trained


@pytest.fixture
def restless(recipe_file, train_once, tmp_path, tmp_path_factory):
    """A run whose last commit is worse than a mixture of it with the base, and rows that show it."""
    rows = tmp_path_factory.getbasetemp() / "restless.jsonl"
    rows.write_text("".join(f"{json.dumps(chat_row(number))}\n" for number in range(40, 40 + HELD_OUT)))
    recipe = recipe_file(
        adapter=None,
        data={"train": [{"path": str(rows.with_name("few.jsonl"))}], "holdout": [{"path": str(rows)}]},
        train=SHORT | {"steps": 6, "batch_size": 2},
        optimizer={"learning_rate": 0.1, "schedule": "constant"},
        checkpoint={"every": "1 step", "keep": {"last": 2}},
    )
    rows.with_name("few.jsonl").write_text("".join(f"{json.dumps(chat_row(number))}\n" for number in range(20)))
    return train_once(recipe, tmp_path / "restless")


def tried(run: Path, **choices: object) -> list[str]:
    found, checkpoint = checkpoint_of(f"{run}@last")
    return [each.choices.words for each in usual(found, checkpoint, Choices(**choices))]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "averages").iterdir())


@pytest.mark.slow
def test_the_usual_averages_follow_from_the_stored_steps(trained) -> None:
    run = trained()
    mixed = [f"--with-base {share}" for share in ("0.5", "0.75", "0.9")]
    of_five = ["--like cosine --window 5 --stored", "--like 1-sqrt --window 5 --stored"]
    expected = [*(f"--last {count}" for count in (2, 3, 5, 8)), "--ema 0.5", "--ema 0.8", *of_five, *mixed]
    assert tried(run) == [*expected, *(f"--last 5 {each}" for each in mixed)]
    # a decay over all stored steps is no mean of a usual number; few commits give few averages
    for step in (2, 3, 4, 5):
        Store(run).remove(Store(run).find(step))
    decays = [f"--like {like} --window 8 --stored" for like in ("linear", "cosine", "1-sqrt")]
    expected = ["--last 2", "--last 3", "--ema 0.5", *decays, *mixed, *(f"--last 4 {each}" for each in mixed)]
    assert tried(run) == expected
    for step in (1, 6):
        Store(run).remove(Store(run).find(step))
    assert tried(run) == ["--last 2", *mixed, *(f"--last 2 {each}" for each in mixed)]
    Store(run).remove(Store(run).find(7))
    assert tried(run) == mixed
    assert tried(run, window=6, every=2)[:3] == [
        f"--like {like} --window 6 --every 2" for like in ("linear", "cosine", "1-sqrt")
    ]


def test_a_stored_step_stands_for_the_updates_since_the_one_before_it(trained) -> None:
    run = trained(every=4)
    found = chosen([f"{run}@8"], Choices(like="linear", window=6, is_stored=True))
    assert {each.ref: each.weight for each in found} == pytest.approx({f"{run}@4": 2 / 6, f"{run}@8": 4 / 6})
    with pytest.raises(CheckpointError, match="has no step 7"):
        chosen([f"{run}@7"], Choices(like="linear", window=6, is_stored=True))


@pytest.mark.parametrize(
    ("choices", "others", "message"),
    [
        ({"weights": (1.0, 2.0), "last": 2}, {}, "--search does not go with --weights and --last"),
        ({"ema": 0.5}, {}, "--search does not go with --ema"),
        ({"like": "cosine", "window": 4}, {}, "--search does not go with --like"),
        ({"with_base": 0.5, "is_merged": True}, {}, "--search does not go with --with-base and --merged"),
        ({"is_kept_ema": True, "rank": 2}, {}, "--search does not go with --kept-ema and --rank"),
        ({"is_stored": True}, {}, "--search does not go with --stored"),
        ({}, {"output": Path("x"), "is_evaluated": False}, "--search does not go with --output and --no-evaluate"),
        ({"every": 2}, {}, "--search takes --every together with --window"),
    ],
)
def test_options_that_contradict_the_search_are_named(choices, others, message) -> None:
    with pytest.raises(FinetuneError, match=message) as caught:
        search(["runs/a@8"], Choices(**choices), **others)
    assert caught.value.exit_code == 2


def test_a_search_needs_one_stored_step_of_a_run_that_holds_out_rows(trained, tiny_sections) -> None:
    run = trained(every=4)
    for refs, message in (
        ([f"{run}@4", f"{run}@8"], "--search takes one REF"),
        ([f"{run}@7"], "has no step 7; committed: 4, 8"),
        ([f"{run}@0"], "is not a step of a run"),
        ([str(run / "checkpoints/step-00000008")], "is not a step of a run"),
    ):
        with pytest.raises(FinetuneError, match=message):
            search(refs, Choices())
    with pytest.raises(FinetuneError, match="a window of 9 steps begins before step 1"):
        search([f"{run}@8"], Choices(window=9))
    data = {"train": tiny_sections["data"]["train"]}
    with pytest.raises(FinetuneError, match="holds out no rows, so nothing says which average is better"):
        search([f"{trained(every=8, data=data)}@8"], Choices())
    assert not (run / "averages").exists()


def test_a_second_search_and_a_full_disk_leave_other_folders_alone(trained) -> None:
    run = trained(every=8)
    (run / "averages").mkdir()
    held = os.open(run / "averages", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="another search is under way"):
        search([f"{run}@8"], Choices())
    os.close(held)
    for left in (".step-00000008-last-2.search", "..step-00000004-last-2.search.0123abcd"):
        (run / "averages" / left).mkdir()  # a killed one left them
    (run / "averages/mine").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match="/model.safetensors: cannot write: file too large"):
            search([f"{run}@8"], Choices())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert names(run) == ["mine"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_made(trained, monkeypatch) -> None:
    run = trained(every=8)
    monkeypatch.setattr("finetune.plan.disk.free_bytes", lambda _: 1000)
    with pytest.raises(FinetuneError, match=r"3 averages to try: at most 2.* KiB of disk, and 1000 B is free"):
        search([f"{run}@8"], Choices())
    assert names(run) == []


@pytest.mark.slow
def test_the_search_keeps_the_better_one_and_equals_a_comparison(restless, capfd) -> None:
    run = restless
    found = search([f"{run}@last"], Choices())
    assert "7 averages to try: at most" in capfd.readouterr().err
    (kept,) = [each for each in found["averages"] if each["is_kept"]]
    assert found["best"] == found["ref"] == kept["ref"] and kept["members"] == found["members"]
    assert names(run) == [Path(kept["ref"]).name] and not verify(Path(kept["ref"]))
    assert inspect.log(run)["averages"][0]["metrics"] == pytest.approx(found["metrics"])
    (pair,) = [pair for pair in found["pairs"] if pair["b"] == kept["ref"]]
    lowest = min(found["pairs"], key=lambda each: each["difference"] if each["verdict"] == "better" else 9.0)
    assert pair == lowest and pair["interval_of_all"][1] < 0
    # the same averages, made one by one by their commands, and compared
    for each in found["averages"]:
        if not each["is_kept"]:
            words = shlex.split(each["command"])[2:]
            share = float(words[-1]) if "--with-base" in words else None
            average(words[:1], Choices(last=2 if "--last" in words else None, with_base=share))
    alone = compared([each["ref"] for each in found["results"]], Asked(), None, Question(changed=0))
    assert {key: found[key] for key in alone} == alone
    said = searched.text(found)
    assert "allowing for the choice among 8\n" in said and f"kept: {kept['ref']}\n" in said
    assert "the rows that chose it are those that measured it" in said and "removed: --last 2, " in said
    assert str(run / "averages") not in said.replace(kept["ref"], "")


@pytest.mark.slow
def test_what_is_there_is_used_and_not_removed(restless, capfd) -> None:
    run = restless
    results = run / "evaluations"
    mine = average([f"{run}@6"], Choices(last=2), is_evaluated=False)["ref"]
    before = Path(mine, "manifest.json").stat().st_ino
    first = search([f"{run}@6"], Choices())
    made = {path: path.stat().st_mtime_ns for path in results.rglob("*.parquet")}
    again = search([f"{run}@6"], Choices())
    assert "6 averages to try" in (said := capfd.readouterr().err) and "5 averages to try" in said
    assert again == first and made == {path: path.stat().st_mtime_ns for path in results.rglob("*.parquet")}
    assert Path(mine, "manifest.json").stat().st_ino == before and len(names(run)) == 2
    # one with damaged bytes is not that average, and the search touches it no more than any other folder
    weights = Path(mine, "model.safetensors")
    weights.chmod(0o644)
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    whole = search([f"{run}@6"], Choices(), is_all_kept=True)
    assert [each["is_kept"] for each in whole["averages"]] == [True] * 7
    assert whole["averages"][0]["ref"] == f"{mine}-2" and len(names(run)) == 8
    assert [Path(each["file"]).parent.name for each in inspect.problems(str(run))] == [Path(mine).name]
    capfd.readouterr()
    assert search([f"{run}@6"], Choices())["results"] == whole["results"]
    assert "to try" not in capfd.readouterr().err and len(names(run)) == 8


@pytest.mark.slow
def test_an_average_that_was_removed_is_made_again_to_be_kept(trained) -> None:
    """The best of those that are better need not be the one with the lowest loss."""
    run = trained(every=4)
    place = _Place(Usual((f"{run}@8",), Choices(last=2)), run / "averages/it", is_there=False, is_kept=False)
    place.make()
    assert names(run) == [".it.search"]
    place.drop()
    place.drop()
    assert names(run) == []
    place.keep()
    assert names(run) == ["it"] and not verify(place.final) and inspect.log(run)["averages"][0]["metrics"]


@pytest.mark.slow
def test_a_kill_leaves_nothing_that_is_broken(restless) -> None:
    run = restless
    command = [sys.executable, "-m", "finetune", "average", f"{run}@6", "--search"]
    process = forks.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("3 of 7"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert names(run) and all(name.startswith(".") for name in names(run))
    assert not inspect.log(run)["averages"] and not inspect.problems(str(run))
    found = search([f"{run}@6"], Choices())
    assert names(run) == [Path(found["best"]).name]


@pytest.mark.slow
def test_no_average_is_kept_if_the_rows_show_none_that_is_better(trained, finetune) -> None:
    run = trained("lora", every=4)
    said = finetune("average", f"{run}@8", "--search", "--window", 3, "--json")
    facts = json.loads(said.stdout)
    assert said.returncode == 0 and facts["ref"] == facts["best"] == f"{run}@8" and names(run) == []
    assert facts["members"] == [{"ref": f"{run}@8", "weight": 1.0}] and facts["metrics"]["loss"] > 0
    assert "--like cosine --window 3" in [each["choices"] for each in facts["averages"]]
    assert "2 of 3 steps not stored: re-running" in said.stderr
    wrong = finetune("average", f"{run}@8", "--search", "--last", 2)
    assert wrong.returncode == 2 and "--search does not go with --last" in wrong.stderr
    assert finetune("average", f"{run}@8", "--keep-all").returncode == 2
