"""What the image installs is what is tested: scripts/locked/ agrees with pyproject.toml and scripts/constraints.txt."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def locked(name: str) -> dict[str, Requirement]:
    """The requirements of a file by name, each with a hash."""
    text = (ROOT / "scripts/locked" / name).read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines()[1:]:
        words, *hashes = re.split(r"\s+--hash=", line)
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}\s*", each) for each in hashes), line
        requirement = Requirement(words)
        found[canonicalize_name(requirement.name)] = requirement
    return found


def test_every_dependency_is_locked_to_a_version_that_is_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    everything = locked("torch.txt") | locked("others.txt")
    for line in (*project["dependencies"], *extras["signing"], *extras["bitsandbytes"]):
        wanted = Requirement(line)
        (version,) = everything[canonicalize_name(wanted.name)].specifier
        assert version.operator == "==" and wanted.specifier.contains(version.version), line


def test_what_is_locked_is_what_is_tested() -> None:
    lines = (ROOT / "scripts/constraints.txt").read_text().splitlines()[1:]
    tested = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    for name, requirement in (locked("torch.txt") | locked("others.txt")).items():
        assert requirement.specifier.contains(tested.get(name, str(requirement.specifier).removeprefix("=="))), name


def test_torch_and_what_comes_with_it_alone_are_apart() -> None:
    of_torch, others = locked("torch.txt"), locked("others.txt")
    assert "torch" in of_torch and not of_torch.keys() & others.keys()
    assert all(name == "torch" or name.startswith(("nvidia-", "cuda-", "triton")) for name in of_torch)
    assert not [name for name in others if name.startswith(("nvidia-", "torch"))]
