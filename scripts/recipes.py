"""What the recipes in recipes/ need: a table of their forecasts, for docs/scaling.md. No weights, no rows of yours, no network.

    python scripts/recipes.py

Each base is a config with the public sizes of its model, and a tokenizer of bytes. Rows fill `task.max_length`.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from finetune.plan import memory, strategy
from finetune.plan.disk import readable
from finetune.plan.memory import Device, Work
from finetune.plan.plan import Plan
from finetune.plan.shape import Shape
from finetune.recipe.load import load
from finetune.training.resolve import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
HARDWARE = re.compile(
    r"^# hardware: (?:(?P<hosts>\d+) hosts of )?(?P<devices>one|\d+) GPUs? of (?P<size>\d+) GB"
    r"(?:.*?, (?P<host>\d+) (?P<unit>[GT])B of host memory)?",
    re.MULTILINE,
)
GIB = 2**30
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}{{ '' }}{% endif %}"  # as Qwen3's has


def llama(
    layers: int, hidden: int, intermediate: int, heads: int, vocabulary: int, **others: object
) -> dict[str, object]:
    """Keys of config.json, by the names that most families share."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        **others,
    }


LONG = {"num_key_value_heads": 8, "max_position_embeddings": 131072}
CONFIGS: dict[str, tuple[str, str, dict[str, object]]] = {
    "smollm2-135m": (
        *("llama", "LlamaForCausalLM"),
        llama(30, 576, 1536, 9, 49152, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True),
    ),
    "smollm3-3b": (
        *("smollm3", "SmolLM3ForCausalLM"),
        llama(
            36, 2048, 11008, 16, 128256, num_key_value_heads=4, max_position_embeddings=65536, tie_word_embeddings=True
        ),
    ),
    "llama-8b": ("llama", "LlamaForCausalLM", llama(32, 4096, 14336, 32, 128256, **LONG)),
    "llama-70b": ("llama", "LlamaForCausalLM", llama(80, 8192, 28672, 64, 128256, **LONG)),
    "qwen3-14b": (
        *("qwen3", "Qwen3ForCausalLM"),
        llama(40, 5120, 17408, 40, 151936, head_dim=128, **LONG | {"max_position_embeddings": 40960}),
    ),
    "qwen3-30b-a3b": (
        *("qwen3_moe", "Qwen3MoeForCausalLM"),
        llama(48, 2048, 6144, 32, 151936, head_dim=128, num_key_value_heads=4, max_position_embeddings=40960)
        | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
    ),
    "gpt-oss-20b": (
        *("gpt_oss", "GptOssForCausalLM"),
        llama(24, 2880, 2880, 64, 201088, head_dim=64, num_local_experts=32, num_experts_per_tok=4, **LONG)
        | {"quantization_config": {"quant_method": "mxfp4"}},
    ),
    "gemma3-12b": (
        *("gemma3", "Gemma3ForConditionalGeneration"),
        {
            "text_config": llama(48, 3840, 15360, 16, 262208, head_dim=256, sliding_window=1024, **LONG),
            "vision_config": llama(27, 1152, 4304, 16, 0, image_size=896, patch_size=14, vision_use_head=False),
        },
    ),
}
"""By folder of recipes/: the kind of the config, the class, and the sizes that the model's own config.json has."""


class Need(NamedTuple):
    """What a recipe needs of one device of the hardware that its header names."""

    name: str
    plan: Plan
    shape: Shape
    device: Device
    strategy: str
    tokens: int
    """Of a micro-batch: the recipe's, or what `auto` takes."""
    parts: dict[str, int]
    """Bytes of the device, by what holds them."""
    host: dict[str, int]
    """Bytes of its host."""

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        print("\n".join(lines(list(needs(Path(place))))))


def lines(found: list[Need]) -> list[str]:
    """The table, in Markdown."""
    heading = [
        "| recipe | hardware | strategy | tokens a micro-batch | a GPU | of that, weights | its host |",
        "|---" * 7 + "|",
    ]
    return [*heading, *map(_line, found)]


