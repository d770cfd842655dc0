"""How far a merge, a cast or a quantization moves a model's logits, and the most that each may."""

import torch
import torch.nn.functional as F

from finetune.package.proof import Check, Logits, failed

# Mean nats of Kullback-Leibler divergence a token. Merging in fp32 only changes the order of sums; the cast to bf16 changes the
# weights, and arithmetic too. Measured with LoRA on SmolLM2-135M, whose batch here is noise: 2e-11 and 3e-3.
MERGE_BOUND = 1e-5
CAST_BOUND = 2e-2
QUANTIZATION_BOUND = 2.0  # 0.56 for nf4 of the same model, without an adapter: noise reacts more strongly than text


def within(name: str, what: str, reference: Logits, other: Logits, bound: float) -> Check:
    """A bounded change of the logits: mean divergence of the next token's distribution from the reference's."""
    figures = drift(reference, other) | {"bound": bound}
    if not figures["mean_kl"] <= bound:
        hint = "set package.dtype: fp32" if name == "cast" else "report it: the adapter does not merge"
        raise failed(
            name, f"{what} changes the model by a mean KL of {figures['mean_kl']:.3g}; the bound is {bound:g}", hint
        )
    message = (
        f"{what} changes logits by at most {figures['max_difference']:.3g}, mean KL {figures['mean_kl']:.2g} (bound {bound:g}), "
        f"same likeliest token at {figures['top1_agreement']:.2%} of positions"
    )
    return Check(name, message, figures)


def drift(reference: Logits, other: Logits) -> dict[str, float]:
    """Largest difference of a logit, mean KL divergence in nats, and the share of positions with the same likeliest token."""
    changes, divergence, same, positions = [], 0.0, 0, 0
    for name in reference:
        # One (T, V) at a time: fp64 of a whole batch is large.
        for before, after in zip(reference[name], other[name], strict=True):
            changes.append((before - after).abs().max())
            logs = [F.log_softmax(one.double(), dim=-1) for one in (before, after)]
            divergence += F.kl_div(logs[1], logs[0], reduction="sum", log_target=True).item()
            same += int((before.argmax(-1) == after.argmax(-1)).sum())
            positions += len(before)
    # tensors: Python's max() loses a NaN
    return {
        "max_difference": torch.stack(changes).max().item(),
        "mean_kl": divergence / positions,
        "top1_agreement": same / positions,
    }
