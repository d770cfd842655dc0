"""Finds the step at which a run went wrong, and the rows to blame.

Recorded figures are looked up; states are evaluated by halves. The bad step runs once more: if it differs from its record, the
first step that differs is the answer, and no row is to blame.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypedDict

import numpy as np

from finetune.data.batches import Batches
from finetune.debug import predicates, suspects
from finetune.debug.predicates import PredicateError
from finetune.debug.reexecute import Rerun
from finetune.debug.search import Found, NoAnswer, earliest_difference, search_record, search_states
from finetune.errors import RunError, counted
from finetune.training import incident
from finetune.training.incident import BundledRow
from finetune.training.loop import StepReport

SHOWN_ROWS = 5
OF_ROWS_ALONE = ("tokens", "supervised_tokens")  # independent of the weights


@dataclass(frozen=True)
class Culprit:
    """The cause of a bad run: a step, and the fault in it."""

    step: int
    cause: str
    """`rows`, `update`, `deviation` (not as planned) or `not reproduced`."""
    note: str = ""
    report: StepReport | None = None
    """Of the repeated step; None if its rows are not to blame."""
    shares: dict[int, float] | None = None
    """Share of the blame of each example."""


class RowShare(TypedDict):
    id: int
    share: float


class Bisection(TypedDict):
    """What `bisect --json` prints. `first_bad_step` is None where there is none."""

    first_bad_step: int | None
    last_good_step: int | None
    rows: list[RowShare]
    evaluations: int
    bundle: str | None
    observed_step: int | None
    predicate: str
    cause: str | None
    notes: list[str]


def bisect(
    run: Path,
    bad_if: str | None = None,
    *,
    bad_evaluation: str | None = None,
    bad_command: str | None = None,
    good: int | None = None,
    bad: int | None = None,
) -> Bisection:
    """The object of `bisect --json`; `first_bad_step` is None if there is none. Give one of the three predicates; without one,
    the step `bad` is explained."""
    given = [each for each in (bad_if, bad_evaluation, bad_command) if each is not None]
    if len(given) > 1 or not (given or bad):
        raise PredicateError(
            "give one of --bad, --bad-evaluation and --bad-command", hint="see `finetune bisect --help`"
        )
    comparison = predicates.parse(given[0]) if given and bad_command is None else None
    text = f"{comparison}" if comparison else bad_command or f"step {bad} is bad"
    if good is not None and bad is not None and good >= bad:
        raise PredicateError(f"the good step {good} is not before the bad step {bad}")
    rerun = Rerun(run)
    for note in rerun.notes():
        rerun.say(note)
    try:
        if bad is not None and not given:
            if bad not in rerun.refused and bad not in rerun.steps:
                raise PredicateError(f"step {bad} was not recorded", where=str(run))
            found = Found(bad, bad - 1)
        elif comparison and bad_if:
            found = search_record(rerun, comparison, good, bad)
        else:
            found = search_states(rerun, comparison or given[0], good, bad)
    except NoAnswer as answer:
        return _no_answer(text, answer)
    recorded = comparison.quantity if comparison and bad_if else None
    culprit = _culprit(rerun, found, recorded if given else "loss")
    return _bundled(rerun, found, text, culprit)


def _no_answer(predicate: str, answer: NoAnswer) -> Bisection:
    return {
        "first_bad_step": None,
        "last_good_step": None,
        "rows": [],
        "bundle": None,
        "evaluations": answer.evaluations,
        "observed_step": None,
        "predicate": predicate,
        "cause": None,
        "notes": [str(answer)],
    }


def _culprit(rerun: Rerun, found: Found, quantity: str | None) -> Culprit:
    """Runs the step once more, compares it with its record, and finds the rows to blame. `quantity` is the bad recorded one;
    None if the state after the step is bad."""
    step, cause = found.first_bad, "rows" if quantity else "update"
    if deviation := _deviation(rerun, step):
        return deviation
    rerun.go_to(step - 1, rerun.say, is_to_run=True)
    if not rerun.first_difference and quantity and quantity not in OF_ROWS_ALONE:
        step, cause = _blamed(rerun, step)
        rerun.go_to(step - 1, rerun.say, is_to_run=True)
    shares: dict[int, float] = {}
    if not rerun.first_difference and cause == "update":
        shares = suspects.gradient_shares(rerun.state, rerun.plan, rerun.batches_of(step), step)
    report = None if rerun.first_difference else rerun.attempt()
    if report is None or rerun.first_difference:
        difference, probes = earliest_difference(rerun)
        found.evaluations += probes
        note = f"run again, {difference}: what happened is not in the recipe or its rows (hardware, an edited file, other code)"
        return Culprit(difference.step, "not reproduced", note)
    return Culprit(step, cause, "", report, shares or suspects.shares_of(quantity or "loss", report))


def _bundled(rerun: Rerun, found: Found, predicate: str, culprit: Culprit) -> Bisection:
    """The answer, with a bundle of the bad step; if no rows are to blame, the step runs as planned."""
    step, report, shares = culprit.step, culprit.report, culprit.shares
    notes = [*found.notes, *([culprit.note] if culprit.note else [])]
    if report is None:
        rerun.first_difference = None
        rerun.go_to(step - 1)
        report = rerun.attempt()
        shares = _other_rows(rerun, report)
    rows = incident.rows_of(rerun.resolved, report)
    if shares:
        shared: list[BundledRow] = [{"row": row["row"], "share": shares[row["example"]], **row} for row in rows]
        rows = sorted(shared, key=lambda row: -row["share"])
    folder = None
    if rerun.accelerator.is_main_process:
        about = {"predicate": predicate, "observed_step": found.first_bad, "cause": culprit.cause, "notes": notes}
        try:
            folder = str(incident.write(rerun.run, rerun.resolved, report, about, rows))
        except RunError as error:  # the answer holds without a bundle
            notes.append(f"no bundle, as the run cannot be written: {error.where}: {error.message}")
    return {
        "first_bad_step": step,
        "last_good_step": step - 1,
        "rows": [{"id": row["row"], "share": row["share"]} for row in rows] if shares else [],
        "evaluations": found.evaluations,
        "bundle": folder,
        "observed_step": found.first_bad,
        "predicate": predicate,
        "cause": culprit.cause,
        "notes": notes,
    }


def _other_rows(rerun: Rerun, report: StepReport) -> dict[int, float] | None:
    """The examples whose loss differs from the record, if they are few rows of the step."""
    recorded = {item.example: item.loss for item in rerun.columns.rows(report.step)}
    losses = dict(zip(report.examples.tolist(), report.row_losses, strict=True))
    apart = {example: abs(loss - recorded.get(example, loss)) for example, loss in losses.items()}
    changed = {example for example, distance in apart.items() if distance != 0}
    if not 0 < 2 * len(changed) <= len(losses) or not np.isfinite(list(apart.values())).all():
        return None
    return {example: distance / sum(apart.values()) for example, distance in apart.items()}


def _blamed(rerun: Rerun, step: int) -> tuple[int, str]:
    """Whether the rows of a step are bad, or the weights they met: then the previous update is to blame.

    Runs the same rows with the weights before that update. `rerun` is at the state before the step.
    """
    first = rerun.plan.parent.step if rerun.plan.parent else 0
    if step - 2 < first or step - 1 not in rerun.steps or "skipped" in rerun.steps[step - 1]:
        return step, "rows"
    ids, tokens = rerun.plan.examples_of(step), rerun.batches_of(step)
    now = _mean_loss(rerun, tokens, ids)
    rerun.go_to(step - 2)
    before = _mean_loss(rerun, tokens, ids)
    usual = _usual_loss(rerun, step)
    if not np.isfinite(now) and np.isfinite(before):
        return step - 1, "update"
    # the weights are to blame if they account for more than half of the excess over the usual, both now and in the record: if the
    # step is less bad when it runs again, they did not cause it
    recorded = float((rerun.steps.get(step) or rerun.refused[step])["loss"])
    is_theirs = now - before > (now - usual) / 2 > 0 and now - before > (recorded - usual) / 2
    return (step - 1, "update") if is_theirs else (step, "rows")


def _mean_loss(rerun: Rerun, batches: Batches, ids: np.ndarray) -> float:
    losses, weights = np.asarray(suspects.row_losses(rerun.state, batches, ids)), batches.examples.targets[ids]
    return float((losses * weights).sum() / weights.sum())


def _usual_loss(rerun: Rerun, step: int) -> float:
    earlier = range(max(1, step - 16), step - 1)
    before = [float(rerun.history[each]["loss"]) for each in earlier if each in rerun.history]
    return median(before) if before else 0.0


def _deviation(rerun: Rerun, until: int) -> Culprit | None:
    """The first step whose record differs from the figures of the plan, found without running anything."""
    examples, plan = rerun.resolved.train, rerun.plan
    for step in sorted(each for each in rerun.steps if each <= until):
        ids, record = plan.examples_of(step), rerun.steps[step]
        planned = {
            "learning_rate": plan.learning_rate(step),
            "tokens": int(examples.lengths[ids].sum()),
            "supervised_tokens": int(examples.targets[ids].sum()),
        }
        for name, value in planned.items():
            if record.get(name) != value:
                note = f"step {step} was recorded with {name} {record.get(name)!r}; the plan has {value!r}"
                return Culprit(step, "deviation", note)
    return None


def listing(facts: Bisection) -> str:
    """The same as lines of text."""
    lines = [f"note: {note}" for note in facts["notes"]]
    if facts["first_bad_step"] is None:
        return "\n".join([f"no step is the first bad one ({facts['predicate']})", *lines])
    step = facts["first_bad_step"]
    why = {
        "rows": "its rows",
        "update": "its update",
        "deviation": "not as planned",
        "not reproduced": "not reproduced by its rows",
    }
    head = f"first bad step: {step} ({why[facts['cause'] or 'rows']}); last good step: {facts['last_good_step']}"
    if facts["observed_step"] != step:
        head += f"; seen at step {facts['observed_step']}"
    rows = [f"  row {row['id']}: {row['share']:.1%}" for row in facts["rows"][:SHOWN_ROWS]]
    ends = [
        f"{counted(facts['evaluations'], 'state')} evaluated",
        *([f"bundle: {facts['bundle']}"] if facts["bundle"] else []),
    ]
    return "\n".join([head, *rows, *lines, *ends])
