"""A loop written by hand that does nothing but the arithmetic, in four forms: `bare.py JOB ANSWER FORM`.

padded   rows filled up on the right to the longest one; a causal model needs no mask for that
packed   rows best-fit into sequences of the cell's length, positions restart, a block-diagonal mask keeps rows apart
chunked  the same, and the logits exist for 512 tokens at a time: each chunk is differentiated at once, nothing is computed twice
per_row  the same, one long sequence, and attention is computed row by row, without a mask

All: fused AdamW, clipping at 1.0, autocast where the cell is bf16. Frozen weights of a bf16 LoRA cell are stored as autocast
would cast them at every use (the same bits). One number is read from the device a step.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from job import given, operators
from torch import Tensor

CHUNK = 512
Batch = tuple[dict, Tensor, int]  # model inputs, labels already shifted (-100: none), number of labels


def padded(rows: Sequence[np.ndarray], max_length: int) -> Batch:
    return _filled([[row] for row in rows], has_positions=False)


def packed(rows: Sequence[np.ndarray], max_length: int) -> Batch:
    """Best fit, the longest row first."""
    bins: list[list[np.ndarray]] = []
    for row in sorted(rows, key=len, reverse=True):
        room = [(max_length - sum(map(len, content)), number) for number, content in enumerate(bins)]
        fitting = [number for left, number in sorted(room) if left >= len(row)]
        if fitting:
            bins[fitting[0]].append(row)
        else:
            bins.append([row])
    return _filled(bins, has_positions=True)


def joined(rows: Sequence[np.ndarray], max_length: int) -> Batch:
    inputs, labels, count = _filled([list(rows)], has_positions=True)
    return {**inputs, "row_lengths": [len(row) for row in rows]}, labels, count


def _filled(sequences: list[list[np.ndarray]], has_positions: bool) -> Batch:
    longest = max(sum(map(len, rows)) for rows in sequences)
    tokens = np.zeros((len(sequences), longest), dtype=np.int64)
    labels = np.full_like(tokens, -100)
    positions = np.tile(np.arange(longest), (len(sequences), 1))
    for number, rows in enumerate(sequences):
        first = 0
        for row in rows:
            end = first + len(row)
            tokens[number, first:end] = row
            labels[number, first : end - 1] = row[1:]
            positions[number, first:] = np.arange(longest - first)  # what fills the end is a row of its own
            first = end
        positions[number, first:] = np.arange(longest - first)
    inputs = {"input_ids": torch.from_numpy(tokens), "use_cache": False}
    if has_positions:
        inputs["position_ids"] = torch.from_numpy(positions)
    return inputs, torch.from_numpy(labels), int((labels != -100).sum())


def whole_loss(model: torch.nn.Module, batch: Batch, context: Callable) -> Tensor:
    inputs, labels, count = batch
    with context():
        logits = model(**inputs).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / count
    loss.backward()
    return loss.detach()


def chunked_loss(model: torch.nn.Module, batch: Batch, context: Callable) -> Tensor:
    inputs, labels, count = batch
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    with context():
        hidden = bare.model(**inputs).last_hidden_state
    is_kept = labels.flatten() != -100
    kept, targets = hidden.flatten(0, 1)[is_kept], labels.flatten()[is_kept]
    leaf, total = kept.detach().requires_grad_(), torch.zeros(())
    for first in range(0, count, CHUNK):
        with context():
            logits = F.linear(leaf[first : first + CHUNK], bare.lm_head.weight)
            loss = F.cross_entropy(logits.float(), targets[first : first + CHUNK], reduction="sum") / count
        loss.backward()
        total += loss.detach()
    kept.backward(leaf.grad)
    return total


def attend_per_row(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **extra: object
) -> tuple[Tensor, None]:
    parts = zip(*(tensor.split(extra["row_lengths"], dim=2) for tensor in (query, key, value)), strict=True)
    rows = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=True) for part in parts]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


FORMS = {
    "padded": (padded, whole_loss),
    "packed": (packed, whole_loss),
    "chunked": (packed, chunked_loss),
    "per_row": (joined, chunked_loss),
}


def main() -> None:
    job, answer, (form,) = given()
    arrange, loss_of = FORMS[form]
    model = job.model().train()
    if form == "per_row":
        from transformers import AttentionInterface

        AttentionInterface.register("bare_per_row", attend_per_row)
        model.set_attn_implementation("bare_per_row")
    if job.is_checkpointed:
        model.activation_checkpointing_enable()
        if job.is_lora:
            model.disable_input_require_grads()  # else the gradient of frozen embeddings' output is computed
    if job.is_lora and job.is_bf16:
        store_frozen_as_bf16(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0, fused=True)

    def context() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=job.is_bf16)

    def step(rows: Sequence[np.ndarray]) -> float:
        loss = loss_of(model, arrange(rows, job.max_length), context)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    steps = job.examples()
    for number, rows in enumerate(steps, start=1):
        if job.is_profiled and number == len(steps):
            with torch.profiler.profile() as profile:
                loss = step(rows)
            answer.operators = operators(profile)
        else:
            loss = step(rows)
        answer.step(loss, sum(map(len, rows)))
    answer.write()


def store_frozen_as_bf16(model: torch.nn.Module) -> None:
    for module in model.modules():
        is_tied = getattr(module, "weight", None) is model.get_input_embeddings().weight
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad and not is_tied:
            module.to(torch.bfloat16)


if __name__ == "__main__":
    main()
