"""What commands import: nothing heavy for help and for a recipe error, and no more than they use for the rest."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli import cli
from finetune.cli.importing import importing
from tests.test_architecture import MODULES, imports

HEAVY = {
    "torch",
    "transformers",
    "pyarrow",
    "numpy",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "accelerate",
    "peft",
}
IN_TURN = """
import contextlib, io, json, sys
from finetune.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["finetune", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        with contextlib.suppress(SystemExit):
            main()
    print(json.dumps([arguments, said.getvalue(), sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.mark.slow
def test_help_and_a_recipe_error_import_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("base: {checkpoint: a/b}\nlearning_rte: 1\n")
    commands = [["--help"], *([name, "--help"] for name in cli.commands), ["schema"]]
    commands += [[name, "broken.yaml"] for name in ("plan", "fetch", "train", "launch", "rehearse")]
    program = [sys.executable, "-c", IN_TURN, json.dumps(commands)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [arguments for arguments, *_ in answers] == commands, done.stderr
    for arguments, said, imported in answers:
        assert not HEAVY & set(imported), arguments
        assert ("learning_rte" in said) == ("broken.yaml" in arguments), arguments


def imported_by(module: str) -> set[str]:
    """All that is imported with a module of ours, here and in other packages; the packages that a module lies in come before it."""
    found, left = set(), {module}
    while left:
        found |= left
        named = {each for one in left & MODULES.keys() for each in imports(MODULES[one], only_at_start=True)}
        around = {one.rpartition(".")[0] for one in left} - {""}
        left = (named | around) - found
    return found


@pytest.mark.parametrize(
    ("module", "unused"),
    [
        ("finetune.compare.generate", {"finetune.training.run", "finetune.training.state", "accelerate", "pyarrow"}),
        ("finetune.compare.evaluate", {"torch", "transformers", "pyarrow"}),
        ("finetune.compare.watch", {"torch", "transformers", "pyarrow"}),
        ("finetune.compare.measure", {"finetune.package.export", "pyarrow", "matplotlib"}),
        ("finetune.package.export", {"finetune.training.run", "finetune.training.state", "accelerate", "pyarrow"}),
        ("finetune.package.verify.verify", {"finetune.training.resolve", "finetune.package.export", "pyarrow"}),
        ("finetune.training.run", {"finetune.package.export", "pyarrow"}),
    ],
)
def test_a_command_imports_what_it_uses(module: str, unused: set[str]) -> None:
    imported = imported_by(module)
    never = {"datasets", "gguf", "matplotlib", "peft", "bitsandbytes", "rich"}
    assert not {each.partition(".")[0] for each in imported} & never
    assert not imported & unused


def test_the_garbage_collector_is_out_only_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with importing():
        assert not gc.isenabled()
    try:
        assert gc.isenabled() and gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_where_torch_is_imported_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    kept = gc.get_freeze_count()
    with importing():
        assert gc.isenabled()
    assert gc.get_freeze_count() == kept
