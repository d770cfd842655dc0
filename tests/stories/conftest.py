"""A Hub on the loopback with a base and rows, and the environment of one who uses it."""

from pathlib import Path

import pytest

from tests.hub import Hub
from tests.hub.client import environment


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
