"""Every way to share a training among ranks, with every kind of training: the losses and rows of one process, and the same bits each time.

CI trains a few of the cells. `scripts/ranks.py` trains all and prints their table.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

from finetune.store.checkpoints.store import Store
from finetune.store.run import journal, row_losses
from tests.lengths import length
from tests.stories.sharing import METHODS, SHARED_BASES
from tests.stories.workers import Workers

pytestmark = pytest.mark.slow

STEPS = 4
WORLDS = {"ddp-2": (2, 1), "ddp-4": (4, 1), "fsdp-2": (2, 1), "fsdp-4": (4, 1), "hsdp-4": (4, 2)}
"""Ranks and hosts, by strategy and ranks."""


class Cell(NamedTuple):
    world: str
    method: str
    base: str
    packing: str

    @property
    def strategy(self) -> str:
        return self.world.partition("-")[0]


CELLS = [Cell(*each) for each in product(WORLDS, METHODS, SHARED_BASES, ("packed", "padded"))]
FEW = [
    Cell("fsdp-2", "lora", "tied", "packed"),
    Cell("fsdp-2", "full", "experts", "padded"),
    Cell("fsdp-2", "frozen", "untied", "packed"),
    Cell("ddp-2", "full", "untied", "padded"),
    Cell("ddp-2", "frozen", "tied", "padded"),
    Cell("hsdp-4", "lora", "experts", "padded"),
]


class Result(NamedTuple):
    losses: list[float]
    norms: list[float]
    rows: list[list[tuple[int, int, int]]]
    """Of each step: example, row and tokens, in their order."""
    files: dict[str, bytes]


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str, str], Result]:
    """What one process does, by method, base and packing."""
    return {}


@pytest.mark.parametrize("cell", length(FEW, CELLS), ids=lambda cell: "-".join(cell))
def test_ranks_take_the_steps_of_one_process_with_the_same_bits_every_time(
    cell: Cell,
    write_recipe: Callable[..., Path],
    workers: Callable[..., Workers],
    alone: dict[tuple[str, str, str], Result],
    tmp_path: Path,
) -> None:
    kind, packing = (cell.method, cell.base, cell.packing), cell.packing == "packed"
    if kind not in alone:
        workers(1).train(write_recipe("ddp", cell.method, cell.base, packing), tmp_path / "alone")
        alone[kind] = result(tmp_path / "alone")
    recipe = write_recipe(cell.strategy, cell.method, cell.base, packing)
    for name in ("first", "second"):
        workers(*WORLDS[cell.world]).train(recipe, tmp_path / name)
    first, world = result(tmp_path / "first"), Store(tmp_path / "first").find(STEPS).manifest.world
    assert (world.get("strategy"), world.get("hosts", 1)) == (cell.strategy, WORLDS[cell.world][1])
    assert first == result(tmp_path / "second")
    assert first.rows == alone[kind].rows
    assert first.losses == pytest.approx(alone[kind].losses, rel=1e-5)
    assert first.norms == pytest.approx(alone[kind].norms, rel=1e-4)
    assert {name: len(data) for name, data in first.files.items()} == {
        name: len(data) for name, data in alone[kind].files.items()
    }


def losses(run: Path) -> list[float]:
    steps = journal.steps(journal.read(run))
    return [steps[step]["loss"] for step in sorted(steps)]


def result(run: Path) -> Result:
    steps, columns = journal.steps(journal.read(run)), row_losses.Reader(run)
    assert sorted(steps) == list(range(1, STEPS + 1))
    return Result(
        losses(run),
        [steps[step]["grad_norm"] for step in sorted(steps)],
        [[(each.example, each.row, each.tokens) for each in columns.rows(step)] for step in sorted(steps)],
        {path.name: path.read_bytes() for path in Store(run).find(STEPS).path.glob("*.safetensors")},
    )


def test_the_few_cells_have_everything_once() -> None:
    assert set(FEW) <= set(CELLS)
    for values in (METHODS, SHARED_BASES, ("packed", "padded"), ("ddp", "fsdp", "hsdp")):
        assert set(values) <= {value for cell in FEW for value in (*cell, cell.strategy)}


LONG_WAY = (((4, 2), 1), ((1,), 2), ((4,), 3), ((2,), 4), ((4, 2), 5), ((3,), 6), ((4,), 8))
SHORT_WAY = (((4, 2), 1), ((1,), 2), ((3,), 3), ((4, 2), 4))
"""Ranks and hosts, and the step until which they train."""


@pytest.mark.parametrize("strategy", length(["hsdp"], ["fsdp", "hsdp"]))
def test_a_run_of_four_ranks_goes_on_with_any_number_and_back(strategy, write_recipe, workers, tmp_path) -> None:
    way = length(SHORT_WAY, LONG_WAY)
    recipe, whole, moved = write_recipe(strategy, steps=way[-1][1]), tmp_path / "whole", tmp_path / "moved"
    workers(1).train(recipe, whole)
    for world, until in way:
        workers(*world).train(recipe, moved, until=until)
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-4)


def test_the_files_of_several_ranks_are_those_of_one_process_with_the_same_state(
    write_recipe, workers, tmp_path
) -> None:
    """A learning rate of almost nothing: every update is far below a weight's last bit."""
    found = {}
    for world in length(((1, 1), (3, 1), (4, 2)), ((1, 1), (2, 1), (3, 1), (4, 1), (4, 2))):
        recipe = write_recipe("hsdp" if world[1] > 1 else "fsdp", rate=1e-30, ema=0.9)
        run = tmp_path / "-".join(map(str, world))
        workers(*world).train(recipe, run)
        stored = Store(run).find(STEPS).path
        found[world] = [(stored / name).read_bytes() for name in ("model.safetensors", "ema.safetensors")]
    assert all(files == found[1, 1] for files in found.values())
