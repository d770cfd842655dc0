"""The everyday consumer of the loop: iterates it, evaluates, commits, and stops when asked.

`cli` calls `train`; `execute` is what happens between an opened state and the last commit. What all ranks do (evaluate,
save, stop) is a function of the step, or was agreed by all of them.
"""

import math
import secrets
import signal
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import date
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from finetune.data import pack
from finetune.data.batches import Batches, Examples
from finetune.errors import CheckpointError, FinetuneError, NotFiniteError, RunError, Stopped
from finetune.hosts.signals import Signals
from finetune.model import base
from finetune.plan import cadence
from finetune.plan.pace import FORECAST_AFTER_STEPS, ahead, tokens_of
from finetune.plan.plan import Plan
from finetune.plan.retention import Saved
from finetune.recipe.load import LoadedRecipe
from finetune.store.checkpoints import best
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.store import Store
from finetune.store.checkpoints.verify import verify
from finetune.store.run import holder, lease
from finetune.store.run.directory import RunDirectory
from finetune.tasks import TASKS
from finetune.training import blame, collectives, guard, incident, loop, pins
from finetune.training.build import build, start_accelerator
from finetune.training.progress import Progress
from finetune.training.readiness import refuse_unready
from finetune.training.recorder import Recorder
from finetune.training.resolve import Resolved
from finetune.training.resume import open_plan, with_same_micro_batches
from finetune.training.saving import snapshot
from finetune.training.saving.rank_reports import Reports
from finetune.training.state import TrainState


def train(
    loaded: LoadedRecipe,
    path: Path,
    *,
    is_quiet: bool = False,
    until: int | None = None,
    schedule: str | None = None,
    take_over: bool = False,
    ask: Callable[[Resolved], None] | None = None,
) -> None:
    """Starts the run at `path`, or resumes it, and returns when it is finished, or step `until` is committed.

    `schedule` is how the learning rate of a run that is extended goes on; `take_over` takes a lease whose heartbeat has stopped; `ask` may
    refuse what was resolved, before a new run writes anything. Raises Stopped after a signal, when the last finished step is committed.
    """
    with Signals() as signals:
        accelerator = start_accelerator(loaded.recipe.train)
        is_writer = accelerator.is_main_process
        today = date.fromordinal(collectives.of_rank_0(accelerator, date.today().toordinal()))
        holding = lease.acquire(path, secrets.token_hex(4), take_over) if is_writer else nullcontext()
        with holding as held:
            with collectives.rank_0_first(accelerator):
                resolved, facts, changes = open_plan(loaded, path, accelerator, schedule, today)
                if ask and is_writer and not Store(path).checkpoints():
                    ask(resolved)
                base_directory = resolved.stand_in or base.directory(resolved.plan.recipe.base, resolved.plan.base)
                if is_writer and not resolved.stand_in:
                    begun = resolved.plan.recipe.base, resolved.plan.base, facts["run"]
                    changes += pins.pin_base(*begun, base_directory)
            resolved, facts = with_same_micro_batches(resolved, facts, accelerator)
            plan = resolved.plan
            progress = Progress(plan.steps, is_quiet, is_silent=not is_writer)
            signals.say = progress.say
            if not Store(path).checkpoints():
                refuse_unready(resolved, path)
            for change in changes:
                progress.say(change)
            state = build(plan, base_directory, accelerator)
            for note in dict.fromkeys([*resolved.notes, *state.notes]):
                progress.say(note)
            recorder = Recorder(path, plan, facts, progress, held)
            try:
                newest = recorder.open(loaded.text, resolved.companions, state, changes) if is_writer else None
                checkpoint = _same_checkpoint(newest, path, accelerator)
                if checkpoint is None and resolved.stand_in:  # what stood in for the base is gone as well
                    base.directory(plan.recipe.base, plan.base)
                if checkpoint:
                    snapshot.read(state, plan, checkpoint)
                    progress.say(f"resumed from step {state.step}")
                if not is_writer:
                    recorder.recall(checkpoint)
                if accelerator.num_processes > 1:
                    recorder.reports = Reports(accelerator.process_index, accelerator.num_processes)
                signals.is_training = True
                is_done = execute(resolved, state, recorder, signals, until)
            finally:
                progress.close()
                recorder.close()
    if not is_done:
        raise Stopped(signals.received or signal.SIGTERM)  # another rank's signal stops this one too


