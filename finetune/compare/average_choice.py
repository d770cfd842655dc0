"""Which checkpoints an average is taken over, and with which weights. It opens no weights."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from finetune.errors import CheckpointError, FinetuneError, counted
from finetune.plan import averaging
from finetune.store.checkpoints.refs import find, parse, run_of
from finetune.store.checkpoints.store import Store
from finetune.store.run.directory import RunDirectory, step_name


class OptionError(FinetuneError):
    """Options that do not go together."""

    code = "usage"
    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The options of `average` that decide what comes out."""

    weights: tuple[float, ...] = ()
    """Of each ref; equal ones without this."""
    ema: float | None = None
    last: int | None = None
    like: str | None = None
    """A shape of `averaging.DECAYS`."""
    window: int | None = None
    every: int = 1
    is_stored: bool = False
    """Takes only stored steps of the window."""
    with_base: float | None = None
    is_kept_ema: bool = False
    """Takes the moving average that each run kept, in place of its weights."""
    rank: int | None = None
    is_merged: bool = False

    @property
    def words(self) -> str:
        """The options that chose members and weights, as a user gives them."""
        shown = {
            "--weights": ",".join(f"{weight:g}" for weight in self.weights),
            "--ema": self.ema,
            "--last": self.last,
            "--like": self.like,
            "--window": self.window,
            "--every": self.every if self.every > 1 else None,
            "--with-base": self.with_base,
            "--rank": self.rank,
        }
        flags = {"--stored": self.is_stored, "--kept-ema": self.is_kept_ema, "--merged": self.is_merged}
        options = (f"{name} {value}" for name, value in shown.items() if value not in (None, ""))
        return " ".join([*options, *(name for name, is_given in flags.items() if is_given)])


class Named(NamedTuple):
    ref: str
    weight: float


def chosen(refs: Sequence[str], choices: Choices) -> list[Named]:
    """The members with weights that sum to 1, the base first if it is one of them. FinetuneError for options that do not fit."""
    _refuse_others(refs, choices)
    if choices.like:
        named = _of_window(refs[0], choices.like, choices.window or 0, choices)
    else:
        named = _of_refs(_last(refs[0], choices.last) if choices.last else refs, choices)
    if choices.with_base is None:
        return named
    run = run_of(parse(refs[0]))
    if run is None:
        hint = "name the base as a REF, and give --weights"
        raise FinetuneError("is not part of a run, so its base is unknown", where=refs[0], hint=hint)
    return [
        Named(f"{run}@0", 1 - choices.with_base),
        *(each._replace(weight=each.weight * choices.with_base) for each in named),
    ]


def _refuse_others(refs: Sequence[str], choices: Choices) -> None:
    ways = {"--weights": choices.weights, "--ema": choices.ema, "--last": choices.last, "--like": choices.like}
    given = [name for name, value in ways.items() if value]
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)} choose weights in different ways", hint="give one of them")
    if (choices.last or choices.like) and len(refs) > 1:
        raise OptionError(f"{given[0]} takes one REF: the last checkpoint", hint=f"you gave {len(refs)}")
    if bool(choices.like) != bool(choices.window):
        raise OptionError("--like and --window go together", hint="as in --like cosine --window 100")
    if choices.every > 1 and not choices.like:
        raise OptionError("--every goes with --like and --window", hint="remove it")
    if choices.is_stored and not choices.like:
        raise OptionError("--stored goes with --like and --window", hint="remove it")
    if choices.is_stored and choices.every > 1:
        raise OptionError("--stored and --every choose steps of the window in different ways", hint="give one of them")
    if choices.weights and (min(choices.weights) < 0 or not any(choices.weights)):
        raise OptionError("--weights has to be numbers of at least 0, not all 0", hint="as in --weights 1,2,1")
    if choices.weights and len(choices.weights) != len(refs):
        raise OptionError(
            f"--weights has {len(choices.weights)} numbers for {counted(len(refs), 'ref')}", hint="give as many"
        )
    if choices.rank and choices.is_merged:
        raise OptionError("--rank makes an adapter, and --merged whole weights", hint="give one of them")


def _of_refs(refs: Sequence[str], choices: Choices) -> list[Named]:
    count = len(refs)
    weights = (
        averaging.of_ema(count, choices.ema) if choices.ema else averaging.normalised(choices.weights or [1.0] * count)
    )
    return [Named(*each) for each in zip(refs, weights, strict=True) if each[1]]


def step_of_run(text: str) -> tuple[Path, int]:
    """The run of a ref, and its step, which need not be stored."""
    ref = parse(text)
    if ref.kind != "run":
        raise CheckpointError(f"`{text}` is not a step of a run", hint="name RUN@STEP, RUN@last or RUN@best")
    return ref.run, ref.step if isinstance(ref.step, int) else find(ref).step


def stored_up_to(run: Path, last: int) -> list[int]:
    """The committed steps of a run up to one of its steps, oldest first."""
    return [item.step for item in Store(run).summaries() if item.step <= last]


def _last(text: str, count: int) -> list[str]:
    """The newest commits up to a ref, oldest first."""
    run, last = step_of_run(text)
    stored = stored_up_to(run, last)
    if len(stored) < count:
        hint = f"committed: {', '.join(map(str, stored)) or 'none'}; `--like linear --window N` makes other steps by replay"
        raise CheckpointError(f"has {counted(len(stored), 'checkpoint')} up to step {last}", where=str(run), hint=hint)
    return [f"{run}@{step}" for step in stored[-count:]]


def _of_window(text: str, like: str, window: int, choices: Choices) -> list[Named]:
    run, last = step_of_run(text)
    plan, _ = RunDirectory(run).plan()
    first = plan.parent.step if plan.parent else 0
    if window > last - first:
        hint = f"the run has {counted(last - first, 'step')} up to step {last}: give at most that to --window"
        raise FinetuneError(f"a window of {window} steps begins before step {first + 1}", where=text, hint=hint)
    if choices.every > window:
        raise FinetuneError("--every is larger than --window", where=text, hint="give a smaller one")
    if choices.is_stored:
        find(parse(text))  # a decay ends with the last step
        steps = [step for step in stored_up_to(run, last) if step > last - window]
    else:
        steps = list(range(last, last - window, -choices.every))[::-1]
    return [
        Named(f"{run}@{step}", weight)
        for step, weight in zip(steps, averaging.of_decay(like, steps, window), strict=True)
    ]


def folder_name(step: int, count: int, choices: Choices) -> str:
    """The name of an average's folder, if its user gives none."""
    words = re.sub(r"[^\w.]+", "-", choices.words).strip("-")
    return f"{step_name(step)}-{words or f'mean-of-{count}'}"
