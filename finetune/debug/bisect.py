"""Floor 7. The step at which a run went wrong, and the rows that did it.

A recorded figure is looked up; a state is evaluated, by halves: first the stored checkpoints, then, run again, the steps between two of
them. What is found is run once more: where it does not come out as recorded, the fault is not in the recipe or its rows, and the first step
that differs is the answer.
"""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from accelerate.utils import broadcast

from finetune import bundle, columns, journal
from finetune.checkpoints import snapshot
from finetune.checkpoints.manifest import Checkpoint, Manifest
from finetune.checkpoints.staging import Staging
from finetune.checkpoints.store import Store
from finetune.data.batches import Batches
from finetune.debug import predicates, suspects
from finetune.debug.predicates import Comparison, PredicateError
from finetune.debug.rerun import Rerun
from finetune.loop import StepReport
from finetune.run import evaluate

SHOWN_ROWS = 5
OF_ROWS_ALONE = ("tokens", "supervised_tokens")  # the weights have no part in them


@dataclass
class Found:
    first_bad: int
    """The first step that is bad."""
    last_good: int
    evaluations: int = 0
    """States that were evaluated; what the journal had is not among them."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know before he believes it."""


class NoAnswer(Exception):
    """No step is bad, or none is good; an answer as well."""

    def __init__(self, message: str, states: "States | None" = None):
        self.evaluations = states.evaluations if states else 0
        super().__init__(message)


def bisect(
    run: Path,
    bad_if: str | None = None,
    bad_evaluation: str | None = None,
    bad_command: str | None = None,
    good: int | None = None,
    bad: int | None = None,
) -> dict:
    """What `bisect --json` prints; `first_bad_step` is None where there is none. One of the three predicates is given; without one,
    the step `bad` is what is to be explained."""
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
        if not given:
            if bad not in rerun.steps:
                raise PredicateError(f"step {bad} was not recorded", where=str(run))
            found = Found(bad, bad - 1)
        elif bad_if:
            found = search_record(rerun, comparison, good, bad)
        else:
            found = search_states(rerun, comparison or bad_command, good, bad)
    except NoAnswer as answer:
        facts = {"first_bad_step": None, "last_good_step": None, "rows": [], "bundle": None}
        facts["evaluations"] = answer.evaluations
        return facts | {"observed_step": None, "predicate": text, "cause": None, "notes": [str(answer)]}
    return _explained(rerun, found, text, comparison.quantity if bad_if else None if given else "loss")


def search_record(rerun: Rerun, comparison: Comparison, good: int | None, bad: int | None) -> Found:
    """The first bad step after a good one. Nothing is evaluated: the journal has every step."""
    values = predicates.recorded(rerun.run, rerun.refused | rerun.steps, comparison)
    steps = [step for step in sorted(values) if (good is None or step > good) and (bad is None or step <= bad)]
    is_bad = {step: comparison.holds(values[step]) for step in steps}
    if not any(is_bad.values()):
        raise NoAnswer(f"never bad: no recorded step has {comparison}")
    first_good = good if good is not None else next((step for step in steps if not is_bad[step]), None)
    if first_good is None:
        raise NoAnswer(f"never good: every recorded step has {comparison}")
    found = next((step for step in steps if step > first_good and is_bad[step]), None)
    if found is None:
        raise NoAnswer(
            f"bad until step {first_good - 1} and good from step {first_good} on: it never went from good to bad"
        )
    notes = []
    if before := [step for step in steps if step < first_good and is_bad[step]]:
        notes.append(f"bad as well until step {before[-1]}, before it was good for the first time")
    after = [step for step in steps if step > found]
    if recovered := [step for step in after if not is_bad[step]]:
        notes.append(
            f"not for good: {len(recovered)} of the {len(after)} steps after it are good again, from step {recovered[0]} on"
        )
    notes += [
        f"nothing is recorded of step {step}" for step in range(first_good, found) if step not in values and step
    ][:3]
    return Found(found, found - 1, notes=notes)


