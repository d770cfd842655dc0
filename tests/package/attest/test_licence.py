"""A licence goes on to what is made from a base, or the conflict is refused with its reason; what could not be packaged is told before."""

import json
import os
import shutil
from pathlib import Path

import pytest

from finetune.errors import PackageError
from finetune.package.attest import licence
from finetune.recipe.schema import Package
from tests.hub import Hub
from tests.hub.client import environment, in_turn
from tests.hub.writes import User

TOKEN = "hf_" + "w" * 34
CASES = {  # (base, asked): what the package is under, or why not
    ("apache-2.0", None): "apache-2.0",
    ("apache-2.0", "mit"): "mit",
    ("mit", "cc-by-nc-4.0"): "cc-by-nc-4.0",
    ("bsd-3-clause", "gpl-3.0"): "gpl-3.0",
    (None, "apache-2.0"): "apache-2.0",
    (None, None): None,
    ("cc-by-nc-4.0", None): "cc-by-nc-4.0",
    ("cc-by-nc-4.0", "mit"): "cannot be mit: the base is under cc-by-nc-4.0, which forbids commercial use, also of works made from it",
    ("gpl-3.0", "apache-2.0"): "cannot be apache-2.0: the base is under gpl-3.0, which requires works made from it to stay under it",
    ("agpl-3.0", "agpl-3.0"): "agpl-3.0",
    ("cc-by-sa-4.0", "cc-by-4.0"): "cannot be cc-by-4.0: the base is under cc-by-sa-4.0, which requires works made from it to stay under it",
    ("llama3.1", "apache-2.0"): "cannot be apache-2.0: the base is under llama3.1, which has its own terms, and they also apply to works made from it",
    ("gemma", "gemma"): "gemma",
    ("cc-by-nd-4.0", None): "the base is under cc-by-nd-4.0, which does not allow changed versions to be passed on",
    ("mit", "MIT License"): "has the licence 'MIT License', which the Hub does not know; use `other` with license_name and license_link",
    ("mit", "other"): "has the licence `other` without a license_name",
}  # fmt: skip


@pytest.mark.parametrize(("base", "asked"), CASES)
def test_a_base_lets_a_package_be_under_some_licences(base, asked) -> None:
    expected = CASES[base, asked]
    try:
        found = licence.of_package(Package(license=asked), {"license": base} if base else None)
    except PackageError as error:
        assert (error.message, error.where) == (expected, "package.license") and error.hint
    else:
        assert (found or {}).get("license") == expected


def test_other_is_as_good_as_its_name_and_gates_go_on() -> None:
    base = {"license": "other", "license_name": "mine", "extra_gated_prompt": "Who are you?"}
    assert licence.of_package(Package(), base) == base
    same = Package(license="other", license_name="mine", license_link="https://example.org/mine")
    assert licence.of_package(same, base)["extra_gated_prompt"] == "Who are you?"
    with pytest.raises(PackageError, match="cannot be other"):
        licence.of_package(Package(license="other", license_name="yours"), base)


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    directory = tmp_path / "base"
    shutil.copytree(tiny_base, directory)
    return directory


