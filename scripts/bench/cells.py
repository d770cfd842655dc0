"""The cells of the comparison, and what each contestant is given for one: rows, a job, and for ours a recipe.

A cell is named like `full-512-bf16`, or `lora-1024-fp32-ac` with activation checkpointing.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import corpus
import numpy as np
from contenders.job import Job
from training import SMOLLM2

from finetune.model import base
from finetune.plan.row_order import Order, derive
from finetune.recipe.schema import Base

SEED = 0
LEARNING_RATES = {"full": 1e-5, "lora": 1e-4}
PARAMETERS, ADAPTER_PARAMETERS = 134_515_008, 4_884_480  # of the model, and of rank 16 beside all its linear layers


@dataclass(frozen=True)
class Cell:
    method: str
    max_length: int
    precision: str
    is_checkpointed: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}-{self.max_length}-{self.precision}{'-ac' if self.is_checkpointed else ''}"

    @property
    def flops_of_token(self) -> int:
        """Of the matrix products with weights, attention and recomputation not counted: 2 forward, 2 for the gradient of the
        inputs, 2 for the gradient of the weights, of which LoRA needs the adapter's alone."""
        if self.method == "full":
            return 6 * PARAMETERS
        return 4 * PARAMETERS + 6 * ADAPTER_PARAMETERS


METHODS, LENGTHS, PRECISIONS = ("full", "lora"), (512, 1024), ("bf16", "fp32")
CELLS = [Cell(method, length, precision) for method in METHODS for length in LENGTHS for precision in PRECISIONS]


def parse(name: str) -> Cell:
    every = {
        cell.name: cell
        for plain in CELLS
        for cell in (plain, Cell(plain.method, plain.max_length, plain.precision, True))
    }
    if name not in every:
        raise ValueError(f"no cell is called {name}; there are {', '.join(every)}")
    return every[name]


def model_directory() -> Path:
    """The quickstart's model as fp32 safetensors, converted once."""
    checkpoint = Base(checkpoint=SMOLLM2)
    return base.directory(checkpoint, base.pin(checkpoint))


@dataclass(frozen=True)
class Prepared:
    """The files of a cell."""

    job: Path
    recipe: Path
    facts: dict


def prepare(cell: Cell, steps: int, model: Path, work: Path, is_profiled: bool = False) -> Prepared:
    """Writes the rows once for all: as text in the order from which ours draws them, as tokens in the order of training."""
    work.mkdir(parents=True)
    tokenizer = base.load_tokenizer(model)
    texts = corpus.steps(tokenizer, steps, cell.max_length)
    order = Order(SEED, corpus.ROWS, (steps * corpus.ROWS,))
    numbered = {}
    for step, rows in enumerate(texts, start=1):
        numbered |= dict(zip(order.examples_of(step).tolist(), rows, strict=True))
    data = work / "train.jsonl"
    data.write_text("".join(json.dumps({"text": numbered[row]}) + "\n" for row in range(len(numbered))))
    tokens = [[[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in rows] for rows in texts]
    flat = [row for rows in tokens for row in rows]
    np.save(work / "tokens.npy", np.array([token for row in flat for token in row], dtype=np.int64))
    np.save(work / "offsets.npy", np.cumsum([0, *map(len, flat)]))
    job = Job(
        base=str(model),
        rows=str(work),
        rows_of_step=corpus.ROWS,
        steps=steps,
        max_length=cell.max_length,
        is_lora=cell.method == "lora",
        is_bf16=cell.precision == "bf16",
        is_checkpointed=cell.is_checkpointed,
        learning_rate=LEARNING_RATES[cell.method],
        adapter_seed=derive(SEED, "adapter"),
        is_profiled=is_profiled,
    )
    (work / "job.json").write_text(json.dumps(asdict(job)))
    recipe = write_recipe(work / "recipe.yaml", sections(cell, model, data, steps))
    return Prepared(work / "job.json", recipe, corpus.facts([[len(row) for row in rows] for rows in tokens]))


def sections(cell: Cell, model: Path, data: Path, steps: int) -> dict:
    """The recipe of ours: what the others are set to, and else its defaults."""
    return {
        "base": {"checkpoint": str(model)},
        "task": {"name": "text", "max_length": cell.max_length},
        "data": {"train": [{"path": str(data)}]},
        "adapter": {"name": "lora", "rank": 16, "alpha": 32} if cell.method == "lora" else None,
        "optimizer": {"learning_rate": LEARNING_RATES[cell.method], "schedule": "constant", "warmup": 0},
        "train": {
            "steps": steps,
            "batch_size": corpus.ROWS,
            "seed": SEED,
            "precision": cell.precision,
            "micro_batch_tokens": corpus.MOST,  # an update is one micro-batch, as it is for the others
            **({"activation_checkpointing": True} if cell.is_checkpointed else {}),
        },
    }


def write_recipe(path: Path, parts: dict) -> Path:
    path.write_text("".join(f"{name}: {json.dumps(section)}\n" for name, section in parts.items() if section))
    return path