class States:
    """Evaluates states of a run, stored ones and those between; what it writes goes with it."""

    def __init__(self, rerun: Rerun, predicate: Comparison | str):
        self.rerun = rerun
        self.evaluations = 0
        self._predicate = predicate
        self._scratch: Path | None = None
        self._staging = Staging()

    def is_bad(self, step: int, checkpoint: Checkpoint | None) -> bool | None:
        """Whether the state after a step is; None where the command cannot tell. The rerun is at it, unless it is stored."""
        rerun = self.rerun
        if isinstance(self._predicate, Comparison):
            metrics = self._recorded(step)
            if metrics is None:
                if rerun.state is None or rerun.state.step != step:
                    rerun.begin_at(checkpoint)
                self.evaluations += 1
                metrics = evaluate(rerun.resolved, rerun.accelerator, rerun.state.objective)
            value = metrics.get(self._predicate.quantity)
            if value is None:
                names = ", ".join(metrics)
                raise PredicateError(f"an evaluation has no `{self._predicate.quantity}`", hint=f"it has {names}")
            verdict = self._predicate.holds(float(value))
            rerun.say(f"step {step}: {self._predicate.quantity} {float(value):.6g}, {'bad' if verdict else 'good'}")
            return verdict
        self.evaluations += 1
        path = checkpoint.path if checkpoint else rerun.resolved.base_directory
        code = {None: 2, True: 1, False: 0}
        answer = predicates.run_command(self._predicate, path) if rerun.accelerator.is_main_process else None
        told = broadcast(torch.tensor([code[answer]], device=rerun.accelerator.device)).item()
        verdict = {2: None, 1: True, 0: False}[told]
        rerun.say(f"step {step}: {'the command cannot tell' if verdict is None else 'bad' if verdict else 'good'}")
        return verdict

    def _recorded(self, step: int) -> dict | None:
        found = journal.evaluations(self.rerun.records).get(step)
        return found if found and self._predicate.quantity in found else None

    def write(self, previous: Checkpoint | None) -> Checkpoint:
        """The state as it is as a checkpoint, in a directory of the run's disk that goes with this object."""
        rerun = self.rerun
        if self._scratch is None:
            token = broadcast(torch.tensor([secrets.randbits(40)], device=rerun.accelerator.device)).item()
            self._scratch = rerun.run / "debug" / f"bisect-{token:010x}"
        store = Store(self._scratch)
        if rerun.accelerator.is_main_process:
            state = rerun.state
            taken = snapshot.take(state, snapshot.Live(state), rerun.plan, self._staging)
            attempt = store.begin(state.step, "bisect")
            snapshot.write(taken, rerun.plan, rerun.resolved.base_directory, previous, attempt)
            manifest = Manifest(
                run=rerun.facts["run"], attempt="bisect", step=state.step, parent=None, plan_id=rerun.plan.plan_id
            )
            store.commit(attempt, manifest)
            taken.copy.release()
        rerun.accelerator.wait_for_everyone()
        return store.find(rerun.state.step)

    def close(self) -> None:
        if self._scratch and self.rerun.accelerator.is_main_process:
            shutil.rmtree(self._scratch, ignore_errors=True)


@contextmanager
def _states(rerun: Rerun, predicate: Comparison | str) -> Iterator[States]:
    states = States(rerun, predicate)
    try:
        yield states
    finally:
        states.close()


def search_states(rerun: Rerun, predicate: Comparison | str, good: int | None, bad: int | None) -> Found:
    """By halves. The ends are evaluated unless they are given; a state that is bad is taken to stay so."""
    with _states(rerun, predicate) as states:
        stored = {item.step: item for item in rerun.store.checkpoints() if item.manifest.kind == "full"}
        first = rerun.plan.parent.step if rerun.plan.parent else 0
        last = bad if bad is not None else max(stored, default=None)
        if last is None:
            raise NoAnswer("the run has no checkpoint yet")
        low = start = good if good is not None else first
        if bad is None and not states.is_bad(last, stored[last]):
            raise NoAnswer(f"never bad: the state at step {last}, the last one that is stored, is good", states)
        low, high, unknown = _halves(sorted(step for step in stored if low < step < last), low, last, stored, states)
        # the start is evaluated last: mostly some later state is good, and it need not be
        if good is None and low == start and states.is_bad(low, stored.get(low)):
            raise NoAnswer(f"never good: the state at step {low}, where the run begins, is bad already", states)
        low, high, more = _between(rerun, states, low, high, stored)
        notes = [f"the command could not tell of steps {sorted(unknown | more)}"] if unknown | more else []
        if any(low < step < high for step in unknown | more):
            notes.append(f"so the first bad step is one of {low + 1} to {high}")
        return Found(high, low, states.evaluations, notes)


