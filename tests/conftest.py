"""Tiny random models and data, made here: no test needs a network or a download. Sockets beyond loopback are blocked."""

import functools
import gc
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from finetune.store import places
from tests import forks
from tests.prices import (  # noqa: F401 - hooks
    pytest_addoption,
    pytest_collection_finish,
    pytest_configure,
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

gc.disable()  # until the tests begin: a fifth of the time of imports goes into looking for garbage that they do not make
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests share two cores with each other; equal results need equal threads

# every training asks two dozen times, and each answer is parsed out of a file
importlib.metadata.version = functools.cache(importlib.metadata.version)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "row",
    "and",
    "writes",
    "an",
    "answer",
    "that",
    "ends",
    "when",
    "it",
    "has",
    "said",
    "what",
    "was",
    "asked",
    "of",
    "it",
]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """What was imported stays: the garbage collector need not walk through these millions of objects again and again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests stay on this machine; {address[0]} is not")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _knows_no_other_run() -> Iterator[None]:
    """Data is looked for near all runs that a process has opened: those of other tests have equal files."""
    with places.anew():
        yield


STARTING = (
    "package.proof",
    "package.publish.queue",
    "model.base.templates",
    "debug.rehearse.trainings",
    "compare.sweep.trainings",
    "debug.predicates",
    "training.companions",
)


@pytest.fixture(autouse=True)
def _forks_of_ours() -> None:
    """Modules of ours that start this Python get forks as well."""
    for name in STARTING:
        if module := sys.modules.get(f"finetune.{name}"):
            module.subprocess = forks.Either


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the test session's own."""
    directory = tmp_path_factory.mktemp("cache")
    os.environ["FINETUNE_CACHE"] = str(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level tokenizer of 300 tokens with ChatML's control tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """A random Llama of two layers with tied embeddings, saved as a checkpoint; the same weights in every session."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny") / "base"
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=tiny_tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def endless_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a million positions: without a temperature it repeats itself, and never stops."""
    directory = shutil.copytree(tiny_base, tmp_path_factory.mktemp("endless") / "base")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**6}))
    return directory


@pytest.fixture(scope="session")
def chat_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 chat rows of different lengths in train.jsonl, 8 in holdout.jsonl."""
    directory = tmp_path_factory.mktemp("data")
    for name, first, count in (("train", 0, 40), ("holdout", 40, 8)):
        rows = [chat_row(number) for number in range(first, first + count)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def chat_row(number: int) -> dict:
    question = " ".join(WORDS[(number + index) % len(WORDS)] for index in range(3 + number % 7))
    answer = " ".join(WORDS[(2 * number + index) % len(WORDS)] for index in range(2 + number % 5))
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="session")
def tiny_sections(tiny_base: Path, chat_data: Path) -> dict:
    """What every small recipe has in common: base, task, data and learning rate."""
    rows = {part: [{"path": str(chat_data / f"{part}.jsonl")}] for part in ("train", "holdout")}
    return {
        "base": {"checkpoint": str(tiny_base)},
        "task": {"name": "chat", "max_length": 64},
        "data": rows,
        "optimizer": {"learning_rate": 0.01},
    }


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_sections: dict):
    """A function that writes a small, valid recipe with the given sections changed, and returns its path."""

    def write(name: str = "tiny", **sections: object) -> Path:
        recipe = {
            **tiny_sections,
            "adapter": {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
            "train": {"steps": 10, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128},
            "checkpoint": {"every": "4 steps"},
        }
        recipe |= sections
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}))
        return path

    return write


def finetune(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """The command line in a process of its own, as a user runs it."""
    command = [sys.executable, "-m", "finetune", *map(str, arguments)]
    return forks.run(command, capture_output=True, text=True, timeout=240, **options)


@pytest.fixture(name="finetune")
def finetune_command():
    return finetune


@pytest.fixture
def train():
    """Trains a recipe file in this process, from any state of the run directory; returns the run."""

    def train(recipe: Path, run: Path, *overrides: str) -> Path:
        from finetune.recipe.load import load
        from finetune.training.run import train as train_run

        train_run(load(recipe, overrides), run, is_quiet=True)
        return run

    return train


@pytest.fixture(scope="session")
def train_once(tmp_path_factory: pytest.TempPathFactory):
    """Trains a recipe once a session, and copies the run to each test that asks for it under the same name.

    `patched` tells apart trainings of one recipe under different patches.
    """
    from finetune.recipe.load import load
    from finetune.training.run import train as train_run

    made: dict[tuple, Path] = {}

    def train_once(recipe: Path, run: Path, *overrides: str, patched: object = None) -> Path:
        key = (recipe.read_text(), run.name, overrides, patched)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("trained") / run.name
            train_run(load(recipe, overrides), made[key], is_quiet=True)
        return copied(made[key], run)

    return train_once


def copied(run: Path, to: Path) -> Path:
    """A copy of a run in which the same files are one again."""
    first: dict[int, str] = {}

    def copy(source: str, target: str) -> None:
        inode = os.stat(source).st_ino
        if inode in first:
            os.link(first[inode], target)
        else:
            first[inode] = shutil.copy2(source, target)

    return shutil.copytree(run, to, copy_function=copy)
