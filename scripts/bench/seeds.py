"""Trains pairs of seeds of one recipe, and compares each pair: what `compare` says where only the seed differs.

    python scripts/bench/seeds.py WORK [--pairs 10] [--steps 30] [--base-steps 300]

The base is a Llama of half a million parameters, trained first on a half of the quickstart's docstrings; the pairs train on the other half.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune.compare import candidates, compare
from finetune.compare.results import Asked
from finetune.compare.shown import Comparison
from finetune.plan.statistics import power
from finetune.recipe.load import load
from finetune.training.run import train

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_data(work: Path) -> None:
    script = Path(__file__).parents[1] / "stdlib_docstrings.py"
    subprocess.run([sys.executable, script, work], check=True)
    rows = (work / "train.jsonl").read_text().splitlines(keepends=True)
    for name, some in (("first", rows[::2]), ("second", rows[1::2])):
        (work / f"{name}.jsonl").write_text("".join(some))


def write_base(work: Path) -> None:
    """A small Llama with random weights, and a tokenizer of the data."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    turns = (json.loads(line)["messages"] for line in (work / "first.jsonl").open())
    tokenizer.train_from_iterator((turn["content"] for row in turns for turn in row), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=wrapped.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(work / "base")
    wrapped.save_pretrained(work / "base")


def trained(work: Path, name: str, base: str, rows: str, steps: int, **settings: object) -> str:
    """The last commit of a run."""
    recipe = {
        "base": {"checkpoint": base},
        "task": {"name": "chat", "max_length": 384},
        "data": {
            "train": [{"path": str(work / rows)}],
            "holdout": [{"path": str(work / "holdout.jsonl")}],
            "allow": ["nothing_learnt", "cut_rows"],
        },
        "optimizer": {"learning_rate": settings.pop("learning_rate")},
        "train": {"steps": steps, "batch_size": 8, "precision": "fp32", "micro_batch_tokens": 2048, **settings},
        "checkpoint": {"keep": {"last": 1}},
    }
    path = work / f"{name}.yaml"
    path.write_text(json.dumps(recipe))
    train(load(path, ()), work / name, is_quiet=True)
    return f"{work / name}@{steps}"


def compared(one: str, two: str) -> Comparison:
    return candidates.compared([one, two], Asked(), None, compare.Question(changed=0))


def measure(work: Path, pairs: int, steps: int, base_steps: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "base").exists():
        write_data(work)
        write_base(work)
    base = trained(work, "pretrained", str(work / "base"), "first.jsonl", base_steps, learning_rate=3e-3)
    print("| pair | difference | interval | p | verdict | rows can show |\n|---|---|---|---|---|---|", flush=True)
    differences, smallest = [], []
    for number in range(pairs):
        seeds = [2 * number, 2 * number + 1]
        one, two = (
            trained(work, f"seed-{seed}", base, "second.jsonl", steps, learning_rate=3e-4, seed=seed) for seed in seeds
        )
        facts = compared(one, two)
        (pair,) = facts["pairs"]
        low, high = pair["interval"]
        differences.append(pair["difference"])
        smallest.append(pair["smallest"])
        cells = (f"{pair['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{pair['p_value']:.2g}")
        print(
            f"| {seeds[0]}, {seeds[1]} | {' | '.join(cells)} | {pair['verdict']} | {pair['smallest']:.4f} |", flush=True
        )
    error = float(np.median(smallest)) / power.smallest(1, facts["rows"] - 1)
    print(f"\nstandard deviation of a difference over pairs {np.std(differences):.4f}, by its rows alone {error:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--base-steps", type=int, default=300)
    measure(**vars(parser.parse_args()))
