"""How much of a step is padding, and what that costs: our arrangements beside Trainer's, on the same rows, in turns, in one process.

    python scripts/bench/padding.py [--rounds 4] [--kinds llama,qwen3_5_text] [--json FILE]

Rows have log-normal lengths, as conversations do (median 100 tokens, spread 0.8, at most 512). Each contestant runs the same tiny
random model forward and backward over steps of 32 rows, in a bare loop: what is compared is how rows come together, not a trainer.

random           32 rows of a shuffled order, all padded to the longest: Trainer's default
group_by_length  32 rows by Trainer's own `LengthGroupedSampler`: which rows a step has changes
filled           our older padding: as many as fit a micro-batch
padded           our padding
packed           our packing, exact on this kind (`finetune.model.packing`)
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from figures import rotated
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_pt_utils import LengthGroupedSampler

from finetune.data import pack
from finetune.model import tiny
from finetune.model.packing import OURS, Packing
from finetune.training.arrangements import compared

ROWS, STEP, BUDGET = 6400, 32, 8192
SIZES = {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 512}
Slots = list[list[list[int]]]
"""Of each step the micro-batches, each a list of rows."""


def lengths_of_rows() -> list[int]:
    return np.random.default_rng(0).lognormal(np.log(100), 0.8, ROWS).clip(8, 512).astype(int).tolist()


def steps_of(lengths: list[int]) -> dict[str, Slots]:
    shuffled = np.random.default_rng(1).permutation(ROWS).reshape(-1, STEP).tolist()
    torch.manual_seed(0)
    grouped = np.array(list(LengthGroupedSampler(STEP, lengths=lengths))).reshape(-1, STEP).tolist()
    found = {"random": [[rows] for rows in shuffled], "group_by_length": [[rows] for rows in grouped]}
    for name in ("filled", "padded", "packed"):
        slots = [pack.ARRANGEMENTS[name]([lengths[row] for row in rows], BUDGET) for rows in shuffled]
        pairs = zip(shuffled, slots, strict=True)
        found[name] = [[[rows[index] for index in slot] for slot in step] for rows, step in pairs]
    return found


def padding_share(slots: Slots, lengths: list[int], name: str) -> float:
    if name == "packed":
        return 0.0
    computed = sum(len(slot) * max(lengths[row] for row in slot) for step in slots for slot in step)
    return 1 - sum(lengths) / computed


def padded_inputs(rows: list[int]) -> dict[str, object]:
    return {"input_ids": torch.ones(len(rows), max(rows), dtype=torch.long)}


def packed_inputs(rows: list[int]) -> dict[str, object]:
    bounds = [0, *np.cumsum(rows).tolist()]
    positions = torch.cat([torch.arange(length) for length in rows])[None]
    bounds_on_device = torch.tensor(bounds, dtype=torch.int32)
    return {
        "input_ids": torch.ones_like(positions),
        "position_ids": positions,
        "row_bounds": bounds,
        "cu_seq_lens": bounds_on_device,
    }


def seconds(model: PreTrainedModel, step: list[list[int]], inputs: Callable[[list[int]], dict[str, object]]) -> float:
    """Of a step: every micro-batch forward and backward."""
    started = time.perf_counter()
    for lengths in step:
        model(**inputs(lengths), use_cache=False).logits.square().mean().backward()
    model.zero_grad()
    return time.perf_counter() - started


def models(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """As transformers runs it, and as packing does."""
    config = AutoConfig.for_model(kind)
    packing = Packing(*(compared(config, 1024)["packing"] or OURS))
    small = tiny.shrunk(config, 1024)
    for name, size in SIZES.items():
        setattr(small, name, size)
    made = []
    for attention in (None, packing.attention):
        options = {"attn_implementation": attention} if attention else {}
        made.append(AutoModelForCausalLM.from_config(small, dtype=torch.float32, **options).train())
    packing.apply(made[1])
    return made[0], made[1]


def measured(kind: str, rounds: int) -> dict[str, dict[str, object]]:
    lengths = lengths_of_rows()
    plain, packable = models(kind)
    chosen = steps_of(lengths)
    samples: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(-1, rounds):  # the first turn warms up
        for name in rotated(list(chosen), turn % len(chosen)):
            # another step in each turn: group_by_length has long rows in some and short ones in others
            steps = [chosen[name][turn % (ROWS // STEP)]]
            tokens = sum(lengths[row] for step in steps for slot in step for row in slot)
            model, inputs = (packable, packed_inputs) if name == "packed" else (plain, padded_inputs)
            took = sum(seconds(model, [[lengths[row] for row in slot] for slot in step], inputs) for step in steps)
            if turn >= 0:
                samples[name].append(tokens / took)
    base = statistics.median(samples["group_by_length"])
    return {
        name: {
            "padding": padding_share(chosen[name], lengths, name),
            "micro_batches": sum(map(len, chosen[name])) / len(chosen[name]),
            "tokens_per_second": statistics.median(rates),
            "spread": [min(rates), max(rates)],
            "ratio": statistics.median(rates) / base,
        }
        for name, rates in samples.items()
    }


def shown(kind: str, found: dict[str, dict]) -> str:
    lines = [f"{kind}, {STEP} rows a step, {BUDGET:,} tokens a micro-batch"]
    lines.append("| rows | padding | micro-batches a step | tokens/s: median (least to most) | to group_by_length |")
    lines.append("|---|---|---|---|---|")
    for name, each in found.items():
        least, most = each["spread"]
        rate = f"{each['tokens_per_second']:,.0f} ({least:,.0f} to {most:,.0f})"
        lines.append(f"| {name} | {each['padding']:.1%} | {each['micro_batches']:.1f} | {rate} | {each['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=["llama"])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = {}
    for kind in asked.kinds:
        found[kind] = measured(kind, asked.rounds)
        print(shown(kind, found[kind]), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