def execute(resolved: Resolved, state: TrainState, recorder: Recorder, signals: Signals, until: int | None) -> bool:
    """From the state's step to the plan's end, to step `until`, or to a signal: iterate, record, evaluate, commit.

    Returns whether all of that is done, and the last step evaluated if it has to be.
    """
    plan = resolved.plan
    end = min(plan.steps, until or plan.steps)
    wishes, judge = partial(_wishes, signals, recorder), partial(_judge, plan, recorder)
    pace = recorder.progress.pace = ahead(plan, state.step, end)

    def evaluate_and_record(is_foreseen: bool) -> None:
        tell = recorder.progress.evaluation(state.step, len(resolved.holdout))
        with pace.aside("evaluation", is_foreseen):
            metrics = evaluate(resolved, state.accelerator, state.objective, wishes, tell)
        if metrics:
            recorder.evaluated(state.step, metrics)
            is_suspicious = state.step == 0 and not math.isfinite(metrics["loss"])
            if is_suspicious and (error := blame.broken(state)):
                raise error

    if cadence.is_evaluated(plan, state.step, is_saved=state.step > 0) and not recorder.is_evaluated(state.step):
        evaluate_and_record(is_foreseen=True)  # at the start, or where a signal cut it short
    first, made = state.step + 1, batches(resolved, resolved.train, state.accelerator)
    try:
        for report in loop.steps(state, plan, made, end, wishes, judge):
            if report.verdict:
                respond(resolved, state, recorder, report)
            if not report.is_finished:  # it was rolled back
                pace = recorder.progress.pace = ahead(plan, state.step, end)
                continue
            recorder.step(report)
            if report.agreed.renew:
                recorder.reports.renew()
            is_due = report.step == end or cadence.is_saved(plan, report.step)
            is_saved = report.agreed.save or is_due
            if cadence.is_evaluated(plan, report.step, is_saved):
                evaluate_and_record(is_foreseen=cadence.is_evaluated(plan, report.step, is_due))
            if is_saved or cadence.is_saved_as_best(plan, report.step, recorder.evaluations):
                signals.is_save_wished = False
                with pace.aside("save", is_foreseen=is_due):
                    recorder.commit(state)
            elif report.step == first:
                recorder.warm(state)
            if pace.steps == FORECAST_AFTER_STEPS and report.step < end:
                pace.tokens = tokens_of(plan, resolved.train.lengths, report.step, end)
                recorder.event("forecast", step=report.step, **pace.forecast())
                recorder.progress.say_forecast(report.step)
    except (NotFiniteError, SpikeError):
        _commit_last(state, recorder)
        raise
    _commit_last(state, recorder)
    is_evaluated = recorder.is_evaluated(state.step) or not cadence.is_evaluated(plan, state.step, is_saved=True)
    if is_evaluated and state.step == plan.steps:
        if state.step >= first and recorder.is_writer:
            _warn_about_best(recorder)
        recorder.progress.say(f"finished at step {state.step}")
    return is_evaluated and state.step >= end


def _wishes(signals: Signals, recorder: Recorder) -> loop.Wishes:
    return loop.Wishes(
        stop=signals.received is not None,
        save=signals.is_save_wished or recorder.is_save_due(),
        renew=recorder.reports is not None and recorder.reports.is_broken,
    )


def _judge(plan: Plan, recorder: Recorder, step: int, figures: dict[str, float]) -> guard.Verdict | None:
    if plan.is_left_out(step):
        return guard.without_rows(step)
    return guard.judge(plan.recipe.guard, step, figures, recorder.window, recorder.amendments)


def _warn_about_best(recorder: Recorder) -> None:
    """What to know before `@best` is used, when all saves have ended."""
    evaluated = recorder.evaluations
    committed = [Saved.of(checkpoint, evaluated) for checkpoint in Store(recorder.path).summaries()]
    for note in best.notes(committed, evaluated, cadence.first_own_step(recorder.plan)):
        recorder.progress.say(f"warning: {note}")


def _commit_last(state: TrainState, recorder: Recorder) -> None:
    if state.step > recorder.last_step:
        recorder.commit(state)
    try:
        recorder.finish(state)
    except FinetuneError:
        with suppress(RuntimeError):  # another rank is gone as well
            collectives.wait_for_everyone(state.accelerator)
        raise
    collectives.wait_for_everyone(state.accelerator)  # a launcher ends the others as soon as one rank has ended


