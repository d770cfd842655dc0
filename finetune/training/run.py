"""The usual consumer of the loop: iterates it, evaluates, commits, and stops on request.

All ranks must evaluate, save and stop together: each is a function of the step, or they agree on it first.
"""

import secrets
import signal
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from datetime import date
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from finetune.errors import FinetuneError, NotFiniteError, RunError, Stopped
from finetune.hosts.signals import Signals
from finetune.model import base
from finetune.plan import cadence
from finetune.plan.pace import FORECAST_AFTER_STEPS, ahead, tokens_of
from finetune.plan.retention import Saved
from finetune.recipe.load import LoadedRecipe
from finetune.store import places
from finetune.store.checkpoints import best
from finetune.store.checkpoints.manifest import MANIFEST
from finetune.store.checkpoints.store import Store
from finetune.store.run import lease
from finetune.training import attempt, collectives, gradients, loop, mirroring, pins
from finetune.training.agreement import with_what_fits_all
from finetune.training.build import build
from finetune.training.early_stopping import Patience
from finetune.training.evaluated_step import evaluate_step
from finetune.training.evaluation import batches
from finetune.training.progress import Progress
from finetune.training.readiness import refuse_unready, refuse_varied_lengths
from finetune.training.recorder import Recorder
from finetune.training.resolve import Resolved
from finetune.training.respond import SpikeError, judge_of, respond
from finetune.training.resume import Opened, open_plan
from finetune.training.saving import reading
from finetune.training.starving import Loads
from finetune.training.state import TrainState
from finetune.training.strategy.start import start_accelerator
from finetune.training.trackers import refuse_absent
from finetune.training.watch import Watch


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
    """Starts the run at `path`, or resumes it. Returns when it is finished, or step `until` is committed.

    `schedule` continues the learning rate of an extended run; `take_over` takes a lease without a heartbeat; `ask` may refuse the
    resolved recipe before a new run writes anything. Raises Stopped after a signal, once the last finished step is committed.
    """
    if (path / MANIFEST).exists():
        hint = "name it as base.checkpoint of a recipe, and use another --run"
        raise RunError("is a checkpoint, not a run: nothing resumes from it", where=str(path), hint=hint)
    refuse_absent(loaded.recipe.track, loaded.problem)
    mirroring.refuse_absent(loaded.recipe.mirror, loaded.problem)
    with Signals() as signals:
        # Before the lease: a process must know its rank first, because rank 0 alone takes the lease.
        accelerator = start_accelerator(loaded.recipe.train)
        is_writer = accelerator.is_main_process
        holding = lease.acquire(path, secrets.token_hex(4), take_over) if is_writer else nullcontext()
        with Watch(accelerator, path, loaded.recipe) as watch, holding as held:
            opened, base_directory = _open(loaded, path, accelerator, schedule, ask)
            plan = opened.resolved.plan
            progress = Progress(plan.steps, is_quiet, is_silent=not is_writer)
            signals.say = progress.say
            refuse_varied_lengths(opened.resolved)
            # Only before the first commit: a run with one has shown that base, machine and disk fit.
            if not Store(path).checkpoints():
                refuse_unready(opened.resolved, path)
            for change in opened.changes:
                progress.say(change)
            resolved = opened.resolved
            state = build(plan, base_directory, accelerator, resolved.strategy, resolved.kernels)
            for note in dict.fromkeys([*resolved.notes, *state.notes]):
                progress.say(note)
            # After `build`: a damaged file of frozen weights is restored from the weights of this model.
            recorder, checkpoint = attempt.begin(path, opened, loaded.text, state, progress, held)
            with closing(recorder), closing(progress), watch.until_it_raises(recorder.reports):
                if checkpoint:
                    reading.read(state, plan, checkpoint)
                    progress.say(f"resumed from step {state.step}")
                elif opened.resolved.stand_in:  # The checkpoint that stood in for the base is gone as well.
                    base.directory(plan.recipe.base, plan.base)
                # Until here a signal ends the process at once: there was nothing to save.
                signals.is_training = True
                is_done = execute(opened.resolved, state, recorder, signals, until)
    if not is_done:
        # Out of the `with`: the last commit is durable and the lease is free before the process ends.
        raise Stopped(signals.received or signal.SIGTERM)  # Another rank's signal stops this one too.


def _open(
    loaded: LoadedRecipe,
    path: Path,
    accelerator: Accelerator,
    schedule: str | None,
    ask: Callable[[Resolved], None] | None,
) -> tuple[Opened, Path]:
    """The run's plan on every rank, and the directory of its base. Rank 0 goes first: it downloads and encodes for the others."""
    is_writer = accelerator.is_main_process
    # Ranks may start on both sides of midnight, and a template may print the day.
    today = date.fromordinal(collectives.of_rank_0(accelerator, date.today().toordinal()))
    with collectives.rank_0_first(accelerator):
        if is_writer:
            mirroring.restore(loaded, path, places.say)
        opened = open_plan(loaded, path, accelerator, schedule, today)
        resolved = opened.resolved
        # Rank 0 asks for all. A run that has commits was asked when it began.
        if ask and is_writer and not Store(path).checkpoints():
            ask(resolved)
        base_directory = resolved.stand_in or base.directory(
            resolved.plan.recipe.base, resolved.plan.base, as_trained=True
        )
        if is_writer and not resolved.stand_in:
            begun = resolved.plan.recipe.base, resolved.plan.base, opened.facts["run"]
            opened.changes.extend(pins.pin_base(*begun, base_directory))
    # A collective, so it cannot be inside `rank_0_first`, where ranks run one after the other.
    return with_what_fits_all(opened, accelerator), base_directory


