"""The moving average of the trained weights: what plain code makes of every step's weights, kept over kills, replays and processes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.compare.average import average
from finetune.compare.average_choice import Choices
from finetune.debug import branch as branches
from finetune.debug.replay import replay
from finetune.errors import RecipeError, RunError
from finetune.model import adapters, base
from finetune.plan import disk
from finetune.plan.memory import Device, Work, parts
from finetune.plan.shape import shape_of
from finetune.recipe.load import load
from finetune.store.checkpoints.verify import verify
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.training.build import trained_model
from finetune.training.resolve import resolve
from tests.compare.test_average import OFTEN, SHORT, weights_of
from tests.stories.same_run import assert_same_run
from tests.stories.test_exactness import METHODS
from tests.stories.workers import Killed, Workers, killed

EMA = SHORT | {"ema": {"decay": 0.8, "every": 1}}


@pytest.fixture
def trained(recipe_file, train_once, tmp_path):
    """A function that gives a run of eight steps with a moving average."""

    def trained(method: str = "full", ema: object = 0.8, **train: object) -> Path:
        settings = SHORT | {"ema": ema} | train
        recipe = recipe_file(
            method, adapter=METHODS[method], train=settings, checkpoint=OFTEN, evaluate={"every": "3 steps"}
        )
        return train_once(recipe, tmp_path / method)

    return trained


def at_the_start(run: Path) -> dict[str, torch.Tensor]:
    plan, _ = RunDirectory(run).plan()
    directory = base.directory(plan.recipe.base, plan.base)
    return adapters.weights(trained_model(plan, directory, torch.device("cpu")))


@pytest.mark.parametrize(
    ("method", "every"), [("full", 1), ("full", 3), ("lora", 1), pytest.param("frozen", 2, marks=pytest.mark.slow)]
)
def test_it_is_what_plain_code_makes_of_the_weights_of_every_step(method, every, trained) -> None:
    run = trained(method, {"decay": 0.8, "every": every})
    expected = {name: tensor.double() for name, tensor in at_the_start(run).items()}
    for step in range(1, 9):
        checkpoint = run / f"checkpoints/step-{step:08d}"
        weights = weights_of(checkpoint)
        if step % every == 0:
            expected = {name: 0.8 * expected[name] + 0.2 * weights[name].double() for name in expected}
        found = load_file(checkpoint / "ema.safetensors")
        still = {"model.embed_tokens.weight"} if method == "frozen" else set()
        assert not still & found.keys() and found.keys() <= expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6)
        assert not verify(checkpoint)


@pytest.mark.slow
def test_it_changes_nothing_in_the_training_and_is_evaluated_beside_it(
    trained, recipe_file, train_once, tmp_path
) -> None:
    run = trained()
    recipe = recipe_file("plain", adapter=None, train=SHORT, checkpoint=OFTEN, evaluate={"every": "3 steps"})
    plain = train_once(recipe, tmp_path / "plain")
    steps, others = (journal.steps(journal.read(each)) for each in (run, plain))
    assert [journal.difference(steps[step], others[step]) for step in steps] == [None] * 8
    evaluated, of_plain = (journal.evaluations(journal.read(each)) for each in (run, plain))
    assert "ema_loss" not in evaluated[0] and evaluated[6].keys() - of_plain[6].keys() == {
        "ema_loss",
        "ema_perplexity",
        "ema_loss_stderr",
    }
    assert {step: metrics["loss"] for step, metrics in evaluated.items()} == {
        step: metrics["loss"] for step, metrics in of_plain.items()
    }
    made = average([f"{run}@6"], Choices(is_kept_ema=True))
    assert made["metrics"]["loss"] == pytest.approx(evaluated[6]["ema_loss"], abs=1e-6)
    assert not list(plain.glob("checkpoints/*/ema.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_killed_run_resumes_and_replays_to_the_bit(method, recipe_file, train, tmp_path) -> None:
    seldom = {"every": "3 steps", "keep": {"last": 9}}
    recipe = recipe_file(adapter=METHODS[method], train=EMA, checkpoint=seldom, evaluate={"every": "2 steps"})
    whole = train(recipe, tmp_path / "whole")
    for after in (2, 5):
        with killed(after=after), pytest.raises(Killed):
            train(recipe, tmp_path / "killed")
    train(recipe, tmp_path / "killed")
    assert_same_run(whole, tmp_path / "killed")
    assert replay(whole, 1, 8)["identical"]


@pytest.mark.slow
def test_an_average_of_bf16_weights_is_in_fp32_and_leaves_them_alone(recipe_file, train, tmp_path) -> None:
    settings = SHORT | {"precision": "bf16", "weights": "bf16", "steps": 3}
    runs = [
        train(
            recipe_file(name, adapter=None, train=settings | ema, checkpoint=OFTEN, evaluate={"every": "1 step"}),
            tmp_path / name,
        )
        for name, ema in (("with", {"ema": 0.5}), ("without", {}))
    ]
    steps, others = (journal.steps(journal.read(run)) for run in runs)
    assert [journal.difference(steps[step], others[step]) for step in steps] == [None] * 3
    kept = load_file(runs[0] / "checkpoints/step-00000003/ema.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    expected = {name: tensor.float() for name, tensor in at_the_start(runs[0]).items()}
    for step in (1, 2, 3):
        weights = weights_of(runs[0] / f"checkpoints/step-{step:08d}")
        expected = {name: (tensor + weights[name].float()) / 2 for name, tensor in expected.items()}
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_keep_the_average_of_one(strategy, recipe_file, train, tmp_path) -> None:
    settings, workers = EMA | {"strategy": strategy}, Workers(2, tmp_path)
    recipe = recipe_file(adapter=None, train=settings, checkpoint={"every": "3 steps"})
    try:
        assert workers.train(recipe, tmp_path / "two") == "finished"
        assert workers.train(recipe, tmp_path / "interrupted", killed_after=5) == "killed"
        assert workers.train(recipe, tmp_path / "interrupted") == "finished"
    finally:
        workers.close()
    assert_same_run(tmp_path / "two", tmp_path / "interrupted")
    one = train(recipe, tmp_path / "one")
    first, second = (load_file(each / "checkpoints/step-00000008/ema.safetensors") for each in (one, tmp_path / "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_resume_keeps_it_and_a_branch_may_begin_or_end_it(trained, recipe_file, train, tmp_path) -> None:
    run = trained()
    with pytest.raises(RunError, match="train.ema.decay: 0.8 -> 0.9"):
        settings = SHORT | {"ema": 0.9}
        train(recipe_file(adapter=None, train=settings, checkpoint=OFTEN, evaluate={"every": "3 steps"}), run)
    ended = branches.branch(f"{run}@6", tmp_path / "ended", branches.Choices(("train.ema=null",)), is_quiet=True)
    assert not list(ended.glob("checkpoints/*/ema.safetensors"))
    begun = branches.branch(f"{ended}@7", tmp_path / "begun", branches.Choices(("train.ema=0.5",)), is_quiet=True)
    seventh, eighth = (weights_of(begun / f"checkpoints/step-0000000{step}") for step in (7, 8))
    for name, tensor in load_file(begun / "checkpoints/step-00000008/ema.safetensors").items():
        torch.testing.assert_close(tensor, (seventh[name] + eighth[name]) / 2, rtol=0, atol=1e-6)


def test_a_plan_counts_it_in_memory_and_on_disk(recipe_file) -> None:
    plans = [
        resolve(load(recipe_file(name, adapter=None, train=SHORT | ema))).plan
        for name, ema in (("with", {"ema": 0.99}), ("without", {}))
    ]
    size = 4 * plans[0].trainable_parameters
    assert disk.checkpoint_bytes(plans[0]) - disk.checkpoint_bytes(plans[1]) == size
    device, work = Device(80 * 2**30, is_gpu=True), Work(128, 128)
    shape = shape_of(base.load_config(Path(plans[0].recipe.base.checkpoint)))
    found = [parts(plan, shape, work, device) for plan in plans]
    assert found[0]["average"] >= size and "average" not in found[1]
    assert plans[1].recipe.train.ema is None and plans[0].plan_id != plans[1].plan_id


def test_the_recipe_takes_a_number_or_a_section(recipe_file) -> None:
    def of(value: object):
        return load(recipe_file(train=SHORT | {"ema": value})).recipe.train.ema

    assert of(0.99) == of({"decay": 0.99}) == of({"decay": 0.99, "every": 1})
    for value, message in (
        (1.5, "must be less than 1, not `1.5`"),
        (True, "must be a section with keys"),
        ({"every": 2}, "is required"),
    ):
        with pytest.raises(RecipeError, match=message):
            of(value)
