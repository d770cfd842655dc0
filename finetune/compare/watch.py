"""Evaluates each commit of a run as it appears, beside its training: in another process, or on another machine that sees its directory."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune.compare.evaluate import Evaluated, results, shown
from finetune.compare.results import Asked, Result
from finetune.errors import FinetuneError, RunError
from finetune.hosts import health
from finetune.store.checkpoints.manifest import MANIFEST
from finetune.store.checkpoints.store import Store
from finetune.store.run.directory import RunDirectory

LOOK_SECONDS = 2.0
PATIENCE_SECONDS = 600.0  # as `health` by default: longer silence is no training


def watch(run: Path, asked: Asked, tell: Callable[[list[Evaluated]], None], say: Callable[[str], None]) -> list[Result]:
    """The results of every commit until the training ends. `tell` hears those of each at once, `say` a line about a skipped one."""
    made: dict[tuple[str, str, str], Result] = {}
    for step in commits(run):
        found = _evaluated(f"{run}@{step}", RunDirectory(run).checkpoint(step), asked)
        if found is None:
            say(f"step {step} was pruned before it was evaluated; skipped")
            continue
        new = {(each.ref, each.rows, each.evaluation.about["model"]): each for each in found}
        if new.keys() - made.keys():  # else it was demoted: the same weights
            tell(shown(found))
        made |= {key: each for key, each in new.items() if key not in made}
    return [*made.values()]


def commits(run: Path) -> Iterator[int]:
    """The steps of a run's commits as they appear, and once more where one is replaced; ends with the training. RunError where there is
    no run, or its training has died or hangs."""
    store, done = Store(run), set[tuple[int, int]]()
    while True:
        # The state first: a commit of a training that has ended by then is there when the store is read.
        state = health.look(run, PATIENCE_SECONDS)
        signs = {(item.step, _sign(item.path)): item.step for item in store.summaries()}
        new = [step for sign, step in signs.items() if sign not in done]
        yield from new
        done.update(signs)
        if new:  # meanwhile there may be others
            continue
        if state["state"] in ("ended", "finished"):
            return
        if not state["ok"]:
            raise RunError(f"its training is {state['state']}", where=str(run), hint="resume it, and watch it again")
        time.sleep(LOOK_SECONDS)


def _sign(checkpoint: Path) -> int:
    """Changes with the manifest; 0 where it was removed meanwhile."""
    try:
        return (checkpoint / MANIFEST).stat().st_ino
    except OSError:
        return 0


def _evaluated(text: str, path: Path, asked: Asked) -> list[Result] | None:
    """None where the checkpoint was removed meanwhile; one that was demoted meanwhile is read again."""
    while True:
        before = _kind_of(path)
        try:
            return results([text], asked)
        except (FinetuneError, OSError):
            if not path.is_dir():
                return None
            if _kind_of(path) == before:
                raise


def _kind_of(path: Path) -> str | None:
    summaries = Store(path.parents[1]).summaries()
    return next((item.kind for item in summaries if item.path.name == path.name), None)
