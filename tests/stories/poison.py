"""`finetune` with a model that cannot stand one character: the loss of a row that has it is what POISON says (`nan`, or a factor).

As a module it is the command line, for tests that need processes: `python -m tests.stories.poison train …`.
"""

import json
import os
from pathlib import Path

import torch

from finetune.plan.row_order import Order
from finetune.training import state

MARK = "~"
SEED = 0


def rows_with_marks(file: Path, count: int, batch_size: int, steps: list[int]) -> dict[int, int]:
    """Writes `count` text rows of which the marked ones come up in these steps (of the first epoch); step -> row."""
    order = Order(SEED, batch_size, (count,))
    marked = {step: int(order.examples_of(step)[-1]) for step in steps}
    lines = []
    for row in range(count):
        text = " ".join(f"row {row} says {word}" for word in ("this", "that")) + (
            MARK if row in marked.values() else ""
        )
        lines.append(json.dumps({"text": text}) + "\n")
    file.write_text("".join(lines))
    return marked


def poison(monkeypatch, tokenizer, value: float) -> None:
    mark = tokenizer(MARK)["input_ids"][0]
    sound = state.Objective.forward

    def forward(self: state.Objective, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        total, rows = sound(self, batch)
        if not batch:  # `inside`
            return total, rows
        inputs = batch["model_inputs"]
        bounds, tokens = inputs["row_bounds"], inputs["input_ids"].flatten()
        is_marked = [bool((tokens[a:b] == mark).any()) for a, b in zip(bounds, bounds[1:], strict=False)]
        factors = torch.where(torch.tensor(is_marked), value, 1.0).to(rows)
        return total * (rows * factors).sum() / rows.sum(), rows * factors

    monkeypatch.setattr(state.Objective, "forward", forward)


if __name__ == "__main__":
    from transformers import AutoTokenizer

    from finetune.cli import main

    class Patches:
        setattr = staticmethod(setattr)

    poison(Patches, AutoTokenizer.from_pretrained(os.environ["POISON_BASE"]), float(os.environ["POISON"]))
    main()
