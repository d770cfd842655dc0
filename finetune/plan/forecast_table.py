"""The forecast of a plan as text, for `plan`; it must add no fact of its own."""

from finetune.errors import counted
from finetune.plan.disk import readable
from finetune.plan.shown import Forecast, MirrorFacts, OfDevices, RateFacts, WithDevices

COME_TOGETHER = {
    "packed": "packed: several in one sequence, each apart from the others",
    "padded": "padded: those of like length in one batch",
    "alone": "one by one",
}
TAKEN = {
    "ddp": "each of {} devices holds the whole model",
    "fsdp": "{} devices share the rows of weights, gradients and moments",
    "hsdp": "of {} devices those of each host share the rows of weights, gradients and moments",
}
ON_SEVERAL = {
    "auto": "each does if it fits, else they share its rows (auto)",
    "ddp": "each does (ddp)",
    "fsdp": "they share its rows (fsdp)",
    "hsdp": "those of each host share its rows (hsdp)",
}


def table(facts: Forecast) -> str:
    """The forecast for a reader."""
    rows = _origins(facts)
    share = facts["supervised_tokens_per_epoch"] / facts["tokens_per_epoch"]
    rows += [
        (
            "rows",
            f"{facts['rows']:,} to train on, {facts['holdout_rows']:,} held out ({counted(facts['holdout_tokens'], 'token')})",
        ),
        *(
            [("", f"{facts['holdout_copies']:,} copies of held-out rows are in neither")]
            if facts["holdout_copies"]
            else []
        ),
        ("", f"come together {COME_TOGETHER[facts['arrangement']]}"),
        *(("", note) for note in facts["notes"]),
        (
            "tokens",
            f"{facts['tokens_per_epoch']:,} an epoch, {facts['supervised_tokens_per_epoch']:,} supervised ({share:.0%})",
        ),
        (
            "cut",
            f"{counted(facts['cut_rows'], 'row')} by {counted(facts['cut_tokens'], 'token')}; the longest kept has {facts['longest']:,}",
        ),
        ("left out", f"{counted(facts['left_out_rows'], 'row')} with nothing to learn within task.max_length"),
        *_mixture_rows(facts),
        ("rate", _rate(facts["learning_rate"])),
        ("steps", f"{facts['steps']:,} ({facts['steps_per_epoch']:,} an epoch), {facts['tokens']:,} tokens in all"),
        ("parameters", f"{facts['trainable_parameters']:,} of {facts['total_parameters']:,} are trained"),
        *_active_rows(facts),
        ("strategy", _strategy(facts)),
        ("memory", f"about {readable(facts['memory_bytes'])}; there are {readable(facts['machine_memory_bytes'])}"),
        *(("", f"{readable(size):>10}  {name}") for name, size in facts["memory"].items() if size),
        ("", f"at {facts['micro_batch_tokens']:,} tokens a micro-batch"),
        *_host_rows(facts),
        ("checkpoint", f"{readable(facts['checkpoint_bytes'])} each, {readable(facts['run_bytes'])} for the run"),
        ("disk", f"{readable(facts['free_bytes'])} free"),
        *([("mirror", _mirror(facts["mirror"]))] if facts["mirror"] else []),
        ("guard", f"spike: {facts['guard']['spike']}, not finite: {facts['guard']['not_finite']}"),
        ("plan", facts["plan_id"]),
        *_publish_rows(facts),
    ]
    lines = [f"{name:11}{text}" for name, text in rows]
    lines += [f"warning: {warning}" for warning in facts["warnings"]]
    if facts["memory_bytes"] > facts["machine_memory_bytes"]:
        lines.append(
            "warning: the memory forecast is more than there is; lower train.micro_batch_tokens, or use adapter: {name: lora}"
        )
    if facts["host_memory_bytes"] > facts["host_bytes"]:
        lines.append("warning: the host has less memory than saves need; use adapter: {name: lora}, or weights: bf16")
    return "\n".join(lines)


