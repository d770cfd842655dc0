"""A Hub on the loopback with a base and rows, the environment of one who uses it, and ranks that train."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub import Hub
from tests.hub.client import environment
from tests.stories.sharing import CHECKPOINT, METHODS, TRAIN
from tests.stories.workers import Workers


@pytest.fixture
def hub():
    with Hub(seconds=280) as hub:
        yield hub


@pytest.fixture
def online(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a user of this Hub, with an empty cache and no token."""
    return environment(hub, tmp_path)


@pytest.fixture
def base(hub: Hub, tiny_base: Path):
    """`tiny/base`, with copies of its weights that nobody needs; its branch `next` has one file more than `main`."""
    repo = hub.add("model", "tiny/base")
    repo.commit_directory(tiny_base)
    repo.commit({"onnx/model.safetensors": b"of another library", "consolidated.safetensors": b"a second copy"})
    repo.commit({"README.md": b"the next version"}, branch="next")
    return repo


@pytest.fixture
def rows(hub: Hub, chat_data: Path):
    """`tiny/rows`: 40 chat rows as JSON Lines, and a card."""
    repo = hub.add("dataset", "tiny/rows")
    repo.commit({"README.md": b"# Rows\n", "train.jsonl": (chat_data / "train.jsonl").read_bytes()})
    return repo


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Workers]]:
    """A function of a world size, and of the hosts that it is on: its workers."""
    logs, started = tmp_path_factory.mktemp("logs"), {}

    def of(world_size: int, hosts: int = 1) -> Workers:
        return started.setdefault((world_size, hosts), Workers(world_size, logs, hosts))

    yield of
    for each in started.values():
        each.close()


@pytest.fixture(scope="session")
def bases(tiny_base, tiny_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """The tiny Llama, the same with a head of its own, and a model with experts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {"tied": tiny_base}
    experts = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4, "head_dim": 8}
    for name, kind, changed in (("untied", "llama", {}), ("experts", "qwen3_moe", experts)):
        config = AutoConfig.from_pretrained(tiny_base).to_dict() | {"tie_word_embeddings": False, **changed}
        made[name] = tmp_path_factory.mktemp("bases") / name
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "model_type": kind})).save_pretrained(
            made[name]
        )
        tiny_tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture
def write_recipe(recipe_file, bases) -> Callable[..., Path]:
    def write(
        strategy: str,
        method: str = "full",
        base: str = "tied",
        packing: bool = True,
        rate: float = 0.01,
        **train: object,
    ) -> Path:
        return recipe_file(
            name=strategy,
            base={"checkpoint": str(bases[base])},
            adapter=METHODS[method],
            optimizer={"learning_rate": rate},
            task={"name": "chat", "max_length": 64, "packing": packing},
            train={**TRAIN, "strategy": strategy, **train},
            checkpoint=CHECKPOINT,
        )

    return write
