"""What a tracker is fed, and what a recipe may ask for."""

import json
import shutil

import pytest

from finetune.errors import RecipeError
from finetune.recipe.load import loads
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.store.run.follow import Follower
from finetune.training import trackers
from finetune.training.trackers import follow, refuse_absent
from finetune.training.trackers.tracker import Has
from tests.training.trackers.story import PLANNED, Told, feed


class Kept:
    """A tracker that takes nothing back, in memory."""

    place = "here"

    def __init__(self) -> None:
        self.had: Has | None = None
        self.steps: list[int] = []
        self.evaluated: list[int] = []
        self.notes: list[str] = []

    def log(self, step: int, figures: dict[str, float], time: float) -> None:
        (self.evaluated if "held_out_loss" in figures else self.steps).append(step)

    def note(self, step: int, kind: str, text: str, time: float) -> None:
        self.notes.append(f"{step} {kind}: {text}")

    def flush(self) -> None: ...

    def finish(self) -> None: ...


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """In place of a client, which is all that it stands for."""
    kept = Kept()
    monkeypatch.setattr("finetune.training.trackers.csv.start", lambda about: kept)
    return kept


def test_a_figure_that_a_rollback_may_take_back_waits_for_its_commit(kept, tmp_path) -> None:
    told = Told(tmp_path / "run", "csv", {"spike": "rollback", "span": 2})
    told.begin(0)
    told.train(4)
    feed(told.run, "csv")
    assert kept.steps == [], "at step 5 the guard may go back beyond the commit of step 4"
    told.train(5)
    kept.had = None
    feed(told.run, "csv")
    assert kept.steps == [1, 2, 3, 4]


def test_a_figure_that_no_rollback_takes_back_is_there_at_once(kept, tmp_path) -> None:
    told = Told(tmp_path / "run", "csv")
    told.begin(0)
    told.train(3)
    kept.place = "http://me:word@host/runs/1"
    feed(told.run, "csv")
    assert kept.steps == [1, 2, 3] and kept.evaluated == [0, 3]
    assert "word" not in RunDirectory(told.run).tracker("csv").read_text()


def test_events_are_noted_once(kept, tmp_path) -> None:
    told = Told(tmp_path / "run", "csv", {"spike": "rollback"})
    told.begin(0)
    told.train(5)
    told.roll_back(1)
    for _ in range(2):
        feed(told.run, "csv")
    told.begin(4)
    feed(told.run, "csv")
    assert kept.notes == [
        "0 started: started",
        "4 committed: committed step 4",
        "6 amended: loss 9 is far above; step 6 skipped",
        "4 started: resumed from step 4",
    ]


def test_a_late_evaluation_of_a_step_before_the_newest_arrives(kept, tmp_path) -> None:
    told = Told(tmp_path / "run", "csv")
    told.begin(0)
    told.train(8)
    feed(told.run, "csv")
    told.begin(7)
    told._evaluate()
    kept.had = Has(8, 6)
    feed(told.run, "csv")
    assert kept.steps == [*range(1, 9)] and kept.evaluated == [0, 3, 6, 7]


def test_a_journal_that_lost_its_end_is_read_again(kept, tmp_path) -> None:
    told = Told(tmp_path / "run", "csv")
    told.begin(0)
    told.train(6)
    feed(told.run, "csv")
    path = RunDirectory(told.run).journal
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:6]))  # a power cut: what was not synced is gone
    kept.had = Has(6, 6)
    told.begin(4)
    told.train(9)
    feed(told.run, "csv")
    assert kept.steps == [*range(1, 10)]


def test_a_torn_line_is_read_when_it_is_whole_and_a_damaged_one_is_refused(tmp_path) -> None:
    told = Told(tmp_path / "run", "csv")
    told.begin(0)
    told.train(2)
    path = RunDirectory(told.run).journal
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    follower = Follower(told.run)
    count = len(whole.splitlines())
    assert len([*follower.read()]) == count - 1
    path.write_bytes(whole)
    assert len([*follower.read()]) == 1 and [*follower.read()] == []
    path.write_bytes(whole + b"no record\n" + whole)
    with pytest.raises(Exception, match=f"journal.jsonl:{count + 1}: is not a record"):
        [*follower.read()]


def test_memory_for_a_long_journal_is_that_of_a_batch(kept, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(follow, "BATCH", 4)
    told = Told(tmp_path / "run", "csv")
    told.begin(0)
    told.train(24)
    held: list[int] = []
    release = follow.Feed.release
    monkeypatch.setattr(
        follow.Feed, "release", lambda self, caught_up: (release(self, caught_up), held.append(len(self._held)))
    )
    feed(told.run, "csv")
    assert kept.steps == [*range(1, 25)] and max(held) <= 9, "no more than since the last commit"


def test_a_client_that_is_not_installed_is_named_with_its_line(monkeypatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    loaded = loads((PLANNED / "older/recipe.yaml").read_text() + "\ntrack: [csv, wandb]\n", "recipe.yaml")
    with pytest.raises(RecipeError) as error:
        refuse_absent(loaded.recipe.track, loaded.problem)
    (problem,) = error.value.problems
    assert (problem.key, problem.message) == (
        "track[1]",
        "`wandb` needs the package `wandb`, which is not installed",
    )
    assert problem.hint == "pip install 'finetune[wandb]'"


def test_a_folder_of_a_client_is_not_its_package(tmp_path, monkeypatch) -> None:
    (tmp_path / "clientless").mkdir()  # as `wandb/` is, beside a training
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not trackers._is_installed("clientless")


def test_an_older_plan_and_an_older_recipe_name_their_table(tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(PLANNED / "older", run)
    plan = json.loads((run / "plan.json").read_text())
    for section, track in (({"every": "4 steps"}, ["4 steps"]), (None, [])):
        plan["recipe"]["trackers"] = {"csv": section}
        (run / "plan.json").write_text(json.dumps(plan))
        read, _ = RunDirectory(run).plan()
        assert [str(each.every) for each in read.recipe.track] == track and read.plan_id == plan["plan_id"]
    text = (run / "recipe.yaml").read_text() + "\ntrackers: {csv: {every: 4 steps}}\n"
    assert [str(each.every) for each in loads(text, "recipe.yaml").recipe.track] == ["4 steps"]
    with pytest.raises(RecipeError, match="trackers: unknown key\\nhint: did you mean `track`?"):
        loads(text + "track: [csv]\n", "recipe.yaml")


def test_a_run_writes_nothing_that_only_a_tracker_knows(tmp_path) -> None:
    """The journal alone decides what a tracker gets: without the file of what was sent, all of it is sent again."""
    told = Told(tmp_path / "run", "csv")
    told.begin(0)
    told.train(6)
    feed(told.run, "csv")
    table = (told.run / "figures.csv").read_text()
    RunDirectory(told.run).tracker("csv").write_text("{")
    feed(told.run, "csv")
    assert (told.run / "figures.csv").read_text() == table
    assert len(journal.steps(journal.read(told.run))) == 6