def _same_checkpoint(newest: Checkpoint | None, path: Path, accelerator: Accelerator) -> Checkpoint | None:
    """The checkpoint that rank 0 found, on every rank. Hosts that do not share the run directory, or read other bytes, are refused."""
    if accelerator.num_processes == 1:
        return newest
    step = collectives.of_rank_0(accelerator, newest.step if newest else 0)
    mine, held = newest, holder.read(RunDirectory(path).lease)
    seen = int(held.token[:15], 16) if held else 0  # only the directory that rank 0 holds has this one
    with suppress(CheckpointError):  # the ranks must not part here: what was not seen is told below
        if step and not accelerator.is_main_process:
            mine = Store(path).find(step)
        if mine and (mine is newest or not verify(mine.path)):
            seen ^= int(mine.manifest.digest.rpartition(":")[2][:15], 16)
    collectives.wait_for_everyone(accelerator)
    digests = accelerator.gather(torch.tensor([seen], device=accelerator.device)).tolist()
    if len(set(digests)) > 1:
        others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        raise RunError(
            f"ranks {others} do not see {f'the checkpoint of step {step}' if step else 'the run'} as rank 0 does",
            where=str(path),
            hint="give all hosts one run directory on a shared disk",
        )
    return mine


def respond(resolved: Resolved, state: TrainState, recorder: Recorder, report: loop.StepReport) -> None:
    """Does what the guard decided about a step; on every rank, which all decided the same.

    Raises NotFiniteError or SpikeError where the run has to end; the state is then the one before the step.
    """
    verdict = report.verdict
    if verdict.is_amended:
        return
    if verdict.action == "warn":
        recorder.spike(report)
        return
    if verdict.reason == "not_finite" and (error := blame.broken(state)):
        recorder.refused(report)
        raise error
    amendment = guard.amendment(resolved.plan.recipe.guard, report.step, verdict)
    if verdict.action == "skip":
        recorder.amend(amendment, report)
    is_over = verdict.action == "stop"
    is_over = is_over or (
        verdict.action == "rollback" and not _roll_back(resolved.plan, state, recorder, amendment, report)
    )
    if is_over:
        recorder.refused(report)
    if recorder.is_writer:
        about = {"reason": verdict.reason, "message": blame.refusal(report), "action": verdict.action}
        try:
            incident.write(recorder.path, resolved, report, about)
        except RunError as error:  # a full disk: what was decided holds without it
            recorder.progress.say(f"no bundle of step {report.step}: {error.message}")
    if is_over:
        error = NotFiniteError if verdict.reason == "not_finite" else SpikeError
        hint = f"look at those rows: `finetune replay {recorder.path} --steps {report.step} --inspect`"
        raise error(blame.refusal(report), where=f"step {report.step}", hint=hint)


def _roll_back(
    plan: Plan, state: TrainState, recorder: Recorder, amendment: guard.Amendment, report: loop.StepReport
) -> bool:
    """Moves the state to the newest checkpoint before an amendment; False where there is none."""
    state.await_snapshot()
    checkpoint = _same_checkpoint(recorder.before(amendment), recorder.path, state.accelerator)
    if checkpoint is None:
        return False
    recorder.roll_back(amendment, report, checkpoint)
    collectives.wait_for_everyone(state.accelerator)  # the others read what rank 0 has written of it
    snapshot.read(state, plan, checkpoint)
    recorder.recall(checkpoint)
    return True


class SpikeError(FinetuneError):
    code = "spike"


def batches(resolved: Resolved, examples: Examples, accelerator: Accelerator) -> Batches:
    """The micro-batches of this rank, arranged and collated as the plan says."""
    plan = resolved.plan
    task = TASKS[plan.recipe.task.name]
    return Batches(
        examples,
        arrange=pack.ARRANGEMENTS[plan.arrangement],
        collate=task.collate_packed if plan.arrangement == "packed" else task.collate_padded,
        budget=resolved.micro_batch_tokens,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def evaluate(
    resolved: Resolved,
    accelerator: Accelerator,
    objective: torch.nn.Module,
    wishes: Callable[[], loop.Wishes] = loop.Wishes,
    tell: Callable[[int], None] | None = None,
) -> dict | None:
    """Held-out figures of a prepared objective; None when a signal cut them short. `tell` hears about how many examples are done."""
    score, made = TASKS[resolved.plan.recipe.task.name].score, batches(resolved, resolved.holdout, accelerator)
    return loop.evaluate(accelerator, objective, made, score, wishes, tell=tell)
