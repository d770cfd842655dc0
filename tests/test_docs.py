"""The documentation is true: its commands run, its tables and trees are complete, its links resolve, what is generated is current.

A page is run in a directory of its own that has the repository's recipes, made small: the same settings on the tiny base and a
few rows. `finetune …` runs in this process, to save the seconds that each new one takes to import torch.
"""

import ast
import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from ruamel.yaml import YAML

from finetune.cli import cli, main
from finetune.recipe.schema import Recipe
from tests import forks
from tests.conftest import chat_row

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LAUNCHERS = ("accelerate", "torchrun")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fences(page: Path, *languages: str) -> Iterator[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    return ((language, text) for language, text in FENCE.findall(page.read_text()) if language in languages)


def commands(text: str) -> list[tuple[list[str], str]]:
    """The commands of a `console` block, as words, each with the line that is shown under it."""
    lines = [*text.replace("\\\n", " ").splitlines(), ""]
    return [
        (shlex.split(line[2:], comments=True), below)
        for line, below in zip(lines, lines[1:], strict=False)
        if line.startswith("$ ")
    ]


def all_commands() -> list[list[str]]:
    return [words for page in PAGES for _, text in fences(page, "console") for words, _ in commands(text)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The repository's recipes on the tiny base, rows for them, and nothing trained yet."""
    place = tmp_path_factory.mktemp("workplace")
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        sections = YAML(typ="safe", pure=True).load(recipe)
        sections["base"] = {"checkpoint": str(tiny_base)}
        sections["task"]["max_length"] = 64
        sections["train"]["precision"] = "fp32"
        copy = place / recipe.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(sections))
    rows = [json.dumps(numbered(chat_row(number), number)) + "\n" for number in range(240)]
    (place / "data/stdlib").mkdir(parents=True)
    for name, some in (("train", rows), ("stdlib/train", rows[:200]), ("stdlib/holdout", rows[200:])):
        (place / f"data/{name}.jsonl").write_text("".join(some))
    (place / "data/stdlib/prompt.txt").write_text("the model reads\n")
    return place


def numbered(row: dict, number: int) -> dict:
    """Rows that are all different."""
    question, answer = row["messages"]
    return {"messages": [question | {"content": f"{number} {question['content']}"}, answer]}


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Path:
    """A workplace in which the story of the README was told as far as a finished run `runs/a`."""
    with contextlib.chdir(workplace):
        run(["finetune", "train", "recipes/smollm2-135m/quickstart.yaml", "--run", "runs/a", "--quiet"])
    return workplace


def run(words: list[str]) -> tuple[int, str]:
    """A command of a page in the working directory: exit code and stdout."""
    if words[0] != "finetune":
        result = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=250)
        return result.returncode, result.stdout
    if words[1] == "launch":  # from a fork it forks its ranks
        result = forks.run([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True, timeout=250)
        return result.returncode, result.stdout
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # accelerate keeps precision and devices for the life of a process
    stdout, arguments, handler = io.StringIO(), sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = words
    try:
        with contextlib.redirect_stdout(stdout):
            main()
    except SystemExit as request:
        return request.code or 0, stdout.getvalue()
    finally:
        sys.argv = arguments
        signal.signal(signal.SIGTERM, handler)
    return 0, stdout.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> None:
    place, absent = tmp_path / "workplace", set()
    shutil.copytree(request.getfixturevalue("workplace" if page == README else "trained"), place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", PATH)
    for language, text in fences(page, "console", "python"):
        if language == "python":
            exec(compile(text, page.name, "exec"), {})
            continue
        for words, below in commands(text):
            if words[0] in LAUNCHERS or words[0].startswith("scripts/"):
                continue  # each has a test of its own below
            if shutil.which(words[0]) is None:
                absent.add(words[0])
                continue
            code, stdout = run(words)
            expected = int(match[1]) if (match := re.search(r"# exit code (\d+)", text)) else 0
            assert code == expected, f"{page.name}: {shlex.join(words)}\n{stdout}"
            if "--json" in words:
                assert_shape(json.loads(stdout), yaml.safe_load(below), shlex.join(words))
    if absent:
        pytest.skip(f"all but the commands of {', '.join(absent)} ran: not installed here")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "words", [words for words in all_commands() if words[0] in LAUNCHERS], ids=lambda words: words[0]
)
def test_every_launcher_command_runs(words: list[str], workplace: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(workplace, tmp_path / "workplace")
    monkeypatch.chdir(tmp_path / "workplace")
    monkeypatch.setenv("PATH", PATH)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run(words)[0] == 0
    assert list(Path(words[words.index("--run") + 1]).glob("checkpoints/step-*/manifest.json"))


def test_every_script_that_a_page_names_is_there() -> None:
    scripts = {words[0] for words in all_commands() if words[0].startswith("scripts/")}
    assert {"scripts/quickstart", "scripts/test"} <= scripts
    for script in scripts:
        assert os.access(ROOT / script, os.X_OK), script


def assert_shape(value: object, documented: object, place: str) -> None:
    """The keys that a page shows are the keys that are there; NAME stands for further ones, an item for all items; null for none."""
    if isinstance(documented, dict) and value is not None:
        assert isinstance(value, dict), place
        shown = documented.keys() - {"NAME"}
        assert value.keys() >= shown if "NAME" in documented else value.keys() == shown, f"{place}: {sorted(value)}"
        for name in value:
            assert_shape(value[name], documented.get(name, documented.get("NAME")), f"{place}: {name}")
    elif isinstance(documented, list):
        assert isinstance(value, list), place
        for item in value:
            assert_shape(item, documented[0], place)
    else:
        assert not isinstance(value, dict), f"{place}: {value}"


def texts_of(node: ast.AST) -> list[str]:
    """The texts that an expression can be, `…` standing for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)]
    return (
        [text for choice in (node.body, node.orelse) for text in texts_of(choice)]
        if isinstance(node, ast.IfExp)
        else []
    )


def refusals() -> tuple[set[str], set[str]]:
    """Every text in the code that reads rows, and those that are given to a DataError there."""
    said, refused = set(), set()
    for path in [
        *(ROOT / "finetune/data").rglob("*.py"),
        *(ROOT / "finetune/tasks").glob("*.py"),
        ROOT / "finetune/model/base/tokenizer.py",
        ROOT / "finetune/training/resolve.py",
        ROOT / "finetune/training/encoding.py",
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            said.update(texts_of(node))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "DataError":
                refused.update(texts_of(node.args[0]))
    return said, refused


def every_command(group: click.Group = cli, before: str = "") -> dict[str, click.Command]:
    """Those of groups as well, like `data check`."""
    found = {}
    for name, command in group.commands.items():
        found[f"{before}{name}"] = command
        if isinstance(command, click.Group):
            found |= every_command(command, f"{before}{name} ")
    return found


def test_every_command_and_option_is_documented() -> None:
    sections = re.split(r"^## ", (ROOT / "docs/commands.md").read_text(), flags=re.MULTILINE)
    by_name = {section.partition("\n")[0]: section for section in sections}
    for name, command in every_command().items():
        for option in command.params:
            flags = [flag for flag in option.opts if flag.startswith("-")] or [
                option.make_metavar(click.Context(command))
            ]
            for flag in flags:
                assert flag.strip("[].") in by_name[name], f"{name} {flag}"
        if "is_json" in {option.name for option in command.params}:
            shown = [words for _, text in FENCE.findall(by_name[name]) for words, _ in commands(text)]
            assert any("--json" in words for words in shown), f"{name}: the keys of its JSON are not shown"


def test_every_recipe_key_is_documented() -> None:
    page = (ROOT / "docs/recipe.md").read_text()
    sections = {section.partition("\n")[0]: section for section in page.split("\n## ")}
    assert "train" in sections["data"]
    for schema in Recipe.model_json_schema()["$defs"].values():
        for key, value in schema.get("properties", {}).items():
            description = value.get("description", "Chooses this form of the section.")
            assert any(f"| `{key}` |" in section and description in section for section in sections.values()), key


def test_what_is_generated_is_current() -> None:
    generator = reference()
    assert (ROOT / "docs/recipe.md").read_text() == generator.recipe_page(), "run scripts/docs"
    page = (ROOT / "docs/commands.md").read_text()
    assert page == generator.with_help(page), "run scripts/docs"
    assert {match["command"] for match in generator.HELP.finditer(page)} == {"", *every_command()}


def test_a_key_that_is_added_to_the_schema_makes_the_page_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = reference()
    before = generator.recipe_page()
    field = Recipe.model_fields["guard"].annotation.model_fields["spike"]
    monkeypatch.setattr(field, "description", "Something else.")
    assert generator.recipe_page() != before


def test_the_committed_json_schema_is_current() -> None:
    committed = (ROOT / "recipes/recipe.schema.json").read_text()
    assert committed == run(["finetune", "schema"])[1], "run scripts/docs"


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) < 250


def test_the_file_tree_names_what_is_there_and_nothing_else() -> None:
    block = next(text for _, text in fences(README, "text") if text.startswith("finetune/\n"))
    named, folder = set(), ""
    for line in block.splitlines():
        name, _, remark = line.strip().partition(" ")
        assert remark.strip() or name == "finetune/", f"{name} has no remark"
        folder = folder if line.startswith(" ") else ""
        named.add(f"{folder}{name}".rstrip("/"))
        folder = folder or name
    assert named == in_the_repository()


def in_the_repository() -> set[str]:
    """What git keeps or would keep: top-level names, and what is right below finetune/."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    parts = [Path(file).parts for file in files if (ROOT / file).exists()]
    return {part[0] for part in parts} | {"/".join(part[:2]) for part in parts if part[0] == "finetune"}


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(ROOT / name for name in ("AGENTS.md", "CONTRIBUTING.md", "CHANGELOG.md"))],
    ids=lambda page: page.stem,
)
def test_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file) if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


PROSE = [*PAGES, ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md"]
BANNED = re.compile(
    r"\b(so many|so long|so often|is no number|(is|are) told|made up by|nobody|whoever|anew|beneath|of its own|mend(s|ed|ing)?|"
    r"left out|leav(e|es|ing) out)\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.stem)
def test_prose_is_wrapped_and_has_no_banned_phrase(page: Path) -> None:
    """Tables and code are neither wrapped nor judged: they may quote what the code says."""
    text = FENCE.sub("", page.read_text())
    prose = [line for line in text.splitlines() if not line.startswith(("|", "    "))]
    assert [line for line in prose if len(line) > 100] == []
    assert [line for line in prose if BANNED.search(re.sub(r"`[^`]*`", "", line))] == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_documented_refusals_of_data_are_those_of_the_code() -> None:
    sections = [page.read_text().partition("\n## What is refused\n")[2].partition("\n## ")[0] for page in PAGES]
    lines = [line for section in sections for line in section.splitlines()]
    cells = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    quoted = re.findall(r"(`+)(.+?)(?<!`)\1(?!`)", "\n".join(cells))
    documented = {text.strip() for _, text in quoted}
    said, refused = refusals()
    assert documented <= said
    assert refused <= documented
