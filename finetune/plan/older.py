"""What older code did in another way: a run that began with it goes on so."""

from finetune.plan import on_device
from finetune.plan.plan import Plan
from finetune.recipe.schema import Recipe


def ways(recipe: Recipe, like: Plan | None, is_gpu: bool) -> dict[str, bool]:
    """The fields of a plan that say in which way it does something; `like` is the plan of a run that it goes on with."""
    return {
        "pads_least": like is None or like.pads_least,
        "keeps_fp32": keeps_fp32(recipe, like),
        "gpu_sums": on_device.has_gpu_sums(like, is_gpu),
    }


def keeps_fp32(recipe: Recipe, like: Plan | None) -> bool:
    """`Plan.keeps_fp32` of a recipe; `like` is the plan of a run that it goes on with."""
    if like is not None and like.recipe.train.weights == "bf16":
        return recipe.train.weights == "bf16" and like.keeps_fp32
    return recipe.train.weights == "bf16"


def reaches_all(recipe: Recipe, like: Plan | None) -> bool:
    """Whether an adapter reaches all that its recipe names; `like` is the plan of a run that it goes on with."""
    return like is None or like.reaches_all or like.recipe.adapter != recipe.adapter
