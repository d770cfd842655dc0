"""The floors hold: a file imports only from lower floors, and what floor 0 and 1 may not import they do not."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Longest prefix wins. Files of floor 0 may import each other; on floor 1 a package's __init__ may import its members.
FLOORS = {
    "finetune.__init__": 0,
    "finetune.errors": 0,
    "finetune.recipe.resume_rules": 0,
    "finetune.plan.encodings": 0,
    "finetune.recipe": 0,
    "finetune.plan.plan": 0,
    "finetune.plan.pinned": 0,
    "finetune.plan.schedules": 0,
    "finetune.plan.row_order": 0,
    "finetune.data.example": 0,
    "finetune.heldout": 0,
    "finetune.store.cache": 0,
    "finetune.store.downloads": 0,
    "finetune.store.hub": 0,
    "finetune.store.places": 0,
    "finetune.model.base.templates": 0,
    "finetune.training.guard": 0,
    "finetune.store.run.journal": 0,
    "finetune.store.run.scan": 0,
    "finetune.plan.cadence": 0,
    "finetune.store.checkpoints.best": 0,
    "finetune.store.rank": 0,
    "finetune.store.run.directory": 0,
    "finetune.training.pins": 2,
    "finetune.training.blame": 4,
    "finetune.hosts.stderr": 0,
    "finetune.hosts.world": 0,
    "finetune.hosts.signals": 0,
    "finetune.store.run.row_losses": 0,
    "finetune.store.run.parts": 0,
    "finetune.checkpoints": 0,
    "finetune.plan.forecast": 0,
    "finetune.plan.memory": 0,
    "finetune.plan.pace": 0,
    "finetune.store.run.inspect": 0,
    "finetune.hosts.health": 0,
    "finetune.store.checkpoints.pruning": 0,
    "finetune.model.base.remote_code": 0,
    "finetune.store.checkpoints.trainer_state": 0,
    "finetune.training.so_far": 1,
    "finetune.hosts.doctor": 0,
    "finetune.data": 1,
    "finetune.data.sources.arrow": 0,
    "finetune.data.completeness": 0,
    "finetune.data.conversation": 0,
    "finetune.data.sources.files": 0,
    "finetune.data.plain_text": 0,
    "finetune.data.preflight": 0,
    "finetune.data.refusals": 0,
    "finetune.data.sources.open": 0,
    "finetune.data.unused": 2,
    "finetune.data.sources.hub": 0,
    "finetune.tasks": 1,
    "finetune.tasks.rendering": 0,
    "finetune.training.collectives": 1,
    "finetune.model": 1,
    "finetune.model.base.damaged": 0,
    "finetune.model.base.files": 0,
    "finetune.model.base.quantized": 0,
    "finetune.model.base.quiet": 0,
    "finetune.training.progress": 1,
    "finetune.training.trial": 2,
    "finetune.training.resolve": 3,
    "finetune.training.state": 2,
    "finetune.training.saving.snapshot": 3,
    "finetune.training.opened": 4,
    "finetune.training.saving.buffers": 1,
    "finetune.training.saving.rank_reports": 1,
    "finetune.training.loop": 3,
    "finetune.training.readiness": 4,
    "finetune.training.resume": 4,
    "finetune.training.incident": 4,
    "finetune.training.saving.saver": 4,
    "finetune.training.recorder": 5,
    "finetune.training.run": 6,
    "finetune.compare": 7,
    "finetune.package": 7,
    "finetune.debug": 7,
    "finetune.hosts.launch": 7,
    "finetune.cli": 8,
    "finetune.__main__": 9,
}
FILES = sorted((ROOT / "finetune").rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def floor_of(module: str) -> int:
    known = [prefix for prefix in FLOORS if f"{module}.".startswith(f"{prefix}.") or module == "finetune"]
    return FLOORS[max(known, key=len)] if module != "finetune" else 0


def imports(path: Path, only_top: bool = False) -> list[str]:
    """Modules that a file imports; names imported from a package count as its members where they are files."""
    tree = ast.parse(path.read_text())
    found = []
    for node in tree.body if only_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            members = [f"{node.module}.{name.name}" for name in node.names]
            found += [member if is_file(member) else node.module for member in members]
    return found


def is_file(module: str) -> bool:
    return (ROOT / f"{module.replace('.', '/')}.py").exists() or (
        ROOT / module.replace(".", "/") / "__init__.py"
    ).exists()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_from_lower_floors(path: Path) -> None:
    module = module_of(path)
    floor, is_init = floor_of(module), path.name == "__init__.py"
    for imported in imports(path):
        if not imported.startswith("finetune"):
            continue
        below = floor_of(imported)
        is_member = is_init and imported.startswith(module.removesuffix(".__init__"))
        same_tool = floor == 7 and imported.split(".")[1:2] == module.split(".")[1:2]
        assert below < floor or (below == floor == 0) or is_member or same_tool, (
            f"{module} (floor {floor}) imports {imported} ({below})"
        )


@pytest.mark.parametrize("path", [path for path in FILES if floor_of(module_of(path)) == 0], ids=module_of)
def test_floor_0_imports_neither_torch_nor_the_network(path: Path) -> None:
    heavy = {"torch", "transformers", "accelerate", "peft", "datasets", "huggingface_hub", "safetensors"}
    assert not heavy & {name.partition(".")[0] for name in imports(path, only_top=True)}


def test_a_checkpoint_can_be_packaged_by_someone_who_cannot_train() -> None:
    for path in (ROOT / "finetune/package").glob("*.py"):
        assert not {"finetune.training.loop", "finetune.training.run", "finetune.training.recorder"} & set(
            imports(path)
        )


def test_every_file_has_a_docstring_that_names_its_floor() -> None:
    for path in FILES:
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        module = module_of(path)
        if module == "finetune.__init__" or path.name in ("probe.py",):
            continue
        assert docstring.startswith(f"Floor {floor_of(module)}."), (
            f"{module}: {docstring[:40]!r}, floor {floor_of(module)}"
        )


def test_nothing_is_pickled_evaluated_or_run_through_a_shell() -> None:
    banned = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    for path in FILES:
        assert not banned & {name.partition(".")[0] for name in imports(path)}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "torch.save", "os.system"), (
                    f"{path}:{node.lineno}: {called}"
                )
                for keyword in node.keywords:
                    assert not (
                        keyword.arg in ("shell", "trust_remote_code") and ast.unparse(keyword.value) != "False"
                    ), path


def test_there_is_one_backward_and_one_optimizer_step() -> None:
    text = "\n".join(path.read_text() for path in FILES)
    assert text.count(".backward(") == 1
    assert text.count("optimizer.step()") == 1
