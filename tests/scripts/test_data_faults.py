"""Every planted fault is found by the check of its name, and nothing is found in clean text: the short form of scripts/data_faults.py."""

import importlib.util
import sysconfig
from pathlib import Path

import pytest

from finetune.data.checks import CHECKS
from finetune.debug.rows.check import check
from finetune.recipe.load import load

SCRIPT = Path(__file__).parents[2] / "scripts/data_faults.py"
ROWS, HELD_OUT = 80, 20


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("data_faults", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def clean_rows(faults) -> list[tuple[str, str]]:
    rows = faults.clean(faults.docstrings(Path(sysconfig.get_paths()["stdlib"]) / "asyncio"), ROWS + HELD_OUT)
    assert len(rows) == ROWS + HELD_OUT
    return rows


@pytest.fixture
def problems_of(recipe_file, tmp_path):
    def problems_of(train: list[str], holdout: list[str]) -> list[dict]:
        sources = {}
        for name, lines in (("train", train), ("holdout", holdout)):
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(f"{line}\n" for line in lines))
            sources[name] = [{"path": str(path)}]
        recipe = recipe_file(data=sources, task={"name": "chat", "max_length": 4096}, train={"steps": 1})
        return check(load(recipe))["problems"]

    return problems_of


def test_nothing_is_found_in_clean_rows(faults, clean_rows, problems_of) -> None:
    lines = [faults.line(faults.pair(*row)) for row in clean_rows]
    assert problems_of(lines[:ROWS], lines[ROWS:]) == []


def test_every_planted_fault_is_found_and_named(faults, clean_rows, problems_of) -> None:
    planted = faults.planted(clean_rows[:ROWS], clean_rows[ROWS:])
    assert len(planted.expected) >= 40
    assert faults.differences(problems_of(planted.train, planted.holdout), planted.expected) == []


def test_every_check_for_problems_has_a_planted_fault(faults) -> None:
    assert {fault.check for fault in faults.FAULTS.values()} == {
        name for name, check in CHECKS.items() if check.level == "problem"
    }
