"""The short form of scripts/comparing.py: no more false winners than promised, intervals that hold, differences that are found."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "comparing.py"


@pytest.fixture
def comparing(monkeypatch):
    spec = importlib.util.spec_from_file_location("scripts_comparing", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("world", "simulations"), [(0, 50), (2, 50)])
def test_simulated_comparisons_keep_what_they_promise(comparing, world, simulations):
    tally = comparing.simulate(comparing.WORLDS[world], simulations)
    # 1,000 simulations are in docs/comparing.md; so few vary by this much
    assert tally.false_winners <= 0.1 and tally.false_verdicts <= 0.14
    assert 0.9 <= tally.values <= 0.99 and 0.92 <= tally.pairs <= 0.98
    assert tally.chosen >= 0.9 and tally.last_leads >= 0.88
    assert tally.found >= 0.6 and tally.found_of_all >= 0.6


def test_the_table_has_a_line_for_each_kind_of_rows(comparing):
    assert all(
        comparing.line(world, 1).count("|") == comparing.HEAD.splitlines()[0].count("|")
        for world in comparing.WORLDS[:1]
    )