def _halves(
    steps: list[int], low: int, high: int, stored: dict[int, Checkpoint], states: States
) -> tuple[int, int, set[int]]:
    """The last good and the first bad one of the stored states, and those of which the command could not tell."""
    unknown: set[int] = set()
    while left := [step for step in steps if low < step < high and step not in unknown]:
        step = left[len(left) // 2]
        verdict = states.is_bad(step, stored[step])
        if verdict is None:
            unknown.add(step)
        elif verdict:
            high = step
        else:
            low = step
    return low, high, unknown


def _between(
    rerun: Rerun, states: States, low: int, high: int, stored: dict[int, Checkpoint]
) -> tuple[int, int, set[int]]:
    """The same inside the bracket, whose steps are run again. From a good state the next half goes on; a bad one is left for it."""
    is_to_write = high - low > 1
    rerun.go_to(low, rerun.say)
    good_one = stored.get(low) or (states.write(None) if low and is_to_write else None)
    unknown: set[int] = set()
    while left := [step for step in range(low + 1, high) if step not in unknown]:
        step = left[len(left) // 2]
        if rerun.state.step > step:
            rerun.begin_at(good_one)
        rerun.go_to_from_here(step)
        written = states.write(good_one)
        verdict = states.is_bad(step, written)
        if verdict is None:
            unknown.add(step)
        elif verdict:
            high = step
        else:
            low, good_one = step, written
    return low, high, unknown


def _explained(rerun: Rerun, found: Found, predicate: str, quantity: str | None) -> dict:
    """Runs the step once more, says whether it comes out as recorded, and who in it is to blame; writes the bundle. `quantity` is the
    recorded one that is bad; None where it is the state after the step."""
    step, cause = found.first_bad, "rows" if quantity else "update"
    if deviation := _deviation(rerun, step):
        step, note = deviation
        return _bundled(rerun, found, predicate, step, "deviation", note)
    rerun.go_to(step - 1, rerun.say)
    if not rerun.first_difference and quantity and quantity not in OF_ROWS_ALONE:
        step, cause = _blamed(rerun, step)
        rerun.go_to(step - 1, rerun.say)
    shares: dict[int, float] = {}
    if not rerun.first_difference and cause == "update":
        shares = suspects.gradient_shares(rerun.state, rerun.plan, rerun.batches_of(step), step)
    report = rerun.attempt() if not rerun.first_difference else None
    if rerun.first_difference:
        difference, probes = rerun.earliest_difference()
        found.evaluations += probes
        note = f"run again, {difference}: what happened is not in the recipe or its rows (hardware, an edited file, other code)"
        return _bundled(rerun, found, predicate, difference.step, "not reproduced", note)
    return _bundled(rerun, found, predicate, step, cause, "", report, shares or suspects.shares_of(quantity, report))


def _bundled(
    rerun: Rerun,
    found: Found,
    predicate: str,
    step: int,
    cause: str,
    note: str,
    report: StepReport | None = None,
    shares: dict[int, float] | None = None,
) -> dict:
    """The answer, with the bundle of the step to blame; where no rows are, the step is run as the plan has it."""
    notes = [*found.notes, *([note] if note else [])]
    if report is None:
        rerun.first_difference = None
        rerun.go_to(step - 1)
        report = rerun.attempt()
        shares = _other_rows(rerun, report)
    rows = bundle.rows_of(rerun.resolved, report)
    if shares:
        shared = [{"row": row["row"], "share": shares[row["example"]], **row} for row in rows]
        rows = sorted(shared, key=lambda row: -row["share"])
    folder = None
    if rerun.accelerator.is_main_process:
        about = {"predicate": predicate, "observed_step": found.first_bad, "cause": cause, "notes": notes}
        folder = str(bundle.write(rerun.run, rerun.resolved, report, about, rows))
    return {
        "first_bad_step": step,
        "last_good_step": step - 1,
        "rows": [{"id": row["row"], "share": row["share"]} for row in rows] if shares else [],
        "evaluations": found.evaluations,
        "bundle": folder,
        "observed_step": found.first_bad,
        "predicate": predicate,
        "cause": cause,
        "notes": notes,
    }


def _other_rows(rerun: Rerun, report: StepReport) -> dict[int, float] | None:
    """By example, who has another loss than was recorded, where these are few rows of the step."""
    recorded = {item.example: item.loss for item in columns.read_rows(rerun.run, report.step)}
    losses = dict(zip(report.examples.tolist(), report.row_losses, strict=True))
    apart = {example: abs(loss - recorded.get(example, loss)) for example, loss in losses.items()}
    changed = {example for example, distance in apart.items() if not distance == 0}
    if not 0 < 2 * len(changed) <= len(losses) or not np.isfinite(list(apart.values())).all():
        return None
    return {example: distance / sum(apart.values()) for example, distance in apart.items()}


def _blamed(rerun: Rerun, step: int) -> tuple[int, str]:
    """Whether the rows of a step are bad, or the weights that they met: then the update before made them so.

    The same rows are looked at with the weights before that update. RERUN is at the state before the step.
    """
    if step < 2 or step - 1 not in rerun.steps or "skipped" in rerun.steps[step - 1]:
        return step, "rows"
    ids, tokens = rerun.plan.examples_of(step), rerun.batches_of(step)
    now = _mean_loss(rerun, tokens, ids)
    rerun.go_to(step - 2)
    before = _mean_loss(rerun, tokens, ids)
    usual = _usual_loss(rerun, step)
    # the weights are to blame where they account for more than half of what is above the usual
    return (step - 1, "update") if now - before > (now - usual) / 2 > 0 else (step, "rows")


def _mean_loss(rerun: Rerun, batches: Batches, ids: np.ndarray) -> float:
    weights = batches.examples.targets[ids]
    return float((np.array(suspects.row_losses(rerun.state, batches, ids)) * weights).sum() / weights.sum())


def _usual_loss(rerun: Rerun, step: int) -> float:
    before = [float(rerun.steps[each]["loss"]) for each in range(max(1, step - 16), step - 1) if each in rerun.steps]
    return median(before) if before else 0.0


def _deviation(rerun: Rerun, until: int) -> tuple[int, str] | None:
    """The first recorded step whose figures are not those that the plan gives without running it."""
    examples, plan = rerun.resolved.train, rerun.plan
    for step in sorted(each for each in rerun.steps if each <= until):
        ids = plan.examples_of(step)
        planned = {
            "learning_rate": plan.learning_rate(step),
            "tokens": int(examples.lengths[ids].sum()),
            "supervised_tokens": int(examples.targets[ids].sum()),
        }
        for name, value in planned.items():
            if rerun.steps[step].get(name) != value:
                return (
                    step,
                    f"step {step} was recorded with {name} {rerun.steps[step].get(name)!r}; the plan has {value!r}",
                )
    return None


def listing(facts: dict) -> str:
    """The same for a reader."""
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
    head = f"first bad step: {step} ({why[facts['cause']]}); last good step: {facts['last_good_step']}"
    if facts["observed_step"] != step:
        head += f"; seen at step {facts['observed_step']}"
    rows = [f"  row {row['id']}: {row['share']:.1%}" for row in facts["rows"][:SHOWN_ROWS]]
    ends = [f"{facts['evaluations']} states evaluated", f"bundle: {facts['bundle']}"]
    return "\n".join([head, *rows, *lines, *ends])
