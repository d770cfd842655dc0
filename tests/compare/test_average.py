"""Averages of a run's checkpoints: their numbers, the windows made by replay, and their life as a ref."""

import json
import math
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file

from finetune.compare.average import average
from finetune.compare.average_choice import Choices
from finetune.compare.evaluate import evaluate
from finetune.data.heldout import lineage
from finetune.errors import CheckpointError, FinetuneError, RunError
from finetune.store import places
from finetune.store.checkpoints.manifest import read
from finetune.store.checkpoints.verify import verify
from finetune.store.run import inspect
from finetune.training.opened import open_model
from tests.stories.test_exactness import METHODS

OFTEN, SELDOM = {"every": "1 step", "keep": {"last": 20}}, {"every": "4 steps", "keep": {"last": 20}}
SHORT = {"steps": 8, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128}


@pytest.fixture
def trained(recipe_file, train_once, tmp_path):
    """A function that gives a run of eight steps, trained once a session."""

    def trained(method: str, checkpoint: dict = OFTEN, **sections: object):
        recipe = recipe_file(adapter=METHODS[method], train=SHORT, checkpoint=checkpoint, **sections)
        return train_once(recipe, tmp_path / f"{method}-{checkpoint['every'][0]}")

    return trained


def weights_of(directory) -> dict[str, torch.Tensor]:
    paths = (
        path
        for path in directory.glob("*.safetensors")
        if path.name not in ("optimizer.safetensors", "ema.safetensors")
    )
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def files_of(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "manifest.json"}


