"""The numbers of a card: figures of the training, its cost, and held-out results."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from finetune.errors import counted
from finetune.package.card.reported import told
from finetune.plan.facts import Metrics
from finetune.plan.plan import PinnedSource, Plan
from finetune.recipe.schema import Task
from finetune.store.run.journal import is_event, is_step
from finetune.store.run.records import EventRecord, Record

WITHIN = 1.96  # standard errors: the 95 % interval of a normal distribution
INTERVALS = "In brackets the 95 % interval over rows like these, each with all its tokens."


def held_out(records: Iterable[Record]) -> dict[int, Metrics]:
    """Held-out figures by step; if a mean of steps has figures, they replace those of its last step."""
    events = [item for item in records if is_event(item)]
    found = {item["step"]: item for item in events if item["event"] == "evaluated"}
    for item in events:
        if item["event"] == "averaged":
            found.pop(item["step"], None)
            found |= {item["step"]: item} if "loss" in item else {}
    return {step: cast(Metrics, item) for step, item in found.items()}


def reported(records: Iterable[Record]) -> dict[int, EventRecord]:
    """Figures on the test set, by step; none where the recipe names no such set."""
    return {item["step"]: item for item in records if is_event(item) and item["event"] == "reported"}


def of_card(records: Sequence[Record]) -> dict[int, Metrics]:
    """The figures of a card by step: on the test set, or else on the held-out rows."""
    return cast(dict[int, Metrics], reported(records)) or held_out(records)


def kind_of_rows(records: Iterable[Record]) -> str:
    """What the figures are of."""
    return "rows of a test set" if reported(records) else "held-out rows"


def named(records: Iterable[Record], step: int) -> str:
    """The packaged step, or the mean of several, in words."""
    events = (item for item in records if is_event(item))
    average = next((item for item in events if item["event"] == "averaged"), None)
    if average is None:
        return f"step {step}"
    if "weights" in average:
        return f"average of {counted(len(average['weights']), 'checkpoint')} up to step {step}"
    return f"mean of steps {', '.join(map(str, average['steps']))}"


def shown(records: Sequence[Record], step: int, titles: Mapping[str, str]) -> str:
    """The sentences with numbers of a card, from the figures-only journal up to a step; `verify` compares the same words.

    `titles` are those of the task's figures.
    """
    steps = [item for item in records if is_step(item)]
    evaluated, own = of_card(records), reported(records).get(step)
    columns = [("base", evaluated.get(0)), (named(records, step), evaluated.get(step))]
    has_intervals = any(found and "loss_stderr" in found for _, found in columns)
    counted = evaluated.get(step) or evaluated.get(0)
    there = [(key, title) for key, title in titles.items() if counted and key in counted]
    rows = [(title, *(_figure(found, key) for _, found in columns)) for key, title in there]
    if own:
        rows += [(name, *(_answer(reported(records).get(at), name) for at in (0, step))) for name in own["answers"]]
        rows_held_out = told(own)
    elif counted:
        rows_held_out = f"On {number(counted['rows'])} held-out rows ({number(counted['tokens'])} tokens with a loss)."
    else:
        rows_held_out = "No rows were held out."
    rows_held_out += f" {INTERVALS}" if counted and has_intervals else ""
    tokens, learnt = (sum(item["tokens"] for item in steps), sum(item["supervised_tokens"] for item in steps))
    seen = f"Trained for {number(len(steps))} steps on {number(tokens)} tokens, of them {number(learnt)} with a loss."
    if left_out := [item for item in steps if "skipped" in item]:
        reasons = sorted({item["skipped"].replace("_", " ") for item in left_out})
        seen += f" The updates of {number(len(left_out))} steps were left out ({', '.join(reasons)})."
    return (
        "\n\n".join([table(("", *(name for name, _ in columns)), rows), rows_held_out, seen])
        if counted
        else f"{rows_held_out} {seen}"
    )


def _figure(found: Metrics | None, key: str) -> str:
    if found is None:
        return "not evaluated"
    if key not in ("loss", "perplexity") or "loss_stderr" not in found or not isinstance(found["loss"], int | float):
        return _rounded(found[key])
    ends = [found["loss"] + sign * WITHIN * found["loss_stderr"] for sign in (-1, 1)]
    if key == "perplexity":
        ends = [math.exp(end) if end < 700 else math.inf for end in ends]
    return f"{_rounded(found[key])} ({_rounded(ends[0])} to {_rounded(ends[1])})"


def _answer(found: EventRecord | None, metric: str) -> str:
    return _rounded(found["answers"][metric]) if found and metric in found["answers"] else "not evaluated"


def _rounded(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"  # the journal spells NaN and infinity as text


def eval_results(records: Sequence[Record], step: int, plan: Plan) -> list[dict[str, Any]]:
    """Entries of `.eval_results` (https://huggingface.co/docs/hub/eval-results) if the rows of the figures are one Hub data set; the Hub
    shows those of registered benchmarks."""
    evaluated = of_card(records)
    sources, pins = _sources(records, step, plan)
    if step not in evaluated or not isinstance(sources, list) or len(sources) > 1:
        return []
    if (dataset := sources[0].dataset) is None:
        return []
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    (source,), (pinned,), found = sources, pins, evaluated[step]
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=source.name or "default",
        value=found["loss"],
        dataset_revision=pinned.revision,
        notes=f"held-out loss, nats per token: {_figure(found, 'loss')}",
    )
    return eval_result_entries_to_yaml([entry])


def _sources(records: Sequence[Record], step: int, plan: Plan) -> tuple[object, Sequence[PinnedSource]]:
    """Those of the rows of the figures, as the recipe and the plan have them."""
    if own := reported(records).get(step):
        pins = next(each.sources for each in plan.sets if each.name == own["set"])
        return plan.recipe.evaluate.sets[own["set"]].rows, pins
    return plan.recipe.data.holdout, plan.holdout


def cost(records: Sequence[Record], plan: Plan, world_size: int) -> list[tuple[str, str]]:
    """Rows of a table: tokens, operations and device hours. A token costs 6 operations for each trained weight that it uses and 4 for
    each frozen one (Kaplan et al., https://arxiv.org/abs/2001.08361, section 2.1; the gradient of a weight is a third of it)."""
    steps = [item for item in records if is_step(item)]
    tokens, seconds = sum(item.get("tokens", 0) for item in steps), sum(item.get("seconds", 0.0) for item in steps)
    trained = plan.trainable_parameters
    active = plan.active_parameters or plan.total_parameters
    operations = tokens * (6 * min(trained, active) + 4 * max(0, active - trained))
    used = f", and {number(active)} used by a token" if plan.active_parameters else ""
    return [
        ("parameters", f"{number(plan.total_parameters)}, of them {number(trained)} trained{used}"),
        ("tokens in training", number(tokens)),
        (
            "training compute",
            f"{operations:.3g} floating-point operations (6 a token and trained weight that it uses, 4 a frozen one)",
        ),
        ("time in steps", f"{seconds * world_size / 3600:.3g} device hours, on {number(world_size)} devices"),
    ]


def model_index(records: Sequence[Record], step: int, name: str, task: Task) -> list[dict[str, object]]:
    """The front matter's `model-index` (https://huggingface.co/docs/hub/model-cards#evaluation-results); empty if nothing was evaluated."""
    evaluated = of_card(records)
    if step not in evaluated:
        return []
    metrics = [{"type": key, "name": title, "value": evaluated[step][key]} for key, title in task.figures.items()]
    kind = {"type": task.pipeline_tag, "name": task.pipeline_tag.replace("-", " ").capitalize()}
    dataset = {"type": "held-out-rows", "name": f"{evaluated[step]['rows']} {kind_of_rows(records)}"}
    return [{"name": name, "results": [{"task": kind, "dataset": dataset, "metrics": metrics}]}]


def number(value: float) -> str:
    return f"{value:,}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
