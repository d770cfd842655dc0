"""Trains a tiny random model of every type of the installed transformers that generates text, in every way, and holds it against plain
transformers. Of a type that also reads images or sound it is the text side of the class that its bases declare.

    python scripts/families.py [TYPE ...] [--packages] [--write docs/models.md] [--json FILE]

Each type goes through {LoRA, full} x {packed, padded} x {fp32, bf16}: two steps, whose losses of rows must be those of each row alone
in plain transformers. `--packages` packages one training of each method, verifies the package and loads it by its declared class. A
combination that the project refuses counts as such if it does so in one line; a traceback fails. With types, `--write` changes their lines alone.
"""

import argparse
import json
import logging
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto as auto

from finetune.errors import FinetuneError, explained, of_libraries
from finetune.model import adapters, base, tiny
from finetune.model.base.loading_class import causal_names, wide_names
from finetune.recipe.load import LoadedRecipe, load
from finetune.training import loop
from finetune.training.build import build
from finetune.training.evaluation import batches
from finetune.training.resolve import Resolved, resolve
from finetune.training.run import train
from finetune.training.state import TrainState
from finetune.training.strategy.start import start_accelerator

TYPES = tuple(
    sorted(
        {
            *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        }
    )
)
METHODS, PACKINGS, PRECISIONS = ("lora", "full"), ("packed", "padded"), ("fp32", "bf16")
LORA = {"name": "lora", "rank": 4, "alpha": 8}
TEXTS = ("a row", "the model reads a row and writes an answer that ends", "what was asked of it", "it has said so")
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}  # of a row's loss
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
# Where a family's default config cannot be built as it is, leaves a part of the family out, or cannot be made small.
EXTRAS = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {
        "num_hidden_layers": 10,
        "num_kv_shared_layers": 5,
        "activation_sparsity_pattern": [0.95] * 5 + [0.0] * 5,
    },
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64, "num_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "phimoe": {"sliding_window": None},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}
EXTRAS |= {kind: {"vocabulary_map": {"<image>": 300}} for kind in ("chameleon", "emu3")}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
HALF = ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
EXTRAS |= {"glm4v_moe": {"text_config": {"rope_parameters": HALF, "head_dim": 128}}}
# Bases of these types name the shares of a head for time, height and width; their default configs do not.
SHARES = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl"), [16, 24, 24]),
    **dict.fromkeys(("glm4v", "glm46v", "glmga", "glm_ocr"), [8, 12, 12]),
}
EXTRAS |= {
    kind: {"text_config": {"rope_parameters": ROPE | {"mrope_section": shares}, "head_dim": 2 * sum(shares)}}
    for kind, shares in SHARES.items()
}


class Outcome(NamedTuple):
    """What became of one combination of a type."""

    method: str
    packing: str
    precision: str
    state: str
    """`trained`, `packaged`, `refused`, or `wrong`: neither, which is a fault."""
    told: str
    """How rows were arranged, or why it was refused, or what is wrong."""


ALL_WAYS = tuple(product(METHODS, PRECISIONS, PACKINGS))
PACKAGED_WAY = ("bf16", "packed")
FEW_WAYS = (("lora", "bf16", "packed"), ("full", "fp32", "padded"))


def combinations(
    kinds: Sequence[str], work: Path, has_packages: bool = False, ways: Sequence[tuple[str, str, str]] = ALL_WAYS
) -> Iterator[tuple[str, list[Outcome]]]:
    """Each type with its outcomes; `work` is emptied as it goes."""
    tokenizer = small_tokenizer()
    for kind in kinds:
        with tempfile.TemporaryDirectory(dir=work) as place:
            yield kind, tried(kind, Path(place), tokenizer, has_packages, ways)


