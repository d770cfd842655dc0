"""A recipe on a base is tried in small: rows stay apart, adapters go on, a loss goes back; or the way that works is taken and said."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.errors import BaseError
from finetune.model import base
from finetune.recipe.load import load
from finetune.store.run.directory import RunDirectory
from finetune.training.resolve import resolve
from finetune.training.trial import trial, unpacked

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
PADDED = "gpt_neox_japanese"  # its positions are not those it is given
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "max_position_embeddings": 64,
}
LONGROPE = {"rope_parameters": LONG, "original_max_position_embeddings": 64}


@pytest.fixture
def based(tmp_path, recipe_file, tiny_tokenizer):
    """A function that writes a recipe on a random base of a family; `task` are keys of its task section."""

    def write(kind, settings=None, adapter=None, has_weights=True, **task):
        config = AutoConfig.for_model(kind, **SIZES | (settings or {}))
        directory = tmp_path / kind
        if has_weights:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        else:
            config.architectures = [f"{kind.title()}ForCausalLM"]
            config.save_pretrained(directory)
        tiny_tokenizer.save_pretrained(directory)
        train = {"steps": 2, "batch_size": 4, "precision": "fp32", "micro_batch_tokens": 128}
        return load(
            recipe_file(
                base={"checkpoint": str(directory)},
                task={"name": "chat", "max_length": 64} | task,
                adapter=adapter,
                train=train,
            )
        )

    return write


def tried(loaded):
    return trial(loaded.recipe, base.directory(loaded.recipe.base, base.pin(loaded.recipe.base), with_weights=False))


@pytest.mark.parametrize(
    ("kind", "settings", "task", "arrangement", "reason"),
    [
        ("llama", {}, {}, "packed", None),
        ("mistral", {"sliding_window": 16}, {}, "packed", None),
        ("phi3", LONGROPE, {"max_length": 64}, "packed", None),
        ("phi3", LONGROPE, {"max_length": 128}, "packed", None),
        ("phi3", LONGROPE, {"max_length": 128, "packing": False}, "alone", "padded, this base would mix them"),
        ("llama", DYNAMIC, {"max_length": 128}, "packed", None),
        ("llama", DYNAMIC, {"max_length": 128, "packing": False}, "alone", "padded, this base would mix them"),
        ("llama", DYNAMIC, {"max_length": 64, "packing": False}, "padded", None),
        ("doge", {}, {}, "packed", None),
        ("gptj", {"rotary_dim": 4}, {}, "packed", None),
        ("gpt_oss", {}, {}, "packed", None),
        ("qwen3_next", {}, {}, "packed", None),
        ("llama4_text", {"attention_chunk_size": 32}, {}, "packed", None),
        (PADDED, {}, {}, "padded", "packed, this base would mix them"),
        ("llama", {}, {"packing": False}, "padded", None),
        ("llama", {}, {"packing": "auto"}, "packed", None),
        (PADDED, {}, {"packing": "auto"}, "padded", "packed, this base would mix them"),
        ("gemma2", {"head_dim": 8, "dtype": "bfloat16"}, {}, "packed", None),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_rows_come_together_in_the_first_way_that_is_right(based, kind, settings, task, arrangement, reason):
    loaded = based(kind, settings, has_weights=False, **task)
    found = tried(loaded)
    assert found.arrangement == arrangement
    if arrangement != "packed":
        directory = base.directory(loaded.recipe.base, base.pin(loaded.recipe.base), with_weights=False)
        assert unpacked(directory, loaded.recipe.task.max_length) == arrangement
    told = {"padded": "rows are padded", "alone": "rows are trained one by one"}.get(arrangement)
    assert [note for note in found.notes if note.startswith("rows")] == ([f"{told}: {reason}"] if reason else [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PADDED, "blt"])
def test_packing_that_a_recipe_names_is_refused_where_it_mixes_rows(based, kind):
    with pytest.raises(BaseError) as caught:
        resolve(based(kind, has_weights=False, packing=True))
    assert str(caught.value).startswith("task.packing: ")
    assert str(caught.value).endswith("\nhint: set task.packing: auto")


def test_a_base_whose_tokens_see_those_after_them_is_refused(based):
    with pytest.raises(BaseError) as caught:
        resolve(based("bert", has_weights=False))
    assert str(caught.value) == (
        "BertLMHeadModel: is not causal: its tokens see those after them\n"
        "hint: set is_decoder: true in its config.json if it has that key, or choose another base"
    )


def test_a_base_that_cannot_be_made_small_is_padded_untried(based, monkeypatch):
    from finetune.model import tiny

    monkeypatch.setattr(tiny, "shrunk", lambda *_: 1 / 0)
    found = tried(based("gemma2", has_weights=False, max_length=63))
    assert found.arrangement == "padded"
    assert found.notes == ("rows are padded, untried: cannot be made small (ZeroDivisionError: division by zero)",)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PADDED, "phi3"])
def test_the_way_that_was_found_belongs_to_the_plan_and_is_taken_again(based, kind, train, tmp_path, capsys):
    task = {"packing": False} if kind == "phi3" else {}
    loaded = based(kind, LONGROPE if kind == "phi3" else {}, max_length=128, **task)
    run = train(loaded.path if hasattr(loaded, "path") else tmp_path / "tiny.yaml", tmp_path / "run")
    arrangement = "alone" if kind == "phi3" else "padded"
    record = json.loads((run / "plan.json").read_text())
    assert record["arranged"] == arrangement and RunDirectory(run).plan()[0].arrangement == arrangement
    assert "rows are" in capsys.readouterr().err
    again = resolve(loaded, RunDirectory(run).plan()[0])
    assert again.plan.arrangement == arrangement and again.plan.plan_id == record["plan_id"]
    if kind == PADDED:  # the recipe of the other one refuses it
        with pytest.raises(BaseError, match="train.compile: rows of this base cannot be packed"):
            train(tmp_path / "tiny.yaml", run, "train.compile=true")


def test_a_branch_packs_only_if_that_is_exact_on_its_base(based):
    padded = resolve(based(PADDED, has_weights=False)).plan
    assert resolve(based(PADDED, has_weights=False), like=padded).plan.arrangement == "padded"
    named = based(PADDED, has_weights=False, packing=True)
    with pytest.raises(BaseError, match="task.packing: packed, this base would mix them"):
        resolve(named, like=padded)
    assert resolve(named, padded).plan.arrangement == "padded", "a resume keeps what its run has"


@pytest.mark.slow
def test_a_plan_says_how_rows_come_together_and_why(based, finetune, tmp_path):
    based(PADDED)
    text = finetune("plan", tmp_path / "tiny.yaml", "--run", tmp_path / "run").stdout
    assert "come together padded: those of like length in one batch" in text
    assert "base: rows are padded: packed, this base would mix them" in text
    facts = json.loads(finetune("plan", tmp_path / "tiny.yaml", "--run", tmp_path / "run", "--json").stdout)
    assert facts["arrangement"] == "padded"
    assert "rows are padded: packed, this base would mix them" in facts["base_notes"]


def test_a_plan_says_nothing_of_rows_that_come_together_as_the_recipe_says(based):
    plan = resolve(based("llama", has_weights=False)).plan
    assert plan.arranged is None and b"arranged" not in plan.dump({})


def test_the_share_of_the_base_under_an_adapter_is_told_by_kind(based):
    resolved = resolve(based("gpt_oss", {"head_dim": 8}, adapter={"name": "lora"}, has_weights=False))
    experts, total = resolved.kinds["experts"], sum(one["parameters"] for one in resolved.kinds.values())
    assert experts["under_adapter"] == experts["trained"] == 0 and experts["parameters"] > total / 2
    assert resolved.kinds["attention"]["under_adapter"] > 0
    assert any(note.startswith("the adapter reaches 0% of experts (") for note in resolved.notes)
