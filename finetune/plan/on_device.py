"""What a new plan takes from the kind of device on which it is made. It is recorded, and holds wherever the run goes on."""

from finetune.plan.plan import Plan
from finetune.recipe.schema import Recipe


def with_weights(recipe: Recipe, like: Plan | None, is_gpu: bool) -> Recipe:
    """The recipe with the type of its weights, if it names none; `like` is the plan of a run that it goes on with.

    On a GPU a base under an adapter is in bf16: kernels between products wait for memory, and then move half as much.
    """
    if "weights" in recipe.train.model_fields_set:
        return recipe
    weights = recipe.train.weights
    if like is not None:
        weights = like.recipe.train.weights
    elif is_gpu and recipe.is_adapted and recipe.train.precision == "bf16":
        weights = "bf16"
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"weights": weights})})


def has_gpu_sums(like: Plan | None, is_gpu: bool) -> bool:
    """`Plan.gpu_sums`; `like` is the plan of a run that it goes on with."""
    return is_gpu if like is None else like.gpu_sums