def _line(need: Need) -> str:
    path = f"[{need.name}](../recipes/{need.name}.yaml)"
    device, hosts = need.device, need.device.world_size // need.device.processes
    where = f"{device.processes} × {device.bytes / GIB:.0f} GB" + (f", {hosts} hosts" if hosts > 1 else "")
    cells = [path, where, need.strategy if device.world_size > 1 else "", f"{need.tokens:,}"]
    cells += [readable(need.bytes), readable(need.parts["weights"]), readable(sum(need.host.values()))]
    return f"| {' | '.join(cells)} |"


def needs(place: Path) -> Iterator[Need]:
    """Of every recipe that is for GPUs."""
    with working_in(place):
        yield from (need for path in RECIPES if (need := need_of(path, place)))


def need_of(path: Path, place: Path) -> Need | None:
    """None for a recipe whose header names no hardware. `place` is the working directory, where rows and bases are made."""
    device = hardware(path)
    if device is None:
        return None
    plan, shape = planned(path, place)
    named = plan.recipe.train.micro_batch_tokens
    tokens = strategy.micro_batch_tokens(plan, shape, device) if named == "auto" else named
    work = Work(tokens, plan.recipe.train.batch_size * plan.counts.longest)
    return Need(
        str(path.relative_to(ROOT / "recipes").with_suffix("")),
        *(plan, shape, device, strategy.strategy(plan, shape, device), tokens),
        strategy.parts(plan, shape, work, device),
        memory.host_parts(plan, shape, work, device),
    )


def hardware(path: Path) -> Device | None:
    """The device that the header of a recipe names."""
    found = HARDWARE.search(path.read_text())
    if not found:
        return None
    beside = 1 if found["devices"] == "one" else int(found["devices"])
    host = int(found["host"] or 0) * (1024 if found["unit"] == "T" else 1) or 128
    ranks = beside * int(found["hosts"] or 1)
    return Device(int(found["size"]) * GIB, True, ranks, host_bytes=host * GIB, processes=beside)


def planned(path: Path, place: Path) -> tuple[Plan, Shape]:
    """A recipe resolved on its base, as if its rows filled `task.max_length`."""
    write_rows(place / "data")
    resolved = resolve(load(path, [f"base.checkpoint={base_of(path.parent.name, place)}"]))
    longest = resolved.plan.recipe.task.max_length
    full = {"longest": longest, "tokens": longest * 200, "supervised_tokens": longest * 200}
    counts = {name: getattr(resolved.plan, name).model_copy(update=full) for name in ("counts", "holdout_counts")}
    return resolved.plan.model_copy(update=counts), resolved.shape


def base_of(folder: str, place: Path) -> Path:
    """A directory with config and tokenizer, and without weights."""
    directory = place / "bases" / folder
    if not directory.exists():
        kind, architecture, sizes = CONFIGS[folder]
        byte_tokenizer(TEMPLATE + SWITCH * folder.startswith("qwen3")).save_pretrained(directory)
        config = {
            "model_type": kind,
            "architectures": [architecture],
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
        if kind == "gemma3":
            config["tie_word_embeddings"] = True
        (directory / "config.json").write_text(json.dumps(config | sizes))
    return directory


def write_rows(data: Path) -> None:
    """Rows for every recipe: few and short, no two alike, because rows are held out by content."""
    if data.exists():
        return
    (data / "stdlib").mkdir(parents=True)
    chats = "".join(json.dumps({"prompt": f"ask {n}", "completion": f"answer {n}"}) + "\n" for n in range(440))
    for name in ("train", "stdlib/train", "stdlib/holdout"):
        (data / f"{name}.jsonl").write_text(chats)
    (data / "text.jsonl").write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(200)))


def byte_tokenizer(template: str) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", chat_template=template
    )


@contextlib.contextmanager
def working_in(place: Path) -> Iterator[None]:
    with contextlib.chdir(place):
        yield


if __name__ == "__main__":
    main()
