"""A run that is extended keeps all that it recorded, and is from there on what its plan says: bit for bit, also through kills."""

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from finetune.recipe.load import load
from finetune.store.run import journal, row_losses
from finetune.store.run.directory import RunDirectory
from finetune.training.recorder import Recorder
from finetune.training.run import train as train_run


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing is cleaned up."""


def extend(recipe: Path, run: Path, steps: int, schedule: str | None = None) -> Path:
    train_run(load(recipe, [f"train.steps={steps}"]), run, is_quiet=True, schedule=schedule)
    return run


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch):
    """A function that runs another one, and kills it once a step is recorded."""

    def kill(last: int, action: object, *arguments: object) -> None:
        record = Recorder.step

        def die(self: Recorder, report: object) -> None:
            record(self, report)
            if report.step == last:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "step", die)
            with pytest.raises(Killed):
                action(*arguments)

    return kill


@pytest.fixture
def finished(train_once):
    """Trains as `train`, once a recipe: under whatever name, the steps are the same."""

    def finished(recipe: Path, run: Path) -> Path:
        return train_once(recipe, run.parent / "ten").rename(run)

    return finished


@pytest.fixture
def recipe(recipe_file, chat_data):
    """A function that writes a recipe with two weighted sources: 10 steps, 8 an epoch, a falling learning rate."""

    def write(**optimizer: object) -> Path:
        sources = [
            {"path": str(chat_data / f"{part}.jsonl"), "weight": weight}
            for part, weight in (("train", 0.7), ("holdout", 0.3))
        ]
        return recipe_file(
            data={"train": sources},
            checkpoint={"every": "4 steps", "keep": {"last": 9}},
            optimizer={"learning_rate": 0.01, "schedule": "linear", "warmup": "20%"} | optimizer,
        )

    return write


def records(run: Path) -> dict[int, dict]:
    return journal.steps(journal.read(run))


def events(run: Path, name: str) -> list[dict]:
    return [record for record in journal.read(run) if record.get("event") == name]


def rates(run: Path) -> list[float]:
    return [record["learning_rate"] for _, record in sorted(records(run).items())]


def assert_same_steps(run: Path, other: Path, last: int) -> None:
    steps, others = records(run), records(other)
    assert [journal.difference(steps[step], others[step]) for step in range(1, last + 1)] == [None] * last
    assert [row_losses.read_rows(run, step) for step in range(1, last + 1)] == [
        row_losses.read_rows(other, step) for step in range(1, last + 1)
    ]


def assert_same_run(run: Path, other: Path, last: int) -> None:
    assert_same_steps(run, other, last)
    assert max(records(run)) == max(records(other)) == last
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        tensors, others = (load_file(path / f"checkpoints/step-{last:08d}" / name) for path in (run, other))
        assert tensors.keys() == others.keys()
        assert all(tensors[key].tobytes() == others[key].tobytes() for key in tensors), name
    assert not events(run, "not_exact") and not events(other, "not_exact")


def damage(run: Path, step: int) -> None:
    file = run / f"checkpoints/step-{step:08d}/adapter_model.safetensors"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["continue", "restart"])
def test_a_finished_run_that_is_extended_keeps_what_it_recorded(recipe, finished, tmp_path, schedule, capsys) -> None:
    short = finished(recipe(), tmp_path / "short")
    run = extend(recipe(), finished(recipe(), tmp_path / "run"), 20, schedule)
    assert f"extended after step 10 (--schedule {schedule}): train.steps: 10 -> 20\n" in capsys.readouterr().err
    assert_same_steps(short, run, 10)
    assert sorted(records(run)) == list(range(1, 21))
    plan, before = RunDirectory(run).plan()[0], RunDirectory(short).plan()[0]
    assert rates(run) == [plan.learning_rate(step) for step in range(1, 21)] and rates(short) == rates(run)[:10]
    [event] = events(run, "extended")
    assert (event["step"], event["steps"], event["schedule"]) == (10, [10, 20], schedule)
    assert plan.plan_ids == {before.plan_id, event["plan_id"]}


@pytest.mark.slow
def test_the_learning_rate_rises_again_after_a_restart_and_falls_on_otherwise(recipe, finished, tmp_path) -> None:
    runs = {
        schedule: extend(recipe(), finished(recipe(), tmp_path / schedule), 20, schedule)
        for schedule in ("continue", "restart")
    }
    continued, restarted = rates(runs["continue"])[10:], rates(runs["restart"])[10:]
    assert continued == pytest.approx([0.01 * (20 - step) / 16 for step in range(10, 20)])
    assert restarted == rates(runs["restart"])[:10] and restarted[:3] == [0.005, 0.01, 0.01]


@pytest.mark.slow
def test_a_constant_run_that_was_cut_and_extended_is_the_one_that_was_longer_from_the_start(
    recipe, train, finished, tmp_path, killed_after
) -> None:
    steady = recipe(schedule="constant", warmup=2)
    whole = extend(steady, tmp_path / "whole", 20)
    extended = extend(steady, finished(steady, tmp_path / "finished"), 20)
    killed_after(7, train, steady, tmp_path / "unfinished")
    unfinished = extend(steady, tmp_path / "unfinished", 20)
    assert_same_run(extended, whole, 20)
    assert_same_run(unfinished, whole, 20)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["continue", "restart"])
def test_a_run_that_is_killed_after_it_was_extended_resumes_exactly(
    recipe, finished, tmp_path, killed_after, schedule
) -> None:
    falling, run = recipe(), tmp_path / "run"
    whole = extend(falling, finished(falling, tmp_path / "whole"), 20, schedule)
    finished(falling, run)
    for last in (11, 14):
        killed_after(last, extend, falling, run, 20, schedule)
    assert_same_run(extend(falling, run, 20), whole, 20)
    assert len(events(run, "extended")) == 1


@pytest.mark.slow
def test_steps_that_were_recorded_run_again_as_they_were(recipe, train, tmp_path, killed_after) -> None:
    """Step 7 was recorded and not committed when the run was extended; later its commits at 8 and 12 are damaged."""
    falling, run = recipe(), tmp_path / "run"
    killed_after(7, train, falling, run)
    before = records(run)
    killed_after(14, extend, falling, run, 20, "restart")
    damage(run, 8)
    damage(run, 12)
    extend(falling, run, 20)
    assert not events(run, "not_exact")
    assert [journal.difference(before[step], records(run)[step]) for step in before] == [None] * 7
    assert [record["step"] for record in events(run, "started")] == [0, 4, 4]
    assert rates(run)[7:10] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])  # 13 steps were added, 3 of them warm-up


@pytest.mark.slow
def test_a_run_is_extended_twice(recipe, finished, tmp_path, killed_after) -> None:
    falling, run = recipe(), tmp_path / "run"
    whole = extend(falling, extend(falling, finished(falling, tmp_path / "whole"), 14, "restart"), 20)
    extend(falling, finished(falling, run), 14, "restart")
    for step in (14, 12, 10):  # back to a commit of the first plan
        damage(run, step)
    killed_after(13, extend, falling, run, 20)
    assert_same_run(extend(falling, run, 20), whole, 20)
    assert [(event["step"], event["steps"]) for event in events(run, "extended")] == [(10, [10, 14]), (14, [14, 20])]


@pytest.mark.slow
def test_a_kill_between_the_longer_plan_and_its_event_loses_neither(recipe, finished, tmp_path, monkeypatch) -> None:
    falling, run, event = recipe(), tmp_path / "run", Recorder.event

    def die(self: Recorder, name: str, **figures: object) -> None:
        if name == "extended":
            raise Killed
        event(self, name, **figures)

    finished(falling, run)
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "event", die)
        with pytest.raises(Killed):
            extend(falling, run, 20, "restart")
    extend(falling, run, 20, "restart")
    assert [event["step"] for event in events(run, "extended")] == [10]
