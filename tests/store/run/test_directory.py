import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.store.run.directory import RunDirectory, part_name, step_name, step_of, steps_of_part

ROOT = Path(__file__).parents[3]
OWNER = ROOT / "finetune/store/run/directory.py"
FIXTURE = ROOT / "tests/fixtures/run_before_rooms/runs/older"
FILES = {"plan.json", "journal.jsonl", "recipe.yaml", "lease.json", "silence.json", "publish.log"}
"""Named nowhere else, as a whole or as a part of a path."""
WORDS = {"lock", "checkpoints", "attempts", "trash", "pins", "rows", "modules", "experts", "debug", "packages"}
WORDS |= {"published"}
"""Named nowhere else in a path; other things have these names too."""


def spelled(code: str) -> Iterator[str]:
    """The strings of a file that spell a name of a run. Docstrings may."""
    tree = ast.parse(code)
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    ends = {node.right for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            parts = node.value.split("/")
            is_path = node in ends or (len(parts) > 1 and " " not in node.value)
            names = FILES | WORDS if is_path else FILES
            if names & {*parts} or any(part.startswith("step-") for part in parts):
                yield f"{node.lineno}: {node.value}"


@pytest.mark.slow
def test_no_other_file_spells_a_name_of_a_run() -> None:
    found = {path: [*spelled(path.read_text())] for path in (ROOT / "finetune").rglob("*.py")}
    assert {path: names for path, names in found.items() if names and path != OWNER} == {}
    assert found[OWNER]


@pytest.mark.parametrize(
    "code", ['run / "plan.json"', 'run / "rows"', 'f"{run}/checkpoints/"', 'f"step-{step:08d}"', 'glob("*/plan.json")']
)
def test_a_name_that_is_spelled_is_found(code: str) -> None:
    assert [*spelled(f"path = {code}")]


def test_everything_in_a_run_has_a_name() -> None:
    paths = RunDirectory(FIXTURE)
    named = {paths.plan_file, paths.journal, paths.recipe, paths.lease, paths.lock}
    named |= {paths.checkpoints, paths.attempts, paths.trash, paths.rows, paths.modules, paths.pins}
    assert {*FIXTURE.iterdir()} <= named
    assert [paths.checkpoint(step) for step in paths.stored_steps()] == sorted(paths.checkpoints.iterdir())
    assert all(steps_of_part(path.name) for path in paths.rows.iterdir())


def test_what_a_step_is_called_tells_the_step() -> None:
    assert step_name(500) == "step-00000500"
    assert step_of(step_name(500)) == 500
    assert steps_of_part(part_name(3, 12)) == (3, 12)
    assert [step_of(name) for name in ("step-500", "step-00000500-ab", "other")] == [None] * 3


def test_a_pin_is_found_by_its_step(tmp_path: Path) -> None:
    paths = RunDirectory(tmp_path)
    assert paths.pinned() == {}
    paths.pins.mkdir()
    for name in ("by-hand", "base-ab", ""):  # the last is no pin
        paths.pin(7, name).touch()
    assert paths.pinned() == {7: ["step-00000007-base-ab", "step-00000007-by-hand"]}


def test_a_folder_with_a_plan_is_a_run(tmp_path: Path) -> None:
    for name in ("two", "one", "other"):
        (tmp_path / name).mkdir()
    for name in ("two", "one"):
        RunDirectory(tmp_path / name).plan_file.touch()
    assert not RunDirectory(tmp_path / "other").is_run
    assert RunDirectory(tmp_path / "one").is_run
    assert RunDirectory(tmp_path / "other").neighbours() == [tmp_path / "one", tmp_path / "two"]
