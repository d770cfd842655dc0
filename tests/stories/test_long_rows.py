"""Rows beyond the positions of a base: RoPE scaling in training, resume, checkpoints, packages, and in plain transformers."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.compare.evaluate import evaluate
from finetune.debug.branch import Choices, branch
from finetune.errors import BaseError, FinetuneError, RecipeError, RunError
from finetune.model import base
from finetune.package import export
from finetune.recipe.load import load
from finetune.recipe.schema import Base, Rope
from finetune.store import cache
from finetune.store.run import journal
from finetune.store.run.directory import RunDirectory
from finetune.training.opened import open_model
from finetune.training.resolve import resolve, resolve_own
from tests.conftest import WORDS
from tests.stories.same_run import assert_same_run
from tests.stories.workers import Killed, Workers, killed

LORA = {"name": "lora", "rank": 4, "alpha": 8}
TRAIN = {"steps": 4, "batch_size": 4, "precision": "fp32", "micro_batch_tokens": 512}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 1e4,
}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}


@pytest.fixture(scope="module")
def long_data(tmp_path_factory):
    """Rows of 100 to 400 tokens, where the tiny base has 128 positions."""
    path = tmp_path_factory.mktemp("long") / "rows.jsonl"
    texts = (" ".join(WORDS[(row + word) % len(WORDS)] for word in range(20 + 14 * row)) for row in range(12))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def long_recipe(recipe_file, tiny_base, long_data):
    """A function that writes a recipe for rows of 384 tokens with a scaling."""

    def write(rope=YARN, adapter=None, name="tiny", **sections):
        sections = {
            "base": {"checkpoint": str(tiny_base)} | ({"rope": rope} if rope else {}),
            "task": {"name": "text", "max_length": 384},
            "data": {"train": [{"path": str(long_data)}], "holdout": 2},
            "train": TRAIN,
            "checkpoint": {"every": "2 steps"},
        } | sections
        return recipe_file(name, adapter=adapter, **sections)

    return write


@pytest.mark.parametrize(
    "rope", [YARN, LONGROPE, {"rope_type": "dynamic", "factor": 4.0}], ids=lambda rope: rope["rope_type"]
)
def test_losses_are_those_of_plain_transformers_with_that_config(rope, long_recipe, train, tmp_path):
    run = train(long_recipe(rope), tmp_path / "run", "train.steps=1", "optimizer.learning_rate=1e-9")
    config = AutoConfig.from_pretrained(run / "checkpoints/step-00000001")
    assert config.rope_parameters["rope_type"] == rope["rope_type"]
    assert config.max_position_embeddings == (128 if rope["rope_type"] == "dynamic" else 512)
    resolved = resolve_own(RunDirectory(run).plan()[0], run)
    total, tokens = 0.0, 0
    for example in map(resolved.holdout.__getitem__, range(len(resolved.holdout))):
        fresh = AutoModelForCausalLM.from_pretrained(run / "checkpoints/step-00000001")  # `dynamic` remembers rows
        row = torch.tensor(example.tokens[None].astype("int64"))
        with torch.no_grad():
            total += fresh(row, labels=row).loss.item() * (row.shape[1] - 1)
        tokens += row.shape[1] - 1
    assert max(resolved.holdout.lengths) > 128
    assert journal.evaluations(journal.read(run))[1]["loss"] == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_a_run_with_scaled_positions_resumes_exactly(adapter, long_recipe, train, tmp_path):
    recipe = long_recipe({"rope_type": "dynamic", "factor": 4.0}, adapter)
    whole = train(recipe, tmp_path / "run")
    with killed(after=3), pytest.raises(Killed):
        train(recipe, tmp_path / "interrupted")
    assert_same_run(whole, train(recipe, tmp_path / "interrupted"))
    (found,) = evaluate([f"{whole}@4"], None, (), is_again=True)
    assert found["metrics"]["loss"] == journal.evaluations(journal.read(whole))[4]["loss"]


@pytest.mark.slow
def test_an_adapter_is_on_the_scaled_base_wherever_it_is_opened(long_recipe, train, tmp_path):
    run = train(long_recipe(adapter=LORA), tmp_path / "run")
    assert open_model(f"{run}@last").model.config.rope_parameters["factor"] == 4.0
    named = Base(checkpoint=f"{run}@last")
    merged = AutoConfig.from_pretrained(base.directory(named, base.pin(named)))
    assert merged.rope_parameters["rope_type"] == "yarn" and merged.max_position_embeddings == 512
    export.package(f"{run}@last", tmp_path / "package")
    packaged = AutoConfig.from_pretrained(tmp_path / "package")
    assert packaged.rope_parameters == merged.rope_parameters and packaged.max_position_embeddings == 512


@pytest.mark.slow
def test_a_checkpoint_that_is_scaled_as_a_base_is_pinned_in_its_run(long_recipe, train, tmp_path):
    first = train(long_recipe(None, task={"name": "text", "max_length": 128}), tmp_path / "first", "train.steps=2")
    rope = {"rope_type": "linear", "factor": 2.0}
    train(
        long_recipe(None, base={"checkpoint": f"{first}@2", "rope": rope}),
        tmp_path / "second",
        "train.steps=1",
        "task.max_length=256",
    )
    assert [path.name for path in (first / "pins").iterdir()]


def test_the_files_of_the_base_stay_as_they_are(long_recipe, tiny_base):
    before = {path.name: (path.read_bytes(), path.stat().st_mode) for path in tiny_base.iterdir()}
    directory = resolve(load(long_recipe())).base_directory
    assert base.unscaled(directory) == tiny_base and base.unscaled(tiny_base) == tiny_base
    assert {path.name: (path.read_bytes(), path.stat().st_mode) for path in tiny_base.iterdir()} == before
    assert sorted(path.name for path in directory.iterdir() if path.is_symlink()) == sorted(
        before.keys() - {"config.json"}
    )


def test_a_damaged_scaled_directory_is_made_again(long_recipe):
    loaded = load(long_recipe())
    directory = resolve(loaded).base_directory
    expected = (directory / "config.json").read_text()
    (directory / "config.json").write_text("{")
    assert resolve(loaded).base_directory == directory
    assert (directory / "config.json").read_text() == expected


def test_a_recipe_without_the_key_keeps_its_plan_id_and_no_copy_of_its_base(recipe_file, tiny_base):
    resolved = resolve(load(recipe_file()))
    assert resolved.base_directory == tiny_base
    dumped = resolved.plan.model_dump(mode="json", exclude_defaults=True)
    assert "rope" not in dumped["recipe"]["base"]


def test_rows_may_be_as_long_as_the_scaling_gives_and_no_longer(long_recipe):
    task = {"name": "text", "max_length": 512}
    assert resolve(load(long_recipe(task=task))).plan.counts.longest > 128
    with pytest.raises(
        RecipeError, match=r"513 is more than the base's 512 positions\nhint: .*set base.rope.factor to 5"
    ):
        resolve(load(long_recipe(task={"name": "text", "max_length": 513}, train=TRAIN | {"micro_batch_tokens": 1024})))


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear", "factor": 1.0}, "base.rope.factor: must be greater than 1"),
        ({"rope_type": "linear", "factor": 1e30}, "base.rope.factor: must be"),
        ({"rope_type": "linear", "factor": float("nan")}, "base.rope.factor: "),
        ({"rope_type": "linear"}, "base.rope.factor: "),
        ({"rope_type": "ntk", "factor": 2.0}, "base.rope.rope_type: "),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32.0}, "`beta_fast` has no meaning for `linear`"),
        ({"rope_type": "longrope", "factor": 2.0}, "`longrope` needs `short_factor`"),
        (LONGROPE | {"long_factor": [1.0, -1.0, 1.0, 1.0]}, "need numbers over 0"),
        (LONGROPE | {"long_factor": [float("inf")] * 4}, "base.rope.long_factor"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0}, "must be above `low_freq_factor`"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 64.0}, "`beta_fast` must be above `beta_slow`"),
    ],
)
def test_nonsense_is_refused_by_its_key(rope, message, long_recipe):
    with pytest.raises(RecipeError) as caught:
        load(long_recipe(rope))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (LONGROPE | {"long_factor": [1.0] * 3}, "has 3 numbers, and the base rotates 4 pairs of dimensions"),
        (LONGROPE | {"short_factor": [1.0]}, "has 1 numbers, and the base rotates 4 pairs of dimensions"),
        (YARN | {"original_max_position_embeddings": 16}, "gives 64 positions, and the base has 128 already"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(rope, message, long_recipe):
    with pytest.raises(FinetuneError) as caught:
        resolve(load(long_recipe(rope)))
    assert message in str(caught.value)


def test_a_base_without_rotary_positions_is_refused(long_recipe, tiny_base, tmp_path):
    config = AutoConfig.for_model("gpt2", vocab_size=300, n_embd=32, n_head=4, n_layer=2, n_positions=128)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copy(tiny_base / name, tmp_path / "gpt2" / name)
    with pytest.raises(BaseError, match="has no rotary positions to scale\nhint: remove base.rope"):
        resolve(load(long_recipe(base={"checkpoint": str(tmp_path / "gpt2"), "rope": YARN})))


def test_an_adapter_cannot_be_packaged_without_its_scaling(long_recipe):
    with pytest.raises(RecipeError, match="package.form: an `adapter` cannot carry `base.rope`; use `merged`"):
        load(long_recipe(adapter=LORA, package={"form": "adapter"}))


def test_a_scaling_is_not_changed_by_resume_or_branch(long_recipe, train, tmp_path):
    run = train(long_recipe(adapter=LORA), tmp_path / "run", "train.steps=2")
    with pytest.raises(RunError, match="base.rope.factor"):
        train(long_recipe(YARN | {"factor": 8.0}, LORA), run, "train.steps=3")
    with pytest.raises(RunError, match="base.rope"):
        train(long_recipe(None, LORA, task={"name": "text", "max_length": 128}), run)
    with pytest.raises(RunError, match=r"base.rope.factor: 4.0 -> 8.0"):
        branch(f"{run}@2", tmp_path / "branch", Choices(overrides=("base.rope.factor=8.0", "train.steps=4")))


@pytest.mark.slow
def test_two_processes_train_as_one_and_make_one_directory(long_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    recipe, workers = long_recipe({"rope_type": "dynamic", "factor": 4.0}), Workers(2, tmp_path)
    assert workers.train(recipe, tmp_path / "two") == "finished"
    assert workers.train(recipe, tmp_path / "interrupted", killed_after=3) == "killed"
    assert workers.train(recipe, tmp_path / "interrupted") == "finished"
    assert_same_run(tmp_path / "two", tmp_path / "interrupted")
    assert len(list((cache.root() / "scaled").iterdir())) == 1
    assert yaml.safe_load((tmp_path / "two/recipe.yaml").read_text())["base"]["rope"]["rope_type"] == "dynamic"


def test_a_plan_says_how_positions_are_scaled(long_recipe):
    notes = resolve(load(long_recipe({"rope_type": "dynamic", "factor": 4.0}))).notes
    assert "its rotary positions are scaled by dynamic: 512 in place of 128" in notes
    assert "its rotary frequencies depend on the length: each row has those of its own, as it would alone" in notes
    assert not [note for note in resolve(load(long_recipe())).notes if "depend on the length" in note]


def test_a_base_whose_code_ignores_the_scaling_is_refused(long_recipe, monkeypatch):
    from finetune.training import scaling

    monkeypatch.setattr(scaling, "_logits", lambda directory: torch.zeros(1))
    with pytest.raises(BaseError, match="computes the same with and without base.rope"):
        resolve(load(long_recipe(YARN | {"factor": 5.0})))


@pytest.mark.parametrize("kind", ["mixtral", "falcon_h1"])
def test_configs_with_nothing_or_infinity_where_a_number_is_wanted_are_scaled(kind, tmp_path):
    AutoConfig.for_model(kind, architectures=["ForCausalLM"]).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(base.rope.scaled(tmp_path, Rope(rope_type="yarn", factor=2.0)))
    assert config.rope_parameters["rope_type"] == "yarn" and getattr(config, "head_dim", 32)


def test_an_older_spelling_of_rotary_settings_stays(tiny_base, tmp_path):
    raw = json.loads((tiny_base / "config.json").read_text())
    theta = raw.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_theta": theta, "rope_scaling": None}))
    scaled = json.loads((base.rope.scaled(tmp_path, Rope(**YARN)) / "config.json").read_text())
    wanted = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert scaled["rope_scaling"] == wanted and scaled["rope_theta"] == theta and "rope_parameters" not in scaled


def test_only_layers_that_see_everything_are_scaled(tmp_path):
    config = AutoConfig.for_model("gemma3_text", architectures=["Gemma3ForCausalLM"], max_position_embeddings=4096)
    config.save_pretrained(tmp_path)
    scaled = AutoConfig.from_pretrained(base.rope.scaled(tmp_path, Rope(**YARN)))
    assert scaled.rope_parameters["full_attention"]["factor"] == 4.0
    assert scaled.rope_parameters["sliding_attention"] == config.rope_parameters["sliding_attention"]
    assert scaled.max_position_embeddings == 16384


def test_a_base_that_is_scaled_already_is_scaled_from_its_pretraining(tmp_path, tiny_base):
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    for own, message in ((linear, "does not say the positions of its pretraining"), (LLAMA3, None)):
        raw = json.loads((tiny_base / "config.json").read_text()) | {"rope_parameters": own}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        if message:
            with pytest.raises(BaseError, match=message):
                base.rope.scaled(tmp_path, Rope(**YARN))
        else:
            scaled = AutoConfig.from_pretrained(base.rope.scaled(tmp_path, Rope(**YARN | {"factor": 8.0})))
            assert scaled.max_position_embeddings == 256  # eight times 32, where it had 128
            assert "low_freq_factor" not in scaled.rope_parameters