def tried(
    kind: str, place: Path, tokenizer: PreTrainedTokenizerBase, has_packages: bool, ways: Sequence[tuple[str, str, str]]
) -> list[Outcome]:
    try:
        with explained("transformers cannot make it", kind):
            make_base(kind, place / "base", tokenizer)
    except FinetuneError as error:
        return [Outcome("", "", "", "refused", one_line(error))]
    (place / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    outcomes: list[Outcome] = []
    plain = Plain()
    for number, (method, precision, packing) in enumerate(ways):
        loaded = load(recipe(place, method, packing, precision))
        try:
            resolved = resolve(loaded)
            told, state = resolved.plan.arrangement, "trained"
            before = outcomes[-1] if outcomes else None
            if before and before[:3] == (method, "packed", precision) and before.told == told:  # packing gave way to it
                outcomes.append(outcomes[-1]._replace(packing=packing))
                continue
            compare(resolved, plain)
            if has_packages and (precision, packing) == PACKAGED_WAY:
                packaged(loaded, place, str(number))
                state = "packaged"
        except FinetuneError as error:
            state, told = "refused", one_line(error)
        except of_libraries() as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            state, told = (
                "wrong",
                f"{type(error).__name__}: {one_line(error)} at {Path(last.filename).name}:{last.lineno}",
            )
        outcomes.append(Outcome(method, packing, precision, state, told))
    return outcomes


def one_line(error: Exception) -> str:
    told = " ".join(str(error).partition("\nhint: ")[0].split())
    return re.sub(r"(?<!\S)/\S*/", "", told)  # no path of this machine


def make_base(kind: str, directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A checkpoint of a type: its default config in small, random weights, the tokenizer."""
    own = AutoConfig.for_model(kind, **EXTRAS.get(kind, {}))
    changes = {
        name: 0.0
        for name, value in own.to_dict().items()
        if re.search("drop|jitter", name) and isinstance(value, float)
    }
    if getattr(own, "is_decoder", None) is False:
        changes["is_decoder"] = True
    own = declared(kind, AutoConfig.for_model(kind, **EXTRAS.get(kind, {}), **changes))
    for part in own.sub_configs:
        without_dropout(getattr(own, part, None))
    model = tiny.model_like(own, max_length=64)
    model.generation_config = GenerationConfig()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def without_dropout(part: PretrainedConfig | None) -> None:
    for name, value in vars(part).items() if part else ():
        if re.search("drop|jitter", name) and isinstance(value, float):
            setattr(part, name, 0.0)


def declared(kind: str, config: PretrainedConfig) -> PretrainedConfig:
    """The config as bases of its type have it: it declares the class that reads images or sound, if the type has one."""
    names = [] if config.is_encoder_decoder else [*wide_names(kind)]
    config.architectures = (names or [*causal_names(kind)])[:1]
    base.class_of(config)  # refuses what is no language model
    return config


def small_tokenizer() -> PreTrainedTokenizerBase:
    """Bytes, and an end of text: what fits every tiny vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def recipe(place: Path, method: str, packing: str, precision: str) -> Path:
    """`packed` is what a recipe that says nothing of packing asks for."""
    sections = {
        "base": {"checkpoint": str(place / "base")},
        "task": {"name": "text", "max_length": 64, **({} if packing == "packed" else {"packing": False})},
        "data": {"train": [{"path": str(place / "rows.jsonl")}]},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 2, "batch_size": 4, "precision": precision, "micro_batch_tokens": 128},
        "checkpoint": {"every": "2 steps"},
        **({"adapter": LORA} if method == "lora" else {}),
        "package": {"form": "merged", "dtype": "fp32", "license": "apache-2.0"},
    }
    path = place / f"{method}-{packing}-{precision}.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def compare(resolved: Resolved, plain: "Plain") -> None:
    """Two steps in this process, without a run directory; AssertionError where a row's loss is not that of plain transformers."""
    AcceleratorState._reset_state(True)
    settings = resolved.plan.recipe.train
    accelerator = start_accelerator(settings)
    state = build(resolved.plan, resolved.base_directory, accelerator)
    made = batches(resolved, resolved.train, accelerator)
    for step in (1, 2):
        expected = dict(plain.losses(resolved, state, step))
        report = loop.train_step(state, resolved.plan, made)
        for row, loss in zip(report.rows.tolist(), report.row_losses, strict=True):
            if not abs(loss - expected[row]) <= TOLERANCES[settings.precision] * abs(expected[row]):
                raise AssertionError(f"step {step}: the loss of row {row} is {loss:.6g}, alone {expected[row]:.6g}")


class Plain:
    """The models that plain transformers (and peft) make of a base, one with an adapter and one without."""

    def __init__(self):
        self.models: dict[bool, torch.nn.Module] = {}

    def losses(self, resolved: Resolved, state: TrainState, step: int) -> Iterator[tuple[int, float]]:
        """The loss of each row of a step, alone, with the weights that the state has now."""
        settings = resolved.plan.recipe.adapter
        if (settings is None) not in self.models:
            kind = base.class_named(resolved.plan.text_of)
            model = kind.from_pretrained(resolved.base_directory, dtype=torch.float32)
            self.models[settings is None] = adapters.apply(base.freeze_beside_text(model), settings).eval()
        model = self.models[settings is None]
        model.load_state_dict({name: tensor.float() for name, tensor in state.model.state_dict().items()})
        for number in resolved.plan.examples_of(step).tolist():
            tokens = torch.from_numpy(resolved.train[number].tokens.astype("int64"))[None]
            is_bf16 = resolved.plan.recipe.train.precision == "bf16"
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
            yield int(resolved.train.rows[number]), F.cross_entropy(logits.float(), tokens[0, 1:]).item()


def packaged(loaded: LoadedRecipe, place: Path, name: str) -> None:
    """The same as a run, packaged, verified, and loaded by the class that its config declares, all in this process."""
    import transformers

    from finetune.package import proof
    from finetune.package.export import package
    from finetune.package.verify.verify import folder_findings

    run, made = place / f"run-{name}", place / f"package-{name}"
    AcceleratorState._reset_state(True)
    train(loaded, run, is_quiet=True)
    package(f"{run}@last", made, load=proof.load_here)
    if found := folder_findings(made)[1]:
        raise AssertionError(f"the package is not sound: {found[0]}")
    declared = json.loads((made / "config.json").read_text())["architectures"][0]
    getattr(transformers, declared).from_pretrained(made)


def cell(outcomes: list[Outcome], method: str) -> str:
    mine = [each for each in outcomes if each.method == method]
    if all(each.state in ("trained", "packaged") for each in mine):
        return "yes" if mine else "-"
    return "no" if all(each.state == "refused" for each in mine) else "in part"


def page(found: dict[str, list[Outcome]], version: str, has_packages: bool, earlier: str = "") -> str:
    """docs/models.md; an `earlier` page keeps its rows of other types."""
    rows = {kind: line for line, kind in re.findall(r"^(\| `([^`]+)` .*)$", earlier, re.MULTILINE)}
    rows |= {kind: row(kind, outcomes) for kind, outcomes in found.items()}
    told = PACKAGED if has_packages else UNPACKAGED
    lines = [INTRODUCTION.format(version=version, types=len(rows), packaged=told), HEAD]
    return "\n".join([*lines, *(rows[kind] for kind in sorted(rows))]) + "\n"


def row(kind: str, outcomes: list[Outcome]) -> str:
    """A line of the table."""
    ways = {each.packing: each.told for each in outcomes if each.state in ("trained", "packaged")}
    why = next((each.told for each in outcomes if each.state in ("refused", "wrong")), "")
    note = why.replace("|", "\\|")[:NOTE] + ("…" if len(why) > NOTE else "")
    wide = wide_names(kind)[:1] if ways else ()
    note = note or "".join(f"the text side of `{name}`" for name in wide)
    count = sum(each.state in ("trained", "packaged") for each in outcomes)
    rows = ways.get("packed", ways.get("padded", "-"))
    cells = [f"`{kind}`", rows, cell(outcomes, "lora"), cell(outcomes, "full"), f"{count} of {len(outcomes)}", note]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


NOTE = 160  # characters
PACKAGED = "Then it\npackages one bf16 training by LoRA and one in full in fp32, verifies them, and loads them by the\nclass in the config."
UNPACKAGED = "They were not packaged for this table."
HEAD = "| type | rows | LoRA | full | ways | note |\n|---|---|---|---|---|---|"
INTRODUCTION = """# Models

<!-- scripts/families writes this file -->

Look up your base here by the `model_type` in its config. You see what you can train, and how. We
found out with `scripts/families`. It makes a tiny random model of each of {types} types of
transformers {version}. It trains each by LoRA (`all-linear`) and in full, packed and padded, in fp32
and bf16, for two steps. The losses equal those of each row alone in plain transformers. {packaged}

Many bases also read images or sound: Qwen3.5, Gemma 3 and 4, Mistral 3, Llama 4, Qwen-VL, SmolVLM.
You train their text. We load the class that the config declares. Its decoder, embeddings and head
are trained; `plan` names the other modules and counts their parameters. Those are frozen: no
adapter and no 4-bit weight reaches them. Your package has them as the base's files do, to the byte,
and the files of the processors. Load it by the class in its config, with images as before.

| column | meaning |
|---|---|
| rows | the way your rows come together with `task.packing: auto`: `packed`, `padded`, or `alone` |
| LoRA, full | `yes`: you can train your base this way; `in part`: some combinations work; `no` or `-`: you get a refusal of one line, the note |
| ways | how many of the tried combinations trained: of eight, or with `--few` of two |

A small model shows you how a family works, and no more: we trained nothing here at its real size.
To try your own type, or another version of transformers, run `scripts/families.py TYPE`.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="TYPE")
    parser.add_argument("--packages", action="store_true", help="package what was trained in bf16")
    parser.add_argument("--few", action="store_true", help="two ways a type in place of eight")
    parser.add_argument("--write", type=Path, help="the page; of some types only, it keeps its other rows")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    quiet()
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for kind, outcomes in combinations(
            asked.kinds or TYPES, Path(work), asked.packages, FEW_WAYS if asked.few else ALL_WAYS
        ):
            found[kind] = outcomes
            told = sorted({f"{each.state}: {each.told}" for each in outcomes})
            print(f"{kind:28} {'; '.join(told)}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({kind: [each._asdict() for each in each_] for kind, each_ in found.items()}))
    if asked.write:
        from finetune import version

        earlier = asked.write.read_text() if asked.kinds and asked.write.exists() else ""
        asked.write.write_text(page(found, version("transformers"), asked.packages, earlier))
    wrong = [kind for kind, outcomes in found.items() if any(each.state == "wrong" for each in outcomes)]
    print(f"FAIL: {', '.join(wrong)}" if wrong else f"PASS: {len(found)} types")
    return bool(wrong)


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
