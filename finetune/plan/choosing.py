"""The rows by which a run chooses among its checkpoints: `@best`, `checkpoint.keep.best` and early stopping look at their figures."""

from finetune.plan.plan import Plan
from finetune.recipe.schema import HELD_OUT


def choosing_rows(plan: Plan) -> dict[str, int]:
    """The sets of rows by name, with their number of rows; none where only the ends of the training are evaluated."""
    recipe = plan.recipe
    if recipe.evaluate.every is None and not recipe.checkpoint.keep.best:
        return {}
    rows = {HELD_OUT: plan.holdout_counts.rows} | {each.name: each.counts.rows for each in plan.sets}
    by = [recipe.checkpoint.keep.chosen_by, recipe.train.early_stopping]
    names = dict.fromkeys(each.parts[0] for each in by if each)
    return {name: rows[name] for name in names if rows.get(name)}