def _origins(facts: Forecast) -> list[tuple[str, str]]:
    """The base and the sources."""
    base = facts["base"]
    pin = base["revision"] or f"{(base['digest'] or '')[:19]}…"
    rows = [("base", f"{base['checkpoint']}  {pin}")]
    for part, sources in (("train", facts["train"]), ("holdout", facts["holdout"])):
        for one in sources:
            content = one["revision"] or f"{one['fingerprint'][:19]}…"
            rows.append((part, f"{one['name']}  {counted(one['rows'], 'row')}  {content}"))
            rows += [("", one["read"])] if one["read"] else []
    return rows


def _publish_rows(facts: Forecast) -> list[tuple[str, str]]:
    target = facts["publish"]
    return [("publish", f"{target['repo']}, {'private' if target['private'] else 'public'}")] if target else []


def _mirror(facts: MirrorFacts) -> str:
    sent = f"{readable(facts['commit_bytes'])} a commit"
    return f"{facts['to']}: {sent}; copies {facts['every']}; keeps {', '.join(facts['keep'])}"


def _strategy(facts: Forecast) -> str:
    """How devices share the work: those of this launcher, or those of any other."""
    ranks, taken, asked = facts["world_size"], facts["strategy"], facts["asked_strategy"]
    if ranks > 1:
        return f"{taken}: {TAKEN[taken].format(ranks)}"
    return f"one device holds the whole model; on several {ON_SEVERAL[asked]}"


def _active_rows(facts: Forecast) -> list[tuple[str, str]]:
    """Which parameters decide speed and activations; nothing for a base without experts."""
    if facts["active_parameters"] == facts["total_parameters"]:
        return []
    total, active = facts["total_parameters"], facts["active_parameters"]
    return [("", f"{active:,} are used by a token: they decide its time and activations, all {total:,} the weights")]


def _mixture_rows(facts: Forecast) -> list[tuple[str, str]]:
    """How much of each source is drawn; nothing for a single source in the usual order."""
    first, *others = facts["mixture"]
    if not others and facts["order"] == "shuffled" and first["examples_per_epoch"] == first["examples"]:
        return []
    rows = [
        f"{one['name']}  {counted(one['examples_per_epoch'], 'example')} an epoch, "
        f"{one['epochs']:.3g} epochs of it in all, {one['token_share']:.1%} of the tokens"
        for one in facts["mixture"]
    ]
    return [("order", facts["order"]), *(("", row) for row in rows)]


def _rate(facts: RateFacts) -> str:
    """The course of the learning rate."""
    warmup = f" after {counted(facts['warmup_steps'], 'step')} of warm-up" if facts["warmup_steps"] else ""
    return f"{facts['peak']:g}{warmup}, then {facts['schedule']}; {facts['last']:.3g} in the last step"


def _host_rows(facts: Forecast) -> list[tuple[str, str]]:
    """The memory of the host beside a GPU."""
    if not facts["host_memory"]:
        return []
    found = f"about {readable(facts['host_memory_bytes'])}; there are {readable(facts['host_bytes'])}"
    return [("host", found), *(("", f"{readable(size):>10}  {name}") for name, size in facts["host_memory"].items())]


def devices_table(facts: WithDevices) -> str:
    """The forecast for GPUs, for a reader."""
    card = readable(facts["device_memory_bytes"])
    lines = [f"devices    memory a device at {facts['micro_batch_tokens']:,} tokens a micro-batch, of {card} each"]
    lines.append(f"{'':11}{'replicated':>11}{'':8}{'sharded':>11}{'':8}fits")
    for row in facts["devices"]:
        pairs = (
            (row["replicated_bytes"], row["replicated_fits"]),
            (row["sharded_bytes"], row["sharded_fits"]),
        )
        cells = [f"{_size(size):>11}  {'fits' if fits else '-':6}" for size, fits in pairs]
        lines.append(f"{row['devices']:>7}    {''.join(cells)}{_fitting(row)}")
    return "\n".join(lines)


def _size(size: int | None) -> str:
    return "-" if size is None else readable(size)


def _fitting(row: OfDevices) -> str:
    """The strategy and the micro-batch that the recipe takes on some devices."""
    tokens = row["micro_batch_tokens"]
    alone = "" if row["devices"] == 1 else f"{row['strategy']}, "
    return "not a row" if tokens is None else f"{alone}{tokens:,} tokens"
