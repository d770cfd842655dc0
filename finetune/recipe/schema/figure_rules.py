"""The combinations of held-out figures, and of what they decide, that do not work; each as `key: message`."""

from collections.abc import Iterator

from finetune.recipe.schema.evaluation import HELD_OUT, Evaluate
from finetune.recipe.schema.tasks import Task
from finetune.recipe.schema.training import Checkpoint, Judged, Train


def problems(
    task: Task | None, evaluate: Evaluate | None, checkpoint: Checkpoint | None, train: Train | None
) -> list[str]:
    """Those of the sections that are right."""
    if task is None or evaluate is None:
        return []
    found = [*metrics_have_prompts(task, evaluate), *test_set_is_a_set(evaluate)]
    if checkpoint:
        averages = ("ema_",) if train and train.ema else ()
        found += figure_is_computed(task, evaluate, checkpoint.keep.chosen_by, "checkpoint.keep.best", averages)
    if train and train.early_stopping:
        if evaluate.every is None:
            found.append("train.early_stopping: needs evaluations; set `evaluate.every`")
        found += figure_is_computed(task, evaluate, train.early_stopping, "train.early_stopping")
    return found


def metrics_have_prompts(task: Task, evaluate: Evaluate) -> Iterator[str]:
    is_all_learnt = task.row_form == "text" or getattr(task, "learn", None) == "all"
    for name, each in evaluate.sets.items():
        if each.metrics and is_all_learnt:
            yield f"evaluate.sets.{name}.metrics: need rows with a prompt that is not learnt"


def test_set_is_a_set(evaluate: Evaluate) -> Iterator[str]:
    if evaluate.test_set and evaluate.test_set not in evaluate.sets:
        known = " or ".join(f"`{name}`" for name in evaluate.sets)
        yield f"evaluate.test_set: must be {known}" if known else "evaluate.test_set: needs its rows in `evaluate.sets`"


def figure_is_computed(
    task: Task, evaluate: Evaluate, by: Judged, key: str, averages: tuple[str, ...] = ()
) -> Iterator[str]:
    """By training: it does not wait for answers. `averages` begin the names of figures of averaged weights."""
    rows, figure = by.parts
    if rows == evaluate.test_set and rows in evaluate.sets:
        yield f"{key}.metric: nothing is chosen by `{rows}`, since it is `evaluate.test_set`; use another set"
        return
    known = {"loss", *task.figures}
    known |= {f"{prefix}{name}" for prefix in averages for name in known}
    watched = [name for name in evaluate.sets if name != evaluate.test_set]
    if rows not in (HELD_OUT, *watched) or figure not in known:
        told = " or ".join(f"`{name}`" for name in sorted(known))
        sets = "".join(f", or those of a set, like `{name}/loss`" for name in watched[:1])
        yield f"{key}.metric: training computes {told}{sets}, not `{by.metric}`"
