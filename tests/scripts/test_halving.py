"""The verdict of `scripts/bench/halving.py`: the sweeps themselves are tested with the command."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/bench/halving.py"


@pytest.fixture
def halving():
    spec = importlib.util.spec_from_file_location("halving", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def swept(*losses: float, tokens: int) -> dict:
    return {
        "trials": [
            {"settings": {"rate": rate}, "metrics": {"loss": loss, "loss_stderr": 0.05}, "tokens": tokens}
            for rate, loss in sorted(enumerate(losses), key=lambda item: item[1])
        ]
    }


@pytest.mark.parametrize(
    ("halved", "tokens", "is_good"),
    [((3.0, 2.0), 40, True), ((2.05, 3.0), 40, True), ((2.2, 3.0), 40, False), ((3.0, 2.0), 41, False)],
)
def test_halving_is_good_within_the_interval_of_the_winner_and_at_two_fifths_of_the_tokens(
    halving, halved, tokens, is_good
) -> None:
    assert halving.told(swept(3.0, 2.0, tokens=100), swept(*halved, tokens=tokens)) == is_good
