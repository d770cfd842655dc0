"""The bytes of activations, from the shape of a model: what decoder layers keep for the backward pass, and one that runs.

`scripts/bench/forecast.py` compares the forecast with real trainings.
"""

from finetune.plan.plan import Plan
from finetune.plan.shape import Shape

FLOAT = 4  # bytes of fp32


def width(plan: Plan) -> int:
    """Bytes of a number that a product makes."""
    return 2 if plan.recipe.train.precision == "bf16" else FLOAT


def is_beside(plan: Plan) -> bool:
    """Whether only matrices beside a frozen base are trained."""
    return plan.recipe.is_adapted


def stored_width(plan: Plan) -> int:
    """Bytes of a weight that is not an adapter's."""
    return 2 if plan.recipe.train.weights == "bf16" else FLOAT


def kept(plan: Plan, shape: Shape, tokens: int, is_gpu: bool) -> int:
    """Of a micro-batch, what all decoder layers keep for the backward pass."""
    settings = plan.recipe.train
    if settings.activation_checkpointing:
        return 0 if is_gpu and settings.activation_offload else tokens * shape.layers * _input(plan, shape)
    layer, wide, _ = running(plan, shape), *_wide(plan, shape, tokens)
    return shape.layers * (tokens * (layer - wide) + _scores(plan, shape, tokens, plan.counts.longest))


def while_running(plan: Plan, shape: Shape, tokens: int) -> int:
    """Beside that, what exists of a layer while it runs; a checkpointed one runs again before its backward pass."""
    layer, wide, piece = running(plan, shape), *_wide(plan, shape, tokens)
    times = 2 if plan.recipe.train.activation_checkpointing else 1
    scores, passing = _scores(plan, shape, tokens, plan.counts.longest), _score(shape, tokens, plan.counts.longest)
    return tokens * times * (layer - wide) + 2 * piece + (times - 1) * scores + width(plan) * passing


def of_step(plan: Plan, shape: Shape, tokens: int, is_gpu: bool) -> int:
    """Kept by decoder layers for the backward pass of a micro-batch, and by one of them while it runs."""
    return kept(plan, shape, tokens, is_gpu) + while_running(plan, shape, tokens)


def of_evaluation(plan: Plan, shape: Shape, tokens: int) -> int:
    """Of one running layer: nothing is kept for a backward pass."""
    wide, piece = _wide(plan, shape, tokens)
    longest = plan.holdout_counts.longest
    scores = _scores(plan, shape, tokens, longest) + width(plan) * _score(shape, tokens, longest)
    return tokens * (running(plan, shape) - wide) + piece + scores


def _scores(plan: Plan, shape: Shape, tokens: int, longest: int) -> int:
    """What a layer keeps of scores that no fused kernel computes: their softmax, and that as the product takes it. Soft-capped ones have
    it in fp32 as well."""
    return _score(shape, tokens, longest) * (2 * width(plan) + FLOAT * shape.is_capped)


def _score(shape: Shape, tokens: int, longest: int) -> int:
    """How many scores: of every token and every head, those with all tokens of a row."""
    return tokens * min(tokens, longest) * shape.scored


def of_sums(plan: Plan, shape: Shape) -> int:
    """The sums of experts and an adapter's matrices: a layer keeps its own for the backward pass, and one that runs has the gradient too."""
    whole = stored_width(plan) * shape.summed
    return whole // shape.layers + (whole // shape.layers if plan.recipe.train.activation_checkpointing else whole)


def _wide(plan: Plan, shape: Shape, tokens: int) -> tuple[int, int]:
    """Where the feed-forward runs on pieces: bytes a token of what exists for one piece alone, and bytes of a piece."""
    limit = plan.recipe.train.mlp_chunk_tokens
    if limit is None or limit >= tokens or shape.experts:
        return 0, 0
    each = _gated(shape) * shape.intermediate * width(plan) + _wider(plan, shape)
    return each, limit * each


def on_host(plan: Plan, shape: Shape, tokens: int) -> int:
    """Of a micro-batch on a GPU: the inputs of decoder layers that `train.activation_offload` keeps on its host."""
    return tokens * shape.layers * _input(plan, shape) if plan.recipe.train.activation_offload else 0


def running(plan: Plan, shape: Shape) -> int:
    """Bytes a token of one running gated decoder layer."""
    stored = stored_width(plan)
    # attention's inputs and outputs, and the gated layer's
    products = 2 * shape.queries + 2 * shape.keys + _gated(shape) * (shape.intermediate - shape.routed)
    # a norm keeps its input, and its output where its weight is trained; a product keeps its input once for each use
    plain = (2 if is_beside(plan) else 4) * stored + _uses(plan) * width(plan)
    # a fused one keeps its input; its output has the type of products, which share it
    hidden = 2 * (stored + width(plan)) if shape.has_fused_norms else plain
    return hidden * shape.hidden + products * width(plan) + stored * _of_experts(plan, shape) + _wider(plan, shape)


def _gated(shape: Shape) -> int:
    """How many tensors as wide as a gated layer it keeps: gate, up, what stands between them in plain code, and their product."""
    return 3 if shape.has_fused_feed_forward else 4


def _uses(plan: Plan) -> int:
    """How often products keep what a norm made. Those of one input share it where nothing casts it on the way."""
    if width(plan) == FLOAT:
        return 3
    is_shared = plan.gpu_sums and is_beside(plan) and stored_width(plan) == width(plan) and not plan.quantization
    return 3 if is_shared else 6


def _of_experts(plan: Plan, shape: Shape) -> int:
    """Numbers a token of its experts, in the type of their weights: autocast does not reach them. Where weights are trained, or sums of
    them and an adapter's, each has its own copy of the token, before and after."""
    copies = 3 if not is_beside(plan) else 2 if shape.summed else 0
    return 4 * shape.routed + copies * shape.experts * shape.hidden


def _wider(plan: Plan, shape: Shape) -> int:
    """What a gated layer takes more of a quantized base: all of its tensors but the last come in the type of the residual stream.

    Products of int8 also keep their input in bf16, beside the adapter's cast of it.
    """
    kind, stored = plan.quantization, stored_width(plan)
    outputs = (_gated(shape) - 1) * shape.intermediate * (max(stored, width(plan)) - width(plan)) if kind else 0
    inputs = (2 * shape.hidden + shape.intermediate) * stored if kind == "int8" and stored == 2 else 0
    return outputs + inputs


def _input(plan: Plan, shape: Shape) -> int:
    """Bytes a token of a layer's input, as a checkpointed layer keeps it."""
    return stored_width(plan) * shape.hidden


def average_bytes(plan: Plan) -> int:
    """The moving average of the trained weights, in fp32 if there is one."""
    return FLOAT * plan.trainable_parameters if plan.recipe.train.ema else 0