@pytest.mark.parametrize("like", ["linear", "cosine", "1-sqrt"])
def test_a_window_has_the_closed_weights_of_the_paper(like, trained) -> None:
    run, count = trained("full"), 5
    curve = {
        "linear": lambda i: 1 - i / count,
        "cosine": lambda i: (1 + math.cos(math.pi * i / count)) / 2,
        "1-sqrt": lambda i: 1 - math.sqrt(i / count),
    }[like]
    closed = [curve(i) - (curve(i + 1) if i + 1 < count else 0.0) for i in range(count)]
    made = average([f"{run}@8"], Choices(like=like, window=count), is_evaluated=False)
    assert [each["weight"] for each in made["members"]] == pytest.approx(closed, abs=1e-6)
    assert [each["ref"] for each in made["members"]] == [f"{run}@{step}" for step in range(4, 9)]
    states = [weights_of(run / f"checkpoints/step-{step:08d}") for step in range(4, 9)]
    found = load_file(f"{made['ref']}/model.safetensors")
    assert found.keys() == states[0].keys()
    for name, tensor in found.items():
        expected = sum(weight * state[name].double() for weight, state in zip(closed, states, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", [None, 0.75])
def test_a_replayed_window_is_to_the_bit_that_of_stored_steps(method, base, trained, capfd) -> None:
    choices = Choices(like="cosine", window=6, with_base=base)
    stored, replayed = trained(method), trained(method, SELDOM)
    before = files_of(replayed / "checkpoints/step-00000008")
    one, two = (average([f"{run}@8"], choices, run / "averages/it") for run in (stored, replayed))
    assert "4 of 6 steps not stored: re-running 6 steps" in capfd.readouterr().err
    assert one["metrics"] == two["metrics"] and one["form"] == two["form"]
    found, others = (files_of(run / "averages/it") for run in (stored, replayed))
    stages = found.pop("stages.json"), others.pop("stages.json")
    assert stages[0] != b"[]" and found == others
    assert not verify(replayed / "averages/it") and files_of(replayed / "checkpoints/step-00000008") == before
    digests = [member["digest"] is not None for member in read(replayed / "averages/it").manifest.members]
    assert digests == [*([True] if base else []), False, True, False, False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_ref_and_the_same_ref_twice_are_that_ref(method, trained) -> None:
    run = trained(method)
    own = weights_of(run / "checkpoints/step-00000008")
    for refs, weights in (([f"{run}@8"], ()), ([f"{run}@8"] * 3, (1, 2, 4))):
        made = average(refs, Choices(weights=weights), is_evaluated=False)
        found = weights_of(run / "averages" / made["ref"].rpartition("/")[2])
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in own.items())


def test_other_ways_to_weigh(trained) -> None:
    run = trained("full")
    states = {step: weights_of(run / f"checkpoints/step-{step:08d}") for step in range(1, 9)}
    base = dict(open_model(f"{run}@0").model.named_parameters())
    refs = [f"{run}@{step}" for step in (2, 5, 8)]
    cases = {
        "mean": (refs, Choices(), {2: 1 / 3, 5: 1 / 3, 8: 1 / 3}),
        "weights": (refs, Choices(weights=(1, 2, 1)), {2: 0.25, 5: 0.5, 8: 0.25}),
        "ema": (refs, Choices(ema=0.5), {2: 0.25, 5: 0.25, 8: 0.5}),
        "last": ([f"{run}@6"], Choices(last=2), {5: 0.5, 6: 0.5}),
        "every": ([f"{run}@8"], Choices(like="linear", window=6, every=3), {5: 0.5, 8: 0.5}),
        "base": ([f"{run}@8"], Choices(with_base=0.25), {0: 0.75, 8: 0.25}),
    }
    for name, (refs, choices, expected) in cases.items():
        made = average(refs, choices, run / "averages" / name, is_evaluated=False)
        assert {each["ref"]: each["weight"] for each in made["members"]} == pytest.approx(
            {f"{run}@{step}": weight for step, weight in expected.items()}
        )
        for tensor, found in load_file(run / "averages" / name / "model.safetensors").items():
            each = (weight * (states[step] if step else base)[tensor].double() for step, weight in expected.items())
            torch.testing.assert_close(found.double(), sum(each), rtol=0, atol=1e-6)


def test_options_that_do_not_fit_are_refused(trained, tmp_path) -> None:
    run = trained("full")
    two = [f"{run}@4", f"{run}@8"]
    for refs, choices, message in (
        (two, {"weights": (1, 1), "ema": 0.9}, "--weights and --ema choose weights in different ways"),
        (two, {"last": 2}, "--last takes one REF"),
        (two[:1], {"like": "cosine"}, "--like and --window go together"),
        (two, {"weights": (1,)}, "--weights has 1 numbers for 2 refs"),
        (two, {"weights": (0, 0)}, "not all 0"),
        (two, {"weights": (2, -1)}, "at least 0"),
        (two[:1], {"like": "cosine", "window": 5}, "a window of 5 steps begins before step 1"),
        (two[:1], {"last": 5}, "has 4 checkpoints up to step 4"),
        ([f"{run}@9"], {}, "has no step 9"),
        ([f"{run}@9"], {"like": "linear", "window": 2}, "step 9 was never made"),
        ([f"{run}@0"], {}, "an average needs a checkpoint beside the base"),
        (two, {"rank": 2}, "--rank is about LoRA adapters alone"),
        (two, {"is_kept_ema": True}, "has no moving average"),
    ):
        with pytest.raises(FinetuneError, match=message):
            average(refs, Choices(**choices))
    with pytest.raises(CheckpointError, match="is a place for something else"):
        average(two, Choices(), run / "checkpoints/step-00000009")
    with pytest.raises(CheckpointError, match="is there already"):
        average(two, Choices(), tmp_path)
    assert not (run / "averages").exists() or not list((run / "averages").iterdir())


@pytest.mark.slow
def test_an_average_is_a_ref_like_any_other(trained, finetune, train, recipe_file, tmp_path) -> None:
    run = trained("lora")
    made = average([f"{run}@4", f"{run}@8"], Choices())
    (found,) = evaluate([made["ref"]], None, ())
    assert found["metrics"] == made["metrics"] and found["seen_rows"] == 0
    assert inspect.log(run)["averages"][0]["ref"] == made["ref"] and not inspect.problems(str(run))
    assert [each["ref"] for each in inspect.describe(made["ref"])["members"]] == [f"{run.name}@4", f"{run.name}@8"]
    with pytest.raises(RunError, match="is a checkpoint, not a run: nothing resumes from it"):
        train(recipe_file("again"), run / "averages" / made["ref"].rpartition("/")[2])
    assert not verify(run / "averages" / made["ref"].rpartition("/")[2])
    # a stage that begins with it knows who saw which rows
    second = train(
        recipe_file("second", base={"checkpoint": made["ref"]}, train=SHORT | {"steps": 1}), tmp_path / "second"
    )
    assert [stage.ref for stage in lineage.stages(f"{second}@1")] == ["second@1", f"{run.name}@8"]
    path = run / "averages" / made["ref"].rpartition("/")[2] / "adapter_model.safetensors"
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert [each["file"] for each in inspect.problems(str(run))] == [f"averages/{path.parent.name}/{path.name}"]
    with pytest.raises(CheckpointError, match="has other bytes than were committed"):
        open_model(made["ref"])


def test_members_of_two_runs_name_the_rows_of_both(trained, recipe_file, train, tmp_path) -> None:
    run = trained("full")
    other = train(recipe_file("other", adapter=None, train=SHORT | {"steps": 2, "seed": 1}), tmp_path / "other")
    made = average([f"{run}@8", f"{other}@2"], Choices())
    assert {stage.ref for stage in lineage.stages(made["ref"])} == {f"{run.name}@8", "other@2"}
    assert made["ref"].startswith(f"{run}/averages/")


def test_an_adapter_outside_its_run_is_evaluated_where_its_base_is_named(trained, tiny_base, recipe_file, tmp_path):
    run, recipe, out = trained("lora"), recipe_file("asked"), tmp_path / "outside/mean"
    inside, outside = (average([f"{run}@4", f"{run}@8"], Choices(), where)["ref"] for where in (None, out))
    with pytest.raises(CheckpointError, match="is an adapter whose run directory is not around it") as caught:
        evaluate([outside], recipe, ())
    assert caught.value.hint == "name its base with --base, or move it into `averages/` of its run"
    with places.named([str(tiny_base)], {}):
        found = [result["metrics"] for result in evaluate([inside, outside], recipe, ())]
    assert found[0] == found[1]
    # the one that is named counts, also where the adapter's own name leads to one
    with places.named([str(tmp_path / "nowhere")], {}), pytest.raises(FinetuneError, match="nowhere"):
        evaluate([outside], recipe, (), is_again=True)


def test_a_disk_that_is_full_leaves_nothing(trained) -> None:
    run = trained("full")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            average([f"{run}@4", f"{run}@8"], Choices())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list((run / "averages").iterdir()) == []
    (run / "averages/.step-00000008-mean-of-2.0123abcd").mkdir()  # a killed one left it
    assert average([f"{run}@4", f"{run}@8"], Choices(), is_evaluated=False)["members"]
    assert [path.name for path in (run / "averages").iterdir()] == ["step-00000008-mean-of-2"]


@pytest.mark.slow
def test_the_command_prints_its_members_and_figures(trained, finetune) -> None:
    run = trained("lora")
    said = finetune("average", f"{run}@8", "--like", "1-sqrt", "--window", 3, "--json")
    facts = json.loads(said.stdout)
    assert said.returncode == 0 and facts["ref"].endswith("averages/step-00000008-like-1-sqrt-window-3")
    assert [each["ref"] for each in facts["members"]] == [f"{run}@{step}" for step in (6, 7, 8)]
    assert facts["metrics"]["loss"] > 0
    again = finetune("average", f"{run}@8", "--last", 2, "--no-evaluate", "--output", run / "averages/two")
    assert again.stdout.splitlines() == [
        f"0.500000  {run}@7",
        f"0.500000  {run}@8",
        f"averaged as {run / 'averages/two'} (adapter)",
    ]


@pytest.mark.slow
def test_an_average_is_packaged_with_its_members(trained, tmp_path) -> None:
    from finetune.package import proof
    from finetune.package.export import package
    from finetune.package.verify.verify import verify as verify_package

    run = trained("lora")
    made = average([f"{run}@8"], Choices(like="cosine", window=4))
    package(made["ref"], tmp_path / "dist", load=proof.load_here)
    card = (tmp_path / "dist/README.md").read_text()
    assert "this is the average of 4 checkpoints up to step 8 of 8" in card
    assert f"{made['metrics']['loss']:.4f} (" in card
    assert "finetune average runs/again@8 --like cosine --window 4 --output runs/again/averages/it" in card
    assert f"| averaged with weight 0.146447 | `{run.name}@5`, `blake3:" in card
    assert verify_package(str(tmp_path / "dist"))["ok"]
    predicate = json.loads((tmp_path / "dist/provenance.intoto.jsonl").read_text())["predicate"]
    assert len(predicate["buildDefinition"]["externalParameters"]["average"]["members"]) == 4
    unevaluated = average([f"{run}@8"], Choices(last=2), is_evaluated=False)
    with pytest.raises(FinetuneError, match="is an average that was not evaluated"):
        package(unevaluated["ref"], tmp_path / "other", load=proof.load_here)
