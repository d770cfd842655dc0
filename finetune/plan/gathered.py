"""Where devices share rows (`fsdp`): the bytes of what is whole on each for a while, by what `fully_shard` holds at once.

A traced step over small CPU tensors holds as many (`tests/plan/test_gathered.py`). A layer comes in the type in which it is stored.
"""

from finetune.plan.activations import FLOAT, is_beside, stored_width, width
from finetune.plan.plan import Plan
from finetune.plan.shape import Shape


def in_a_forward(plan: Plan, shape: Shape) -> int:
    """The layer that runs, the next one on its way, and what is around the layers: embeddings and head."""
    return 2 * _layer(plan, shape) + _around(plan, shape)


def in_a_step(plan: Plan, shape: Shape) -> int:
    """In a backward pass also the gradients of a layer, and their sum over ranks in fp32."""
    return in_a_forward(plan, shape) + _trained_of_layer(plan, shape) * (_gradient_width(plan) + FLOAT)


def at_the_end(plan: Plan, shape: Shape) -> int:
    """Of a backward pass: embeddings and head with their gradients, and the sum over ranks in fp32. No layer is whole any more."""
    trained = 0 if is_beside(plan) else _embeddings(shape)
    return _around(plan, shape) + trained * (_gradient_width(plan) + FLOAT)


def _layer(plan: Plan, shape: Shape) -> int:
    """Of a decoder layer; under an adapter its linear layers have the type of products."""
    whole = (plan.total_parameters - plan.parameters_beside_text - _embeddings(shape)) // shape.layers
    if not is_beside(plan):
        return stored_width(plan) * whole
    trained, other = _trained_of_layer(plan, shape), shape.not_linear // shape.layers
    return width(plan) * (whole - trained - other) + stored_width(plan) * other + FLOAT * trained


def _around(plan: Plan, shape: Shape) -> int:
    each = shape.vocabulary * shape.hidden
    head = 0 if shape.is_tied else each * (width(plan) if is_beside(plan) else stored_width(plan))
    return stored_width(plan) * each + head


def _embeddings(shape: Shape) -> int:
    return shape.vocabulary * shape.hidden * (1 if shape.is_tied else 2)


def _trained_of_layer(plan: Plan, shape: Shape) -> int:
    around = 0 if is_beside(plan) else _embeddings(shape)
    return max(0, plan.trainable_parameters - around) // shape.layers


def _gradient_width(plan: Plan) -> int:
    return FLOAT if is_beside(plan) else stored_width(plan)
