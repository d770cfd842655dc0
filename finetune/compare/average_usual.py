"""The averages that `average --search` tries. They follow from the stored steps alone: no figure of a row adds or removes one, so that
the correction for their number holds."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from finetune.compare.average_choice import Choices, Named, OptionError, chosen, folder_name, step_of_run, stored_up_to
from finetune.plan.averaging import DECAYS
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.refs import find, parse
from finetune.store.checkpoints.tensor_files import EMA, of_kind
from finetune.store.run.directory import RunDirectory

EMAS = {0.5: 2, 0.8: 5}
"""The decays of moving averages, and the commits that each takes at least: with fewer, most of the weight is on the first one."""
FEWEST_OF_DECAY = 3  # members: of two, each shape is nearly the mean
NEWEST = 5  # commits of a decay, and of the mean that is mixed with the base: about as latest weight averaging takes (arXiv 2306.03241)
SHARES = (0.5, 0.75, 0.9)  # of what is mixed with the base


@dataclass(frozen=True)
class Usual:
    """An average to try: what `finetune average` is given for it."""

    refs: tuple[str, ...]
    choices: Choices

    @cached_property
    def named(self) -> list[Named]:
        return chosen(self.refs, self.choices)

    @property
    def command(self) -> str:
        return shlex.join(["finetune", "average", *self.refs, *self.choices.words.split()])

    @property
    def folder(self) -> str:
        return folder_name(step_of_run(self.refs[-1])[1], len(self.named), self.choices)


def refuse_options(choices: Choices, others: dict[str, bool]) -> None:
    """OptionError for options that do not go with --search; `others` says which further ones are given."""
    given = {
        "--weights": choices.weights,
        "--ema": choices.ema,
        "--last": choices.last,
        "--like": choices.like,
        "--stored": choices.is_stored,
        "--with-base": choices.with_base,
        "--kept-ema": choices.is_kept_ema,
        "--rank": choices.rank,
        "--merged": choices.is_merged,
        **others,
    }
    if names := [name for name, value in given.items() if value]:
        hint = "--search chooses members and weights by itself: give it alone, or remove it"
        raise OptionError(f"--search does not go with {' and '.join(names)}", hint=hint)
    if choices.every > 1 and not choices.window:
        raise OptionError("--search takes --every together with --window", hint="add --window, or remove it")


def usual(run: Path, checkpoint: Checkpoint, choices: Choices) -> list[Usual]:
    """Those that can be made of a run's stored steps up to a checkpoint; with a window, decays over all of its steps. Each set of
    members and weights comes once, and the checkpoint alone never."""
    stored = stored_up_to(run, checkpoint.step)
    last = f"{run}@{checkpoint.step}"
    found: dict[object, Usual] = {}
    for each in _all(run, last, stored, choices, has_ema=bool(of_kind(checkpoint.manifest.files, EMA))):
        members = frozenset((ref, round(weight, 9)) for ref, weight in each.named)
        if each.choices.is_kept_ema or members != {(last, 1.0)}:
            found.setdefault((each.choices.is_kept_ema, members), each)
    return list(found.values())


def _all(run: Path, last: str, stored: list[int], choices: Choices, has_ema: bool) -> Iterator[Usual]:
    yield from (Usual((last,), Choices(last=count)) for count in _counts(len(stored)))
    refs = tuple(f"{run}@{step}" for step in stored)
    yield from (Usual(refs, Choices(ema=decay)) for decay, fewest in EMAS.items() if len(stored) >= fewest)
    newest = min(len(stored), NEWEST)
    if choices.window:
        yield from (Usual((last,), Choices(like=like, window=choices.window, every=choices.every)) for like in DECAYS)
    elif newest >= FEWEST_OF_DECAY:
        window = _window(run, stored, newest)
        yield from (Usual((last,), Choices(like=like, window=window, is_stored=True)) for like in DECAYS)
    if has_ema:
        yield Usual((last,), Choices(is_kept_ema=True))
    yield from (Usual((last,), Choices(with_base=share)) for share in SHARES)
    if newest > 1:
        yield from (Usual((last,), Choices(last=newest, with_base=share)) for share in SHARES)


def _counts(stored: int) -> list[int]:
    """2, 3, 5, 8 and so on: each about 1.6 times the one before, so that hundreds of commits add few comparisons."""
    counts = [2, 3]
    while counts[-1] <= stored:
        counts.append(counts[-1] + counts[-2])
    return [count for count in counts if count <= stored]


def _window(run: Path, stored: list[int], newest: int) -> int:
    """The steps of a decay over the newest stored ones: those since the one before them. If there is none, the oldest stands for as many
    updates as the second."""
    if len(stored) > newest:
        return stored[-1] - stored[-newest - 1]
    plan, _ = RunDirectory(run).plan()
    return stored[-1] - max(plan.parent.step if plan.parent else 0, 2 * stored[0] - stored[1])


def checkpoint_of(text: str) -> tuple[Path, Checkpoint]:
    """The run of a ref, and its checkpoint. CheckpointError for a ref that is no stored step of a run."""
    run, _ = step_of_run(text)
    return run, find(parse(text))
