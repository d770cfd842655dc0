"""Looks inside a step while it runs: the loss of every token, and the first module with a NaN or infinite output.

It must not change the computation: it only reads outputs, and keeps the token losses that the step makes anyway.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NotRequired

import numpy as np
import torch

from finetune.errors import counted
from finetune.store.run.records import StepFigures
from finetune.training import incident
from finetune.training.incident import BundledRow
from finetune.training.loop import StepReport
from finetune.training.resolve import Resolved
from finetune.training.state import TrainState

HIGHEST = 5  # shown tokens of a row


@dataclass
class Seen:
    token_losses: list[torch.Tensor] = field(default_factory=list)
    """For each micro-batch of this rank, nats of its supervised tokens."""
    not_finite: str | None = None
    """The first module with a NaN or infinite output."""


@contextmanager
def watched(state: TrainState) -> Iterator[Seen]:
    seen, objective = Seen(), state.accelerator.unwrap_model(state.objective)
    whole = objective.token_losses

    def keeping(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        total, losses_N = whole(*arguments)
        seen.token_losses.append(losses_N.detach().cpu())
        return total, losses_N

    def look(name: str, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
        if seen.not_finite is None and isinstance(first, torch.Tensor) and not torch.isfinite(first).all():
            seen.not_finite = name

    objective.token_losses = keeping
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: look(name, output))
        for name, module in state.model.named_modules()
        if name
    ]
    try:
        yield seen
    finally:
        objective.token_losses = whole
        for hook in hooks:
            hook.remove()


class Inspection(StepFigures):
    """A step for a reader: its figures, its gradient by module, and its rows, the one with the highest loss first."""

    step: int
    verdict: NotRequired[str]
    module_grad_norms: dict[str, float]
    first_not_finite_activation: str | None
    rows: list[BundledRow]


def described(resolved: Resolved, report: StepReport, seen: Seen, slots: Sequence[Sequence[int]]) -> Inspection:
    """A step as an object: its figures, its gradient by module, and its rows, the highest loss first. `slots` are the
    micro-batches of this rank: it knows the tokens of their rows alone."""
    losses_of = _of_examples(report, seen, slots)
    rows = incident.rows_of(resolved, report)
    for row in rows:
        example, losses = resolved.train[row["example"]], losses_of.get(row["example"])
        row["text"] = marked(resolved, example.tokens, example.supervised)
        if losses is not None:
            targets = example.tokens[1:][example.supervised[1:]].tolist()
            row["token_losses"] = [
                (str(resolved.tokenizer.decode([token])), loss) for token, loss in zip(targets, losses, strict=True)
            ]
    about: Inspection = {
        "step": report.step,
        **report.figures,
        "module_grad_norms": report.module_norms,
        "first_not_finite_activation": seen.not_finite,
        "rows": rows,
    }
    return {**about, "verdict": report.verdict.message} if report.verdict else about


def marked(resolved: Resolved, tokens: np.ndarray, supervised: np.ndarray) -> str:
    """A row as text, its supervised parts in ⟦ ⟧."""
    stretches: list[tuple[bool, list[int]]] = []
    for token, is_supervised in zip(tokens.tolist(), supervised.tolist(), strict=True):
        if not stretches or stretches[-1][0] != is_supervised:
            stretches.append((is_supervised, []))
        stretches[-1][1].append(token)
    texts = [(is_supervised, str(resolved.tokenizer.decode(stretch))) for is_supervised, stretch in stretches]
    return "".join(f"⟦{text}⟧" if is_supervised else text for is_supervised, text in texts)


def listing(facts: Inspection) -> str:
    """The same as text."""
    lines = [
        "step {step}: loss {loss:.6g}, gradient norm {grad_norm:.6g}, learning rate {learning_rate:.3g}".format(
            **facts
        ),
        f"  {counted(len(facts['rows']), 'row')}, {counted(facts['tokens'], 'token')}, {facts['supervised_tokens']} supervised"
        + (f"; {facts['verdict']}" if "verdict" in facts else ""),
        "  gradient norm by module: "
        + ", ".join(f"{name} {norm:.4g}" for name, norm in facts["module_grad_norms"].items()),
    ]
    if facts["first_not_finite_activation"]:
        lines.append(f"  the first NaN or infinite output comes from {facts['first_not_finite_activation']}")
    for row in facts["rows"]:
        lines.append(
            f"  row {row['row']}: loss {row['loss']:.6g}, {counted(row['tokens'], 'token')}, {row['supervised_tokens']} supervised"
        )
        lines += [f"    {line}" for line in row["text"].splitlines()]
        if pairs := row.get("token_losses"):
            highest = sorted(pairs, key=lambda pair: (math.isfinite(pair[1]), -pair[1]))[:HIGHEST]
            lines.append("    highest: " + ", ".join(f"{text!r} {loss:.3g}" for text, loss in highest))
    return "\n".join(lines)


def _of_examples(report: StepReport, seen: Seen, slots: Sequence[Sequence[int]]) -> dict[int, list[float]]:
    """The losses of each example's supervised tokens; a micro-batch has them row after row."""
    found: dict[int, list[float]] = {}
    for indices, losses_N in zip(slots, seen.token_losses, strict=False):
        parts = losses_N.split([report.row_tokens[index] for index in indices])
        found |= {int(report.examples[index]): part.tolist() for index, part in zip(indices, parts, strict=True)}
    return found
