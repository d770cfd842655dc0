"""Floor 7. What a card says in numbers: figures of the training, its cost, and what stands in for a benchmark. `card` and `verify` call it."""

from collections.abc import Mapping, Sequence

from finetune.plan import Plan


def shown(records: Sequence[Mapping], step: int) -> str:
    """What a card says in numbers of a training, from the figures-only journal up to a step; `verify` asks for the same words."""
    steps = [item for item in records if item["kind"] == "step"]
    evaluated = {item["step"]: item for item in records if item.get("event") == "evaluated"}
    columns = [("base", evaluated.get(0)), (f"step {step}", evaluated.get(step))]
    rows = [
        (name, *(_figure(found, key) for _, found in columns))
        for name, key in (("held-out loss (nats per token)", "loss"), ("held-out perplexity", "perplexity"))
    ]
    counted = evaluated.get(step) or evaluated.get(0)
    held_out = (
        f"On {number(counted['rows'])} held-out rows ({number(counted['tokens'])} tokens with a loss)."
        if counted
        else "No rows were held out."
    )
    sums = [sum(item[key] for item in steps) for key in ("tokens", "supervised_tokens")]
    seen = f"Trained for {number(len(steps))} steps on {number(sums[0])} tokens, of them {number(sums[1])} with a loss."
    if left_out := [item for item in steps if "skipped" in item]:
        reasons = sorted({item["skipped"].replace("_", " ") for item in left_out})
        seen += f" The updates of {number(len(left_out))} steps were left out ({', '.join(reasons)})."
    return (
        "\n\n".join([table(("", *(name for name, _ in columns)), rows), held_out, seen])
        if counted
        else f"{held_out} {seen}"
    )


def _figure(found: Mapping | None, key: str) -> str:
    return f"{found[key]:.4f}" if found else "not evaluated"


def cost(records: Sequence[Mapping], plan: Plan, world_size: int) -> list[tuple[str, str]]:
    """Rows of a table: tokens, operations and device hours. A token costs 6 operations for each weight that is trained and 4 for each other
    (Kaplan et al., https://arxiv.org/abs/2001.08361, section 2.1; without the gradient of a weight a third of it goes)."""
    steps = [item for item in records if item["kind"] == "step"]
    tokens, seconds = (sum(item.get(key, 0) for item in steps) for key in ("tokens", "seconds"))
    trained = plan.trainable_parameters
    operations = tokens * (6 * trained + 4 * (plan.total_parameters - trained))
    return [
        ("parameters", f"{number(plan.total_parameters)}, of them {number(trained)} trained"),
        ("tokens in training", number(tokens)),
        (
            "training compute",
            f"{operations:.3g} floating-point operations (6 a token and trained weight, 4 a frozen one)",
        ),
        ("time in steps", f"{seconds * world_size / 3600:.3g} device hours, on {number(world_size)} devices"),
    ]


def model_index(records: Sequence[Mapping], step: int, name: str) -> list[dict]:
    """The front matter's `model-index` (https://huggingface.co/docs/hub/model-cards#evaluation-results); empty where nothing was evaluated."""
    evaluated = {item["step"]: item for item in records if item.get("event") == "evaluated"}
    if step not in evaluated:
        return []
    metrics = [
        {"type": key, "name": title, "value": evaluated[step][key]}
        for title, key in (("held-out loss (nats per token)", "loss"), ("held-out perplexity", "perplexity"))
    ]
    task = {"type": "text-generation", "name": "Text generation"}
    dataset = {"type": "held-out-rows", "name": f"{evaluated[step]['rows']} held-out rows"}
    return [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]


def number(value: int) -> str:
    return f"{value:,}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
