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


def of_step(plan: Plan, shape: Shape, tokens: int, is_gpu: bool) -> int:
    """Kept by decoder layers for the backward pass of a micro-batch, and by one of them while it runs."""
    layer, wide, piece = running(plan, shape), *_wide(plan, shape, tokens)
    if plan.recipe.train.activation_checkpointing:
        kept = 0 if is_gpu and plan.recipe.train.activation_offload else shape.layers * _input(plan, shape)
        return tokens * (kept + 2 * (layer - wide)) + 2 * piece
    return tokens * (shape.layers + 1) * (layer - wide) + 2 * piece


def of_evaluation(plan: Plan, shape: Shape, tokens: int) -> int:
    """Of one running layer: nothing is kept for a backward pass."""
    wide, piece = _wide(plan, shape, tokens)
    return tokens * (running(plan, shape) - wide) + piece


def of_sums(plan: Plan, shape: Shape) -> int:
    """The sums of experts and an adapter's matrices: a layer keeps its own for the backward pass, and one that runs has the gradient too."""
    whole = stored_width(plan) * shape.summed
    return whole // shape.layers + (whole // shape.layers if plan.recipe.train.activation_checkpointing else whole)


def _wide(plan: Plan, shape: Shape, tokens: int) -> tuple[int, int]:
    """Where the feed-forward runs on pieces: bytes a token of what exists for one piece alone, and bytes of a piece."""
    limit = plan.recipe.train.mlp_chunk_tokens
    if limit is None or limit >= tokens or shape.experts:
        return 0, 0
    each = 4 * shape.intermediate * width(plan) + _wider(plan, shape)
    return each, limit * each


def on_host(plan: Plan, shape: Shape, tokens: int) -> int:
    """Of a micro-batch on a GPU: the inputs of decoder layers that `train.activation_offload` keeps on its host."""
    return tokens * shape.layers * _input(plan, shape) if plan.recipe.train.activation_offload else 0


def running(plan: Plan, shape: Shape) -> int:
    """Bytes a token of one running gated decoder layer."""
    stored = stored_width(plan)
    # attention's inputs and outputs, and the gated layer's
    products = 2 * shape.queries + 2 * shape.keys + 4 * (shape.intermediate - shape.routed)
    # a norm keeps its input, and its output where its weight is trained; a product keeps its input once for each use
    hidden = (2 if is_beside(plan) else 4) * stored + _uses(plan) * width(plan)
    return hidden * shape.hidden + products * width(plan) + stored * _of_experts(plan, shape) + _wider(plan, shape)


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
    """What a gated layer takes more of a quantized base: three of its four outputs come in the type of the residual stream.

    Products of int8 also keep their input in bf16, beside the adapter's cast of it.
    """
    kind, stored = plan.quantization, stored_width(plan)
    outputs = 3 * shape.intermediate * (max(stored, width(plan)) - width(plan)) if kind else 0
    inputs = (2 * shape.hidden + shape.intermediate) * stored if kind == "int8" and stored == 2 else 0
    return outputs + inputs


def _input(plan: Plan, shape: Shape) -> int:
    """Bytes a token of a layer's input, as a checkpointed layer keeps it."""
    return stored_width(plan) * shape.hidden


def average_bytes(plan: Plan) -> int:
    """The moving average of the trained weights, in fp32 if there is one."""
    return FLOAT * plan.trainable_parameters if plan.recipe.train.ema else 0