def execute(resolved: Resolved, state: TrainState, recorder: Recorder, signals: Signals, until: int | None) -> bool:
    """Iterates, records, evaluates and commits from the state's step to the plan's end, to step `until`, or to a signal.

    Returns whether it reached the end, with the last step evaluated if that is due.
    """
    plan = resolved.plan
    end = min(plan.steps, until or plan.steps)
    wishes = partial(_wishes, signals, recorder)
    evaluate = partial(evaluate_step, resolved, state, recorder, wishes)
    pace = recorder.progress.pace = ahead(plan, state.step, end)
    patience = Patience(plan, recorder)
    # At the start, or where a signal cut it short.
    if cadence.is_evaluated(plan, state.step, is_saved=state.step > 0) and not recorder.is_evaluated(state.step):
        patience.add(state.step, evaluate(is_foreseen=True))
    if is_over := patience.is_over(state):
        end = state.step
    first, made, loads = state.step + 1, batches(resolved, resolved.train, state.accelerator), Loads()
    try:
        for report in loop.steps(state, plan, made, end, wishes, judge_of(plan, recorder)):
            if report.verdict:
                respond(resolved, state, recorder, report)
            if not report.is_finished:  # it was rolled back
                pace = recorder.progress.pace = ahead(plan, state.step, end)
                continue
            # Before the evaluation, which may take minutes: `health` sees the step, and a kill does not lose it.
            recorder.step(report)
            _warn(state, recorder, report, loads)
            if report.agreed.renew and recorder.reports:
                # At the same step on every rank: making the group waits for all of them.
                recorder.reports.renew()
            is_due = report.step == end or cadence.is_saved(plan, report.step)
            is_saved = report.agreed.save or is_due
            if cadence.is_evaluated(plan, report.step, is_saved):
                patience.add(report.step, evaluate(is_foreseen=cadence.is_evaluated(plan, report.step, is_due)))
                if is_over := patience.is_over(state):
                    break  # what follows the loop commits it
            # After the evaluation, whose figures a commit carries and may be made for.
            if is_saved or cadence.is_saved_as_best(plan, report.step, recorder.evaluations):
                # Before the commit: a signal that comes meanwhile asks for one more save.
                signals.is_save_wished = False
                with pace.aside("save", is_foreseen=is_due):
                    recorder.commit(state)
            elif report.step == first:  # Now all of the state is there: the moments too.
                recorder.warm(state)
            if pace.steps == FORECAST_AFTER_STEPS and report.step < end:
                pace.tokens = tokens_of(plan, resolved.train.lengths, report.step, end)
                recorder.event("forecast", step=report.step, **pace.forecast())
                recorder.progress.say_forecast(report.step)
    except (NotFiniteError, SpikeError):
        _commit_last(state, recorder)  # The state is the one before the step, and sound.
        raise
    _commit_last(state, recorder)
    # A signal may have stopped the last evaluation. Then the run is not done: its resume repeats it.
    is_evaluated = recorder.is_evaluated(state.step) or not cadence.is_evaluated(plan, state.step, is_saved=True)
    if is_evaluated and (is_over or state.step == plan.steps):
        _say_finished(state, recorder, first)
    return is_evaluated and (is_over or state.step >= end)


def _warn(state: TrainState, recorder: Recorder, report: loop.StepReport, loads: Loads) -> None:
    """Says which parts a step did not train, and which experts starve."""
    idle = gradients.told(state, report.without_gradient) if report.without_gradient else None
    for name, told in (("no_gradient", idle), ("starving_experts", loads.add(report.expert_tokens))):
        if told:
            recorder.progress.say(f"warning: step {report.step}: {told}")
            recorder.event(name, step=report.step, message=told)


def _wishes(signals: Signals, recorder: Recorder) -> loop.Wishes:
    return loop.Wishes(
        stop=signals.received is not None,
        save=signals.is_save_wished or recorder.is_save_due(),
        renew=recorder.reports is not None and recorder.reports.is_broken,
    )


def _say_finished(state: TrainState, recorder: Recorder, first: int) -> None:
    """Also prints warnings about `@best`. Call it after the last save."""
    if state.step >= first and recorder.is_writer:
        evaluated = recorder.evaluations
        by = recorder.plan.recipe.checkpoint.keep.chosen_by
        committed = [Saved.of(checkpoint, evaluated, by) for checkpoint in Store(recorder.path).summaries()]
        for note in best.notes(committed, evaluated, cadence.first_own_step(recorder.plan), by):
            recorder.progress.say(f"warning: {note}")
    recorder.progress.say(f"finished at step {state.step}")


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
