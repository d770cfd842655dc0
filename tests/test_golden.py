"""The losses of ten steps on a tiny model: a refactor leaves them as they are, a change of numbers updates them and says why."""

from pathlib import Path

from finetune import journal

GOLDEN = {
    "lora": [],
}


def test_x(recipe_file, train, tmp_path: Path) -> None:
    run = train(recipe_file(), tmp_path / "run")
    print([record["loss"] for record in journal.steps(journal.read(run)).values()])
    run2 = train(recipe_file(task={"name": "chat", "max_length": 64, "packing": False}, adapter=None), tmp_path / "run2")
    print([record["loss"] for record in journal.steps(journal.read(run2)).values()])
    run2 = train(recipe_file(task={"name": "chat", "max_length": 64, "packing": True}, adapter=None), tmp_path / "run3")
    print([record["loss"] for record in journal.steps(journal.read(run2)).values()])
