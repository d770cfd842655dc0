"""A checkpoint has the tokenizer that its rows were encoded with, whatever decides its class; so have answers, evaluations and packages."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS as WRONG_ON_THE_HUB,
)
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES as names
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from finetune.compare.evaluate import evaluate
from finetune.errors import BaseError, DataError, PackageError, RunError
from finetune.model import base
from finetune.package import export, small_files
from finetune.package.verify import contents
from finetune.plan import encodings
from finetune.recipe.load import load
from finetune.store.checkpoints import manifest
from finetune.store.run.directory import RunDirectory
from finetune.training.opened import open_model, open_tokenizer
from finetune.training.run import train
from tests.conftest import CHATML, WORDS
from tests.plan.test_encodings import tekken

TEXTS = ["the row ends", "  two  blanks\n東京", "<s>[INST] a <|im_end|></s> b"]


def llama_tokenizer() -> Tokenizer:
    """As Llama 2 and Mistral 7B have it: no pre-tokenizer, blanks by a normalizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    control = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=control, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    single = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=single)
    return tokenizer


def save_base(directory: Path, model_type: str, tokenizer: Tokenizer, **settings: object) -> Path:
    """A tiny random model of a type that has Llama's sizes, with a tokenizer's files and no other."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 400, "head_dim": 8}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, **sizes, **special, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    control = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(json.dumps(control | settings))
    return directory


OWN = "{# own #}" + CHATML


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    """transformers opens its tokenizer as another class where no config says that it is a Mistral."""
    directory = tmp_path_factory.mktemp("mistral") / "base"
    return save_base(directory, "mistral", llama_tokenizer(), tokenizer_class="LlamaTokenizer")


@pytest.fixture(scope="module")
def trained(mistral, tiny_sections) -> Path:
    """A run of two steps on that base, with a chat template of the recipe's."""
    folder = mistral.parent
    (folder / "own.jinja").write_text(OWN)
    recipe = {
        **tiny_sections,
        "base": {"checkpoint": str(mistral)},
        "task": {"name": "chat", "max_length": 64, "template": str(folder / "own.jinja")},
        "adapter": {"name": "lora", "rank": 2, "alpha": 4},
        "train": {"steps": 2, "batch_size": 2, "precision": "fp32", "micro_batch_tokens": 128},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load(folder / "recipe.yaml"), folder / "run", is_quiet=True)
    return folder / "run"


def as_older_code_left_it(run: Path, target: Path) -> Path:
    """A copy of a run with what commit 9392744 wrote: no config beside an adapter, the base's template, and another digest in the plan."""
    shutil.copytree(run, target)
    plan, facts = RunDirectory(target).plan()
    directory = base.directory(plan.recipe.base, plan.base)
    stops = sorted(base.stop_tokens(directory, base.load_tokenizer(directory), ()))
    older = encodings.older_digest(plan.recipe.task, directory, OWN, stops)
    plan = plan.model_copy(update={"encoding": older, "row_rules": 1})
    (target / "plan.json").write_bytes(plan.dump(facts))
    for path in (target / "checkpoints").iterdir():
        record = manifest.read(path).manifest
        for name in ("config.json", "chat_template.jinja"):
            (path / name).unlink()
        files = {name: file for name, file in record.files.items() if (path / name).exists()}
        (path / "manifest.json").chmod(0o644)
        (path / "manifest.json").write_bytes(replace(record, files=files, plan_id=plan.plan_id).to_bytes())
    return target


def assert_alike(directory: Path, tokenizer) -> None:
    """Opened by anyone, the tokenizer in a directory is this one."""
    loaded = AutoTokenizer.from_pretrained(directory)
    assert base.difference(tokenizer, loaded) is None
    assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_a_checkpoint_alone_has_the_tokenizer_of_its_base_and_the_template_of_its_recipe(trained, mistral) -> None:
    path = trained / "checkpoints/step-00000002"
    assert_alike(path, base.load_tokenizer(mistral))
    assert AutoTokenizer.from_pretrained(path).chat_template == OWN


def test_a_checkpoint_without_the_config_that_chooses_its_class_would_have_another(trained, mistral, tmp_path) -> None:
    alone = shutil.copytree(trained / "checkpoints/step-00000002", tmp_path / "alone")
    (alone / "config.json").unlink()
    assert base.difference(base.load_tokenizer(mistral), AutoTokenizer.from_pretrained(alone)) == "ids of a text"


def test_it_is_evaluated_and_answers_with_the_template_it_was_trained_with(trained) -> None:
    results = evaluate([f"{trained}@0", f"{trained}@2"], None, [], is_again=True)
    assert [set(result["metrics"]) >= {"loss"} for result in results] == [True, True]
    for ref in (f"{trained}@0", f"{trained}@2"):
        assert open_tokenizer(open_model(ref)).chat_template == OWN


@pytest.mark.slow
def test_its_package_has_the_same_tokenizer(trained, mistral, tmp_path) -> None:
    export.package(f"{trained}@2", tmp_path / "dist")
    assert_alike(tmp_path / "dist", base.load_tokenizer(mistral))


def test_what_older_code_saved_is_opened_as_it_was_encoded(trained, mistral, tmp_path) -> None:
    older = as_older_code_left_it(trained, tmp_path / "older")
    (result,) = evaluate([f"{older}@2"], None, [], is_again=True)
    (expected,) = evaluate([f"{trained}@2"], None, [], is_again=True)
    assert result["metrics"] == expected["metrics"]
    tokenizer = open_tokenizer(open_model(f"{older}@2"))
    assert base.difference(base.load_tokenizer(mistral), tokenizer) is None and tokenizer.chat_template == OWN


