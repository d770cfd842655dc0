"""What became of a sweep: each trial with its settings and held-out figures, the best first, and the best of all."""

import json
from collections.abc import Callable, Sequence
from typing import TypedDict

from finetune.compare.sweep.directory import Sweep, Trial
from finetune.compare.sweep.queue import State, loss_of, standing, state_of
from finetune.compare.sweep.space import short, written
from finetune.errors import FinetuneError, RunError, counted
from finetune.plan.facts import Metrics
from finetune.recipe.yaml_nodes import Plain
from finetune.store.durable import failures, replace_file
from finetune.store.strict_json import strict


class ReasonReport(TypedDict):
    code: str
    message: str


class TrialReport(TypedDict):
    ref: str
    """The step that the trial was trained to; its run before there is one."""
    settings: dict[str, Plain]
    metrics: Metrics
    state: State
    step: int
    tokens: int
    reason: ReasonReport | None
    """Why it failed."""


class SweepReport(TypedDict):
    """What `sweep --json` prints."""

    sweep: str
    method: str
    trials: list[TrialReport]
    best: str | None
    leaders: list[str]
    """The finished trials that the held-out rows cannot tell from the best; empty while trials are due."""
    steps: int
    """Planned, of all trials."""
    tokens: int
    seconds: float | None
    """The forecast of --dry-run."""


def report_of(
    sweep: Sweep, seconds: float | None = None, leaders: Callable[[Sequence[TrialReport]], list[str]] | None = None
) -> SweepReport:
    """The trials from the best to the worst: finished ones, then those that halving stopped last, then the others."""
    trials = sweep.trials()
    alive = standing(sweep.spec, trials).alive
    ordered = sorted(trials.values(), key=lambda trial: _place(trial, state_of(trial, alive)))
    rows = [_row(sweep, trial, state_of(trial, alive)) for trial in ordered]
    best = rows[0] if rows and rows[0]["state"] == "finished" else None
    return {
        "sweep": str(sweep.path),
        "method": sweep.spec.method,
        "trials": rows,
        "best": best["ref"] if best and loss_of(best["metrics"]) < float("inf") else None,
        "steps": sweep.spec.steps,
        "tokens": sweep.spec.tokens,
        "seconds": seconds,
        "leaders": leaders(rows) if leaders and all(row["state"] != "unfinished" for row in rows) else [],
    }


def _place(trial: Trial, state: State) -> tuple[int, int, float, int]:
    order = ("finished", "stopped", "unfinished", "failed").index(state)
    loss = loss_of(trial.results[trial.step]) if trial.results else 0.0
    return order, -trial.step, loss, trial.number


def _row(sweep: Sweep, trial: Trial, state: State) -> TrialReport:
    run = str(sweep.run(trial.number))
    return {
        "ref": f"{run}@{trial.step}" if trial.step else run,
        "settings": trial.settings,
        "metrics": trial.results.get(trial.step, {}),
        "state": state,
        "step": trial.step,
        "tokens": trial.tokens,
        "reason": {"code": trial.reason.code, "message": trial.reason.message} if trial.reason else None,
    }


def write(sweep: Sweep, report: SweepReport) -> None:
    """The report as `table.json` in the sweep."""
    with failures(sweep.table, RunError):
        replace_file(sweep.table, (json.dumps(strict(report), indent=1) + "\n").encode())


def refuse_failed(report: SweepReport) -> None:
    """FinetuneError if not one trial came through."""
    failed = [trial for trial in report["trials"] if trial["reason"]]
    if report["trials"] and len(failed) == len(report["trials"]):
        reason = failed[0]["reason"]
        raise FinetuneError(
            f"all {counted(len(failed), 'trial')} failed; the first: {reason['message'] if reason else ''}",
            where=report["sweep"],
            hint="read logs/ there; after a repair `--retry-failed` trains them again",
        )


def table(report: SweepReport, tried: Sequence[str]) -> str:
    """The same for a reader."""
    header = ["trial", *(short(key, tried) for key in tried), "state", "step", "held-out loss", "tokens"]
    rows = [_cells(trial, tried) for trial in report["trials"]]
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    reasons = [f"{trial['ref']}: {trial['reason']['message']}" for trial in report["trials"] if trial["reason"]]
    best = [f"best: {report['best']}"] if report["best"] else []
    if others := [ref for ref in report["leaders"] if ref != report["best"]]:
        best.append(f"not distinguishable from it on these rows: {', '.join(others)}")
    return "\n".join([*lines, *(["", *reasons] if reasons else []), *best])


def _cells(trial: TrialReport, tried: Sequence[str]) -> list[str]:
    metrics = trial["metrics"]
    loss = f"{float(metrics['loss']):.4f}" if metrics else "-"
    if "loss_stderr" in metrics:
        loss += f" ± {float(metrics['loss_stderr']):.4f}"
    settings = [written(trial["settings"][key]) for key in tried]
    return [trial["ref"], *settings, trial["state"], f"{trial['step']:,}", loss, f"{trial['tokens']:,}"]
