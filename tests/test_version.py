"""One function answers which version something has, wherever the code lies."""

import ast
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import finetune

ROOT = Path(__file__).parents[1]


def test_a_checkout_that_is_installed_nowhere_has_its_version(monkeypatch):
    def installed(package):
        if package == "finetune":
            raise metadata.PackageNotFoundError(package)
        return "1.2"

    monkeypatch.setattr(metadata, "version", installed)
    version = finetune.version.__wrapped__  # without its cache
    assert version("finetune") == finetune.__version__ and version("torch") == "1.2"


def test_the_version_is_that_of_the_project():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == finetune.__version__


@pytest.mark.slow
def test_nothing_else_asks_for_a_version():
    for path in (ROOT / "finetune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "importlib.metadata":
                assert "version" not in {name.name for name in node.names}, path
