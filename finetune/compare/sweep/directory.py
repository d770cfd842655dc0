"""A sweep on disk: what was asked in `sweep.json`, the runs in `trials/`, and what became of each in `records/`.

Whoever holds the claim on a trial alone writes its record, in one replacement. So a kill loses no record, and no file has two writers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import blake3

from finetune.compare.sweep.space import Settings, arguments
from finetune.compare.sweep.spec import SCHEMA, Spec
from finetune.errors import RunError, RunInUseError
from finetune.plan.facts import Metrics
from finetune.recipe.load import LoadedRecipe, loads
from finetune.recipe.resume_rules import differences
from finetune.store import beside
from finetune.store.durable import failures, make_directory, rename, replace_file
from finetune.store.run import lease
from finetune.store.run.directory import RECIPE
from finetune.store.strict_json import from_json, to_json

SPEC = "sweep.json"
DAMAGED_HINT = "restore it from a copy, or start another sweep with --sweep DIR"


class Reason(NamedTuple):
    """Why a trial failed."""

    code: str
    message: str


@dataclass(frozen=True)
class Trial:
    """A trial, and what became of it so far."""

    number: int
    settings: Settings
    results: dict[int, Metrics]
    """Held-out figures of each step that was asked for."""
    tokens: int = 0
    """Trained on so far."""
    is_finished: bool = False
    reason: Reason | None = None

    @property
    def step(self) -> int:
        """The last step with a result; 0 before there is one."""
        return max(self.results, default=0)

    def with_result(self, step: int, metrics: Metrics, tokens: int, is_finished: bool) -> "Trial":
        results = {**self.results, step: metrics}
        return replace(self, results=results, tokens=tokens, is_finished=is_finished, reason=None)


@dataclass(frozen=True)
class Sweep:
    """A sweep, and the places of all that belongs to it."""

    path: Path
    spec: Spec
    loaded: LoadedRecipe
    """The recipe, without the settings of trials."""

    def run(self, number: int) -> Path:
        return self.path / "trials" / f"{number:03}"

    def log(self, number: int) -> Path:
        """What the trainings of a trial print."""
        return self.path / "logs" / f"{number:03}.log"

    @property
    def recipe(self) -> Path:
        return recipe_of(self.path)

    def recipe_with(self, settings: Settings) -> LoadedRecipe:
        return loads(self.loaded.text, self.loaded.file, arguments(settings))

    @property
    def table(self) -> Path:
        return self.path / "table.json"

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def optuna(self) -> Path:
        """Optuna's own storage."""
        return self.path / "optuna.jsonl"

    def claim(self, name: int | str, take_over: bool = False) -> lease.Lease | None:
        """The right to train a trial, for as long as this process lives; None if another process has it. See `lease.acquire`."""
        named = f"{name:03}" if isinstance(name, int) else name
        try:
            return lease.acquire(self.path / "claims" / named, "sweep", take_over)
        except RunInUseError:
            return None

    def trials(self) -> dict[int, Trial]:
        """All trials that are known by now, by number."""
        known = {number: Trial(number, settings, {}) for number, settings in enumerate(self.spec.settings())}
        recorded = (self._read(path) for path in sorted((self.path / "records").glob("*.json")))
        return dict(sorted({**known, **{trial.number: trial for trial in recorded}}.items()))

    def trial(self, number: int) -> Trial | None:
        """A trial with a record."""
        path = self._record(number)
        return self._read(path) if path.exists() else None

    def write(self, trial: Trial) -> None:
        """Records what became of a trial; under its claim."""
        with failures(self._record(trial.number), RunError):
            make_directory(self.path / "records")
            replace_file(self._record(trial.number), (to_json(asdict(trial)) + "\n").encode())

    def _record(self, number: int) -> Path:
        return self.path / "records" / f"{number:03}.json"

    def _read(self, path: Path) -> Trial:
        try:
            record: Any = from_json(path.read_bytes())
            record["results"] = {int(step): metrics for step, metrics in record["results"].items()}
            record["reason"] = Reason(*record["reason"]) if record["reason"] else None
            return Trial(**record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"is damaged: {error}", where=str(path), hint=f"remove it: {path.stem} then runs on"
            ) from None


def recipe_of(path: Path) -> Path:
    """The copy of the recipe that all trials are trained with."""
    return path / RECIPE


def exists(path: Path) -> bool:
    return (path / SPEC).exists()


def refuse_place(path: Path) -> None:
    """RunError where a sweep would stand among other files."""
    with failures(path, RunError):
        if path.exists() and not exists(path) and (not path.is_dir() or any(path.iterdir())):
            hint = "name a directory that is new or empty with --sweep"
            raise RunError("is not empty, and is no sweep", where=str(path), hint=hint)


def create(path: Path, spec: Spec, loaded: LoadedRecipe) -> Sweep:
    """Makes the directory, in one rename: a kill leaves all of it or nothing. Where another process was faster, its sweep counts."""
    refuse_place(path)
    with failures(path, RunError), beside.staged(path) as staging:
        replace_file(recipe_of(staging), loaded.text.encode())
        replace_file(staging / SPEC, spec.dump(_digest(loaded.text)))
        try:
            rename(staging, path)
        except OSError:
            if not exists(path):
                raise
    return opened(path)


def opened(path: Path) -> Sweep:
    """RunError if there is no sweep, or it is damaged."""
    place = path / SPEC
    try:
        record: Any = from_json(place.read_bytes())
        if record["schema"] > SCHEMA:
            raise RunError("was written by a newer version of finetune", where=str(place), hint="upgrade finetune")
        text = recipe_of(path).read_text()
        spec = Spec.of(record)
    except (FileNotFoundError, NotADirectoryError) as error:
        name = Path(error.filename).name
        raise RunError(f"is no sweep: it has no {name}", where=str(path), hint=DAMAGED_HINT) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"is damaged: {error}", where=str(place), hint=DAMAGED_HINT) from None
    if _digest(text) != record["recipe"]:
        raise RunError("is not the recipe that the sweep began with", where=str(recipe_of(path)), hint=DAMAGED_HINT)
    return Sweep(path, spec, loads(text, str(recipe_of(path))))


def refuse_other(sweep: Sweep, asked: Mapping[str, object], loaded: LoadedRecipe) -> None:
    """RunError with every difference if a sweep is another one than is asked for."""
    old = {"recipe": sweep.loaded.recipe.model_dump(mode="json"), **sweep.spec.asked}
    new = {"recipe": loaded.recipe.model_dump(mode="json"), **asked}
    lines = [f"{key}: {before} -> {after}" for key, before, after in differences(old, new)]
    if lines:
        raise RunError(
            "is a sweep of something else:\n  " + "\n  ".join(lines),
            where=str(sweep.path),
            hint=f"name another directory with --sweep, or continue this one with `finetune sweep {sweep.path}`",
        )


def _digest(text: str) -> str:
    return f"blake3:{blake3.blake3(text.encode()).hexdigest()}"
