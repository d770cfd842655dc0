"""The house holds: rooms import from rooms to their left only, nothing goes in a circle, and what must stay light does."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = "errors < recipe < plan < store < hosts, model < data < tasks < training < debug, package < compare < cli"
LIGHT = ("errors", "recipe", "plan", "store", "hosts")
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "huggingface_hub", "safetensors"}
LEVELS = {room: level for level, rooms in enumerate(ORDER.split(" < ")) for room in rooms.split(", ")}
FILES = sorted((ROOT / "finetune").rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def room_of(module: str) -> str:
    """The first name below `finetune`; empty for the package itself and for `__main__`, which are its front door."""
    return module.removeprefix("finetune").removeprefix(".").removeprefix("__main__").partition(".")[0]


def imports(path: Path, only_at_start: bool = False) -> set[str]:
    """Modules that a file imports; a name imported from a package counts as its member where that is a file."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if only_at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            members = [f"{node.module}.{name.name}" for name in node.names]
            found |= {member if member in MODULES else node.module for member in members}
    return found


IMPORTS = {module: {each for each in imports(path) if each in MODULES} for module, path in MODULES.items()}


def test_the_top_level_has_the_rooms_and_nothing_else() -> None:
    found = {
        path.stem for path in (ROOT / "finetune").iterdir() if path.suffix in ("", ".py") and path.name != "__pycache__"
    }
    assert found == {*LEVELS, "__init__", "__main__"}


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module)])
def test_a_room_imports_from_rooms_to_its_left_only(module: str) -> None:
    room = room_of(module)
    for imported in IMPORTS[module]:
        other = room_of(imported)
        assert not other or other == room or LEVELS[other] < LEVELS[room], f"{module} imports {imported}"


def test_nothing_is_imported_in_a_circle() -> None:
    left = {module: others - {module} for module, others in IMPORTS.items()}
    while ready := [module for module, others in left.items() if not others & left.keys()]:
        for module in ready:
            del left[module]
    assert not left


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in LIGHT])
def test_a_light_room_imports_nothing_heavy_when_it_is_imported(module: str) -> None:
    assert not HEAVY & {name.partition(".")[0] for name in imports(MODULES[module], only_at_start=True)}


def test_package_takes_nothing_of_training_but_what_opens_a_checkpoint() -> None:
    taken = {each for module in MODULES if room_of(module) == "package" for each in IMPORTS[module]}
    assert {each for each in taken if room_of(each) == "training"} <= {
        "finetune.training.resolve",
        "finetune.training.opened",
    }


@pytest.mark.slow
def test_every_file_says_what_it_is_for() -> None:
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


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


LONG = "Long because"


def test_a_file_has_at_most_300_lines_and_above_250_says_why() -> None:
    for path in FILES:
        text = path.read_text()
        lines = len(text.splitlines())
        assert lines <= 300, f"{path}: {lines} lines"
        assert lines <= 250 or LONG in ast.get_docstring(ast.parse(text)), f"{path}: {lines} lines, and no `{LONG} …`"


def test_a_function_has_at_most_60_lines() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno}: {node.name}"
