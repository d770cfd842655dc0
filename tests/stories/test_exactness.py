"""Stopped anywhere and started again with the same command, a run ends as if it had never stopped: bit for bit.

The matrix: what is trained, how rows are arranged, what happens meanwhile, on how many processes. Real SIGKILLs are in
`test_processes`; here processes stay, and forget.
"""

import json
import shutil
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest

from finetune.data import pack
from finetune.recipe.load import load
from finetune.store.run import journal
from finetune.training.resolve import resolve
from tests.lengths import length
from tests.stories.same_run import assert_same_run
from tests.stories.workers import Workers

METHODS = {
    "lora": {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
    "full": None,
    "frozen": {"name": "frozen", "freeze": ["model.embed_tokens.*", "model.layers.0.*"]},
}
PACKING = {"packed": True, "padded": False}
ONE_MICRO_BATCH_A_RANK = {1: 512, 2: 200, 3: 96}  # tokens that divide six rows among so many ranks


@dataclass(frozen=True)
class Feature:
    """What a cell has beside dropout, which all have: 6 steps of 6 rows, of the 7 steps of an epoch."""

    is_accumulated: bool = False
    evaluate: dict | None = None
    steps: int = 6
    checkpoint: dict = field(default_factory=lambda: {"every": "2 steps"})
    killed_after: tuple[int, ...] = (3,)


FEATURES = {
    "dropout": Feature(),
    "accumulation": Feature(is_accumulated=True),
    "evaluation": Feature(evaluate={"every": "3 steps"}, killed_after=(4,)),
    # killed after the short last update of an epoch, which is then repeated, and once more after it was saved
    "epoch-edge": Feature(steps=9, checkpoint={"every": ["3 steps", "7 steps"]}, killed_after=(7, 8)),
    # killed before the first save too; all at once
    "resumed-twice": Feature(
        is_accumulated=True,
        evaluate={"every": "2 steps"},
        steps=9,
        checkpoint={"every": "3 steps", "keep": {"last": 2, "best": 1}},
        killed_after=(2, 5, 8),
    ),
    # in the save of step 3; as two are under way at most, rank 0 waits for it at step 9 at the latest, the others in step 10
    "signal-in-save": Feature(steps=11, checkpoint={"every": "3 steps"}, killed_after=()),
}
MOST = "resumed-twice", "signal-in-save"  # the two that have most
BY_DEFAULT = {
    (1, method, "packed", name) for method, name in product(METHODS, FEATURES) if method == "lora" or name in MOST
}


@pytest.fixture(scope="session")
def workers(tmp_path_factory):
    """A function of a world size: its workers, started when they are first asked for."""
    logs = tmp_path_factory.mktemp("logs")
    started: dict[int, Workers] = {}
    yield lambda world_size: started.setdefault(world_size, Workers(world_size, logs))
    for each in started.values():
        each.close()


@pytest.fixture(scope="session")
def whole_run(workers, tmp_path_factory):
    """A function that gives the uninterrupted run of a recipe; one for all cells that differ only in their interruptions."""
    runs: dict[tuple[int, str], Path] = {}

    def train(recipe: Path, world_size: int) -> Path:
        key = world_size, recipe.read_text()
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("whole") / "whole"
            assert workers(world_size).train(recipe, runs[key]) == "finished"
        return runs[key]

    return train


@pytest.fixture(scope="session")
def dropout_base(tiny_base, tmp_path_factory) -> Path:
    """The tiny base with dropout of its own, so that also a run without an adapter draws random numbers."""
    directory = shutil.copytree(tiny_base, tmp_path_factory.mktemp("dropout") / "base")
    config = json.loads((directory / "config.json").read_bytes())
    (directory / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    return directory


@pytest.fixture
def write_recipe(recipe_file, dropout_base, tiny_sections):
    """A function that writes the recipe of a cell."""

    def write(world_size: int, method: str, packing: str, feature: Feature, strategy: str = "ddp") -> Path:
        budget = 64 if feature.is_accumulated else ONE_MICRO_BATCH_A_RANK[world_size]
        parts = ("train", "holdout") if feature.evaluate else ("train",)
        return recipe_file(
            base={"checkpoint": str(dropout_base)},
            adapter=METHODS[method],
            task={"name": "chat", "max_length": 64, "packing": PACKING[packing]},
            data={part: tiny_sections["data"][part] for part in parts},
            train={
                "steps": feature.steps,
                "batch_size": 6,
                "precision": "fp32",
                "micro_batch_tokens": budget,
                "strategy": strategy,
            },
            evaluate=feature.evaluate,
            checkpoint=feature.checkpoint,
        )

    return write


def cells() -> list:
    """Every cell. By default run the packed ones of one process with LoRA, and with other methods the two that have most; the rest is slow.
    The short form has each method and each packing on several ranks, but not each of both."""
    combinations = list(product(METHODS, PACKING))
    of_ranks = length([("lora", "packed"), ("full", "padded"), ("frozen", "packed")], combinations)
    return [
        pytest.param(
            world_size,
            strategy,
            *combination,
            feature,
            id=f"{world_size}-{strategy}-{'-'.join(combination)}-{feature}",
            marks=() if (world_size, *combination, feature) in BY_DEFAULT else pytest.mark.slow,
        )
        for world_size, strategy, methods, features in (
            (1, "ddp", combinations, FEATURES),
            (2, "ddp", of_ranks, FEATURES),
            (3, "ddp", of_ranks, length(MOST, FEATURES)),
            (2, "fsdp", of_ranks, MOST),
        )
        for combination, feature in product(methods, features)
    ]


@pytest.mark.parametrize(("world_size", "strategy", "method", "packing", "name"), cells())
def test_a_resumed_run_equals_an_uninterrupted_one(
    world_size, strategy, method, packing, name, workers, whole_run, write_recipe, tmp_path
) -> None:
    feature, ranks, run = FEATURES[name], workers(world_size), tmp_path / "interrupted"
    recipe = write_recipe(world_size, method, packing, feature, strategy)
    for step in feature.killed_after:
        assert ranks.train(recipe, run, killed_after=step) == "killed"
    if name == "signal-in-save":
        rank = list(METHODS).index(method) % world_size
        assert ranks.train(recipe, run, signalled=(3, rank)) == "stopped"
        assert events(run, "committed")[-1] == max(journal.steps(journal.read(run)))
    assert ranks.train(recipe, run) == "finished"
    assert_same_run(whole_run(recipe, world_size), run)
    assert events(run, "started")[-1] > 0, "a run that starts over is exact too, and shows nothing"


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("world_size", ONE_MICRO_BATCH_A_RANK)
def test_a_step_is_one_micro_batch_a_rank_and_more_when_accumulated(world_size, packing, write_recipe) -> None:
    for name, is_accumulated in (("dropout", False), ("accumulation", True)):
        resolved = resolve(load(write_recipe(world_size, "full", packing, FEATURES[name])))
        arrange = pack.packed if PACKING[packing] else pack.padded
        for step in range(1, 7):
            lengths = resolved.train.lengths[resolved.plan.order.examples_of(step)].tolist()
            slots = arrange(lengths, resolved.plan.recipe.train.micro_batch_tokens)
            assert (len(slots) > world_size) == is_accumulated


@pytest.mark.parametrize("packing", PACKING)
def test_a_base_with_dropout_is_trained_with_it(packing, whole_run, write_recipe, tiny_base, dropout_base) -> None:
    recipe = write_recipe(1, "full", packing, FEATURES["dropout"])
    dropped = whole_run(recipe, 1)
    recipe.write_text(recipe.read_text().replace(str(dropout_base), str(tiny_base)))
    losses = [journal.steps(journal.read(run))[1]["loss"] for run in (dropped, whole_run(recipe, 1))]
    assert losses[0] != losses[1]


def events(run: Path, name: str) -> list[int]:
    """The steps at which something happened."""
    return [record["step"] for record in journal.read(run) if record.get("event") == name]