def edited(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.slow
def test_what_could_not_be_packaged_is_refused_before_the_training_where_it_is_asked_for(base, recipe_file) -> None:
    (base / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    edited(base / "tokenizer_config.json", name_or_path="/home/somebody/models/tiny")
    asked = recipe_file("asked", base={"checkpoint": str(base)}, package={"license": "mit"})
    silent = recipe_file("silent", base={"checkpoint": str(base)}, train={"steps": 1, "batch_size": 6})
    run = base.parent / "run"
    commands = (("train", asked, "--run", run), ("plan", asked), ("train", silent, "--run", run, "--quiet"))
    refused, planned, trained = in_turn(dict(os.environ), *commands)
    assert refused[0] == planned[0] == 1 and (refused[2] == planned[2] or refused[2] in planned[2])
    assert "package: package.license: cannot be mit: the base is under cc-by-nc-4.0" in refused[2]
    assert "private: tokenizer_config.json: names /home/somebody/models/tiny" in refused[2]
    assert "hint: fix it now" in refused[2]
    assert trained[0] == 0 and "this run could not be packaged as it is: private: tokenizer_config.json" in trained[2]
    assert (run / "checkpoints/step-00000001/manifest.json").exists()


@pytest.mark.slow
def test_generation_that_would_not_end_where_training_ends_a_turn_is_mended(base, recipe_file, tiny_tokenizer) -> None:
    edited(base / "generation_config.json", eos_token_id=0)
    recipe = recipe_file(base={"checkpoint": str(base)}, train={"steps": 1, "batch_size": 6}, package={"dtype": "fp32"})
    run, dist = base.parent / "run", base.parent / "dist"
    trained, packaged, verified = in_turn(
        dict(os.environ),
        ("train", recipe, "--run", run, "--quiet"),
        ("package", run, dist),
        ("verify", dist),
    )
    assert (trained[0], packaged[0], verified[0]) == (0, 0, 0), trained[2] + packaged[2] + verified[1]
    ends = json.loads((dist / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [0, tiny_tokenizer.eos_token_id]


@pytest.mark.slow
def test_a_gated_base_does_not_become_public(tmp_path, tiny_base, recipe_file) -> None:
    with Hub(seconds=200) as hub:
        hub.users[TOKEN] = User("tiny")
        files = {file.name: file.read_bytes() for file in tiny_base.iterdir()}
        hub.add("model", "owner/gated", is_gated=True, readers={TOKEN}).commit(files)
        hub.add("model", "tiny/closed", is_gated=True, readers={TOKEN}).commit({"README.md": b""})
        env = environment(hub, tmp_path, HF_TOKEN=TOKEN)
        sections = {"base": {"checkpoint": "owner/gated"}, "train": {"steps": 1, "batch_size": 6}}
        open_, private, closed = (
            recipe_file(name, **sections, publish={"repo": repo, "private": is_private})
            for name, repo, is_private in (
                ("open", "tiny/new", False),
                ("private", "tiny/new", True),
                ("closed", "tiny/closed", False),
            )
        )
        run = tmp_path / "run"
        refused, trained, public, published, gated = in_turn(
            env,
            ("train", open_, "--run", tmp_path / "other"),
            ("train", private, "--run", run, "--quiet"),
            ("publish", run, "--public"),
            ("publish", run),
            ("train", closed, "--run", tmp_path / "third", "--quiet"),
        )
        message = "tiny/new: would be open to everybody, and its base owner/gated is gated"
        assert refused[0] == 1 and message in refused[2] and not (tmp_path / "other").exists()
        assert trained[0] == 0, trained[2]
        assert public[0] == 1 and message in public[2]
        assert published[0] == 0 and hub.repos["model", "tiny/new"].is_private, published[2]
        assert gated[0] == 0, gated[2]


@pytest.mark.slow
def test_the_licence_of_a_data_set_is_on_the_card(tmp_path, tiny_base, chat_data, recipe_file) -> None:
    with Hub(seconds=200) as hub:
        rows = (chat_data / "train.jsonl").read_bytes()
        card = b"---\nlicense: odc-by\n---\n"
        hub.add("dataset", "owner/rows").commit({"README.md": card, "train.jsonl": rows})
        data = {"train": [{"dataset": "owner/rows"}]}
        recipe = recipe_file(data=data, train={"steps": 1, "batch_size": 6})
        trained, packaged = in_turn(
            environment(hub, tmp_path),
            ("train", recipe, "--run", tmp_path / "run", "--quiet"),
            ("package", tmp_path / "run", tmp_path / "dist"),
        )
        assert trained[0] == packaged[0] == 0, trained[2] + packaged[2]
        assert "licence odc-by, content" in (tmp_path / "dist/README.md").read_text()
