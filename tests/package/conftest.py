"""Packages of small trainings, one of each form: an adapter merged in, a full fine-tune in shards, an adapter alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from finetune.package import export
from finetune.recipe.load import load
from finetune.store.run import journal
from finetune.training.run import train

PLANTED = "planted-host.example"
LORA = {"name": "lora", "rank": 4, "alpha": 8, "dropout": 0.1}


class Packaged(NamedTuple):
    run: Path
    directory: Path
    facts: dict

    def check(self, name: str) -> dict:
        (found,) = [check for check in self.facts["checks"] if check["name"] == name]
        return found


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_sections: dict, chat_data: Path) -> Callable[..., Path]:
    """A function that trains six steps of a small recipe with the given sections, and returns the run."""

    def trained(precision: str, **sections: object) -> Path:
        directory = tmp_path_factory.mktemp("package")
        recipe = {
            **tiny_sections,
            "train": {"steps": 6, "batch_size": 6, "precision": precision},
            "checkpoint": {"every": "4 steps", "keep": {"best": 1}},
            **sections,
        }
        path = directory / "recipe.yaml"
        path.write_text(f"# made on {PLANTED} in {directory}\n{yaml.safe_dump(recipe)}")
        train(load(path), directory / "run", is_quiet=True)
        evaluated = [item for item in journal.read(directory / "run") if item.get("event") == "evaluated"][-1]
        with (directory / "run/journal.jsonl").open("a") as file:
            file.write(json.dumps(evaluated | {"host": PLANTED, "data": str(chat_data)}) + "\n")
        return directory / "run"

    return trained


def packaged(run: Path, step: str = "6") -> Packaged:
    directory = run.parent / "dist" / "package"
    return Packaged(run, directory, export.package(f"{run}@{step}", directory))


@pytest.fixture(scope="session")
def merged(trained) -> Packaged:
    return packaged(trained("fp32", adapter=LORA), "best")


@pytest.fixture(scope="session")
def full(trained, tmp_path_factory, tiny_tokenizer) -> Packaged:
    template = tmp_path_factory.mktemp("template") / "own.jinja"
    template.write_text("{# own #}" + tiny_tokenizer.chat_template)
    task = {"name": "chat", "max_length": 64, "template": str(template)}
    return packaged(trained("bf16", task=task, package={"max_shard_bytes": 30_000}))


@pytest.fixture(scope="session")
def alone(trained, tiny_base) -> Packaged:
    base = {"checkpoint": str(tiny_base), "origin": "owner/tiny"}
    return packaged(trained("fp32", base=base, adapter=LORA, package={"form": "adapter"}))