def test_what_older_code_saved_is_not_packaged_with_a_template_that_was_edited_since(trained, tmp_path) -> None:
    older, file = as_older_code_left_it(trained, tmp_path / "older"), trained.parent / "own.jinja"
    try:
        file.write_text(OWN.replace("own", "other"))
        with pytest.raises(PackageError, match="encoding: the tokenizer or the chat template is not the one"):
            export.package(f"{older}@2", tmp_path / "dist")
    finally:
        file.write_text(OWN)
    assert not (tmp_path / "dist").exists()


@pytest.mark.slow
def test_a_base_with_the_file_of_mistral_alone_is_trained_evaluated_and_checked_before(tmp_path, tiny_sections) -> None:
    directory = save_base(tmp_path / "base", "mistral", llama_tokenizer())
    (directory / "tokenizer.json").unlink()
    config = (directory / "config.json").read_bytes()
    tekken(directory)
    (directory / "config.json").write_bytes(config)
    steps = {"steps": 1, "batch_size": 2, "precision": "fp32", "micro_batch_tokens": 512}
    recipe = {**tiny_sections, "base": {"checkpoint": str(directory)}, "task": {"name": "chat", "max_length": 128}}
    recipe |= {"adapter": {"name": "lora", "rank": 2, "alpha": 4}, "train": steps}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load(tmp_path / "recipe.yaml"), tmp_path / "run", is_quiet=True)
    path = tmp_path / "run/checkpoints/step-00000001"
    assert (path / "tekken.json").read_bytes() == (directory / "tekken.json").read_bytes()
    assert_alike(path, base.load_tokenizer(directory))
    (result,) = evaluate([f"{tmp_path}/run@1"], None, [], is_again=True)
    assert result["metrics"]["rows"]
    tokenizer = base.load_tokenizer(directory)
    (tmp_path / "package").mkdir()
    small_files.write(tmp_path / "package", path, tokenizer, None, is_adapter=True)
    assert small_files.change_by_loading(tmp_path / "package", tokenizer) is None
    assert not list(contents.findings(tmp_path / "package"))


def test_an_adapter_alone_brings_the_config_that_its_tokenizer_needs(mistral, tmp_path) -> None:
    tokenizer = base.load_tokenizer(mistral)
    small_files.write(tmp_path, mistral, tokenizer, None, is_adapter=True)
    assert (tmp_path / "config.json").exists()
    assert_alike(tmp_path, tokenizer)
    (tmp_path / "config.json").unlink()
    assert small_files.change_by_loading(tmp_path, tokenizer) == (
        "as it is saved, it is opened as LlamaTokenizer with other ids of a text"
    )


@pytest.mark.slow
def test_what_older_code_saved_is_packaged(trained, mistral, tmp_path) -> None:
    older = as_older_code_left_it(trained, tmp_path / "older")
    export.package(f"{older}@2", tmp_path / "dist")
    assert_alike(tmp_path / "dist", base.load_tokenizer(mistral))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "GPT2Tokenizer"}])
def test_whatever_class_the_type_of_a_model_chooses_travels_with_a_checkpoint(tmp_path, settings) -> None:
    """One type of every kind that transformers knows of among causal models."""
    kinds = {(names.get(each), each in WRONG_ON_THE_HUB): each for each in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    source, alone, opened = tmp_path / "base", tmp_path / "alone", 0
    for directory in (source, alone):
        directory.mkdir()
    llama_tokenizer().save(str(source / "tokenizer.json"))
    control = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps(control | settings))
    for model_type in kinds.values():
        (source / "config.json").write_text(json.dumps({"model_type": model_type}))
        try:
            tokenizer = base.load_tokenizer(source)
        except BaseError:
            continue  # the class does not fit these files
        opened += 1
        for name, content in base.Companions(source, None).contents(with_config=True).items():
            (alone / name).write_bytes(content)
        assert_alike(alone, tokenizer)
    assert opened > 10


def test_every_file_that_a_tokenizer_class_reads_travels() -> None:
    read = set()
    for name in {names[each] for each in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if names.get(each)}:
        with suppress(ImportError):  # a class that needs a library which is not there
            read |= set(tokenizer_class_from_name(name).vocab_files_names.values())
    assert {"tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt"} <= read
    assert [name for name in read if not any(fnmatch(name, pattern) for pattern in encodings.TOKENIZER_FILES)] == []


@pytest.mark.slow
def test_a_template_file_that_is_gone_is_taken_from_a_checkpoint_of_its_run(trained, tmp_path, capsys) -> None:
    """An edited one is refused by `train`: that may be what its user wants to train with."""
    folder, file = trained.parent, trained.parent / "own.jinja"
    run = shutil.copytree(trained, tmp_path / "run")
    file.rename(folder / "away.jinja")
    try:
        train(load(folder / "recipe.yaml", ["train.steps=3"]), run, is_quiet=True)
        told = f"template {file} is now {run}/checkpoints/step-00000002/chat_template.jinja: equal content"
        assert told in capsys.readouterr().err
        assert open_tokenizer(open_model(f"{run}@3")).chat_template == OWN
        with pytest.raises(DataError, match="own.jinja: cannot be read: No such file"):
            train(load(folder / "recipe.yaml", ["task.max_length=63"]), tmp_path / "new", is_quiet=True)
        file.write_text("{# edited #}" + CHATML)
        with pytest.raises(RunError, match="what the run trains on has changed"):
            train(load(folder / "recipe.yaml", ["train.steps=4"]), run, is_quiet=True)
    finally:
        (folder / "away.jinja").replace(file)
