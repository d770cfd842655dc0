"""What older code did in another way: a run that began with it goes on so."""

from finetune.plan.plan import Plan
from finetune.recipe.schema import Recipe


def keeps_fp32(recipe: Recipe, like: Plan | None) -> bool:
    """`Plan.keeps_fp32` of a recipe; `like` is the plan of a run that it goes on with."""
    if like is not None and like.recipe.train.weights == "bf16":
        return recipe.train.weights == "bf16" and like.keeps_fp32
    return recipe.train.weights == "bf16"


def reaches_all(recipe: Recipe, like: Plan | None) -> bool:
    """Whether an adapter reaches all that its recipe names; `like` is the plan of a run that it goes on with."""
    return like is None or like.reaches_all or like.recipe.adapter != recipe.adapter
