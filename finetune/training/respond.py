"""What follows from the guard's verdict on a step: it is recorded, taken back with those before it, or the run ends."""

from functools import partial

from finetune.errors import FinetuneError, NotFiniteError, RunError
from finetune.plan.plan import Plan
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.training import blame, collectives, guard, incident, loop
from finetune.training.agreement import same_checkpoint, verified_together
from finetune.training.recorder import Recorder
from finetune.training.resolve import Resolved
from finetune.training.saving import reading
from finetune.training.state import TrainState


class SpikeError(FinetuneError):
    code = "spike"


def judge_of(plan: Plan, recorder: Recorder) -> loop.Judge:
    """The guard, with the run's past at hand."""
    return partial(_judge, plan, recorder)


def _judge(plan: Plan, recorder: Recorder, step: int, figures: dict[str, float]) -> guard.Verdict | None:
    if plan.is_left_out(step):
        return guard.without_rows(step)
    return guard.judge(plan.recipe.guard, step, figures, recorder.window, recorder.amendments)


def respond(resolved: Resolved, state: TrainState, recorder: Recorder, report: loop.StepReport) -> None:
    """Does what the guard decided about a step, on every rank: all of them decided the same.

    Raises NotFiniteError or SpikeError if the run has to end. The state is then the one before the step.
    """
    verdict = report.verdict
    if verdict is None or verdict.is_amended:
        return
    if verdict.action == "warn":
        recorder.progress.say(f"spike at step {report.step}: {verdict.message}")
        recorder.event("spike", step=report.step, quantity=verdict.quantity, message=verdict.message)
        return
    # NaN in the weights spoils every later step too: skipping this one would not help.
    if verdict.reason == "not_finite" and (error := blame.broken(state)):
        _record_refusal(recorder, report, verdict)
        raise error
    is_over = _is_over(resolved.plan, state, recorder, report, verdict)
    if is_over:
        _record_refusal(recorder, report, verdict)
    # After the journal: if the disk is full, the decision matters more than these files.
    if recorder.is_writer:
        _write_incident(resolved, recorder, report, verdict)
    if is_over:
        kind = NotFiniteError if verdict.reason == "not_finite" else SpikeError
        hint = f"look at those rows: `finetune replay {recorder.path} --steps {report.step} --inspect`"
        raise kind(blame.refusal(report, verdict), where=f"step {report.step}", hint=hint)


def _record_refusal(recorder: Recorder, report: loop.StepReport, verdict: guard.Verdict) -> None:
    """A step that was not made, and ends the run."""
    about = {"quantity": verdict.quantity, "message": verdict.message}
    recorder.event(verdict.reason, step=report.step, **about, **report.figures)


def _is_over(
    plan: Plan, state: TrainState, recorder: Recorder, report: loop.StepReport, verdict: guard.Verdict
) -> bool:
    """Skips the step or rolls it back. True if the run has to end instead."""
    if verdict.action == "stop":
        return True
    amendment = guard.amendment(plan.recipe.guard, report.step, verdict)
    if verdict.action == "skip":
        recorder.amend(amendment, report, verdict)
        return False
    return not _roll_back(plan, state, recorder, amendment, report, verdict)


def _write_incident(resolved: Resolved, recorder: Recorder, report: loop.StepReport, verdict: guard.Verdict) -> None:
    about = {"reason": verdict.reason, "message": blame.refusal(report, verdict), "action": verdict.action}
    try:
        incident.write(recorder.path, resolved, report, about)
    except RunError as error:  # A full disk: the decision stands without the files.
        recorder.progress.say(f"no bundle of step {report.step}: {error.message}")


def _roll_back(
    plan: Plan,
    state: TrainState,
    recorder: Recorder,
    amendment: guard.Amendment,
    report: loop.StepReport,
    verdict: guard.Verdict,
) -> bool:
    """Moves the state to the newest checkpoint before an amendment; False where there is none."""
    state.await_snapshot()
    # A collective, so every rank calls it; those that write nothing pass None.
    with verified_together(recorder.path, state) as verify:
        found = recorder.before(amendment, verify)
    checkpoint = same_checkpoint(found, recorder.path, state)
    if checkpoint is None:
        return False
    recorder.roll_back(amendment, report, verdict, checkpoint)
    collectives.wait_for_everyone(state.accelerator)  # the others read what rank 0 has written of it
    go_back_to(checkpoint, plan, state, recorder)
    return True


def go_back_to(checkpoint: Checkpoint, plan: Plan, state: TrainState, recorder: Recorder) -> None:
    """State and past become those of a checkpoint, on every rank."""
    reading.read(state, plan, checkpoint)
    recorder.recall(checkpoint)
