"""The names in a run directory, and its plan. No other file spells one of these names."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import RunError
from finetune.store import places

if TYPE_CHECKING:
    from finetune.plan.facts import Facts
    from finetune.plan.plan import Plan

PLAN, JOURNAL, RECIPE, LEASE = "plan.json", "journal.jsonl", "recipe.yaml", "lease.json"
CHECKPOINTS, PINS = "checkpoints", "pins"
_STEP = re.compile(r"step-(\d{8})")
_PART = re.compile(r"step-(\d+)-(\d+)\.parquet")
_PIN = re.compile(r"step-(\d{8})-.+")


def step_name(step: int) -> str:
    """The name of a step's directory, in a run and where it is published."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a directory with this name; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def part_name(first: int, last: int) -> str:
    """The name of the Parquet file of these steps."""
    return f"{step_name(first)}-{last:08d}.parquet"


def steps_of_part(name: str) -> tuple[int, int] | None:
    """The first and the last step of a Parquet file with this name; None for any other name."""
    match = _PART.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class RunDirectory:
    """The paths of a run. None of them has to exist."""

    path: Path

    @property
    def plan_file(self) -> Path:
        return self.path / PLAN

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL

    @property
    def recipe(self) -> Path:
        return self.path / RECIPE

    @property
    def lease(self) -> Path:
        return self.path / LEASE

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def silence(self) -> Path:
        return self.path / "silence.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def attempts(self) -> Path:
        """Running saves, and the leftovers of killed ones."""
        return self.path / "attempts"

    @property
    def trash(self) -> Path:
        """Checkpoints about to be deleted."""
        return self.path / "trash"

    def trashed(self) -> Iterator[Path]:
        """A step's directory with a token after its name."""
        return self.trash.glob("step-*-*")

    @property
    def pins(self) -> Path:
        return self.path / PINS

    @property
    def rows(self) -> Path:
        return self.path / "rows"

    @property
    def modules(self) -> Path:
        return self.path / "modules"

    @property
    def experts(self) -> Path:
        return self.path / "experts"

    @property
    def evaluations(self) -> Path:
        """The results of evaluations for each row, a folder for each step."""
        return self.path / "evaluations"

    @property
    def averages(self) -> Path:
        """Averages of checkpoints, a folder for each: the keep rules leave them alone."""
        return self.path / "averages"

    @property
    def figures(self) -> Path:
        """The table of the tracker `csv`."""
        return self.path / "figures.csv"

    @property
    def tensorboard(self) -> Path:
        """The event files of the tracker `tensorboard`."""
        return self.path / "tensorboard"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers"

    def tracker(self, name: str) -> Path:
        """What a tracker has got."""
        return self.trackers / f"{name}.json"

    def tracker_lock(self, name: str) -> Path:
        return self.trackers / f"{name}.lock"

    @property
    def mirror_lock(self) -> Path:
        """Held by the process that mirrors the run."""
        return self.path / "mirror.lock"

    @property
    def mirrored_from(self) -> Path:
        """In a copy that was fetched from a mirror for reading: what the mirror has."""
        return self.path / "mirrored_from.json"

    @property
    def debug(self) -> Path:
        return self.path / "debug"

    @property
    def published(self) -> Path:
        """What was published: a file for each milestone."""
        return self.path / "published"

    @property
    def publish_log(self) -> Path:
        return self.path / "publish.log"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    def bundle(self, step: int) -> Path:
        """The folder with all facts about a bad step."""
        return self.debug / step_name(step)

    def package(self, step: int) -> Path:
        return self.path / "packages" / step_name(step)

    def publication(self, step: int) -> Path:
        return self.published / f"{step_name(step)}.json"

    def publications(self) -> Iterator[Path]:
        return self.published.glob("step-*.json")

    def attempt(self, step: int, attempt: str, token: str) -> Path:
        """The folder of an attempt's save before its commit."""
        return self.attempts / f"{step_name(step)}-{attempt}-{token}"

    def saves(self, attempt: str | None = None) -> Iterator[Path]:
        """The running saves of one attempt, or of all."""
        return self.attempts.glob(f"step-*-{attempt}-*" if attempt else "step-*")

    def pin(self, step: int, reason: str) -> Path:
        return self.pins / f"{step_name(step)}-{reason}"

    def pinned(self) -> dict[int, list[str]]:
        """The names of the files in `pins/`, by step."""
        found: dict[int, list[str]] = {}
        for name in sorted(path.name for path in self.pins.glob("step-*-*")):
            if match := _PIN.fullmatch(name):
                found.setdefault(int(match[1]), []).append(name)
        return found

    def stored_steps(self) -> list[int]:
        """The steps with a directory in a checkpoint's place, sound or not, oldest first."""
        names = (path.name for path in self.checkpoints.iterdir()) if self.checkpoints.is_dir() else ()
        return sorted(step for step in map(step_of, names) if step is not None)

    def records(self) -> Iterator[Path]:
        """The files of a run beside plan, journal and checkpoints that nothing else could make again."""
        kept = (self.rows, self.modules, self.experts, self.evaluations, self.pins, self.published)
        for path in sorted(path for folder in kept for path in folder.rglob("*")):
            if path.is_file() and path.suffix != ".tmp" and not path.name.startswith("."):
                yield path

    @property
    def is_run(self) -> bool:
        """Whether a run has begun here: it has a plan."""
        return self.plan_file.exists()

    def neighbours(self) -> list[Path]:
        """The runs in the folder around it, itself among them."""
        return [path.parent for path in sorted(self.path.absolute().parent.glob(f"*/{PLAN}"))]

    def plan(self) -> "tuple[Plan, Facts]":
        """The plan of the run, and the facts recorded beside it."""
        from finetune.plan.plan import SCHEMA, Plan  # a launcher asks for names alone, and starts without pydantic

        path = self.plan_file
        damaged_hint = "restore it from a copy, or start a new run"
        try:
            record = json.loads(path.read_bytes())
            schema = record.pop("schema")
            if schema > SCHEMA:
                raise RunError("was written by a newer version of finetune", where=str(path), hint="upgrade finetune")
            facts, plan_id = record.pop("facts"), record.pop("plan_id")
            plan = Plan.model_validate(record)
        except (FileNotFoundError, NotADirectoryError):
            message, hint = f"is not a run directory: it has no {PLAN}", "start it with `finetune train`"
            raise RunError(message, where=str(self.path), hint=hint) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # pydantic's errors are ValueErrors
            reason = str(error).partition("\n")[0]
            raise RunError(f"is damaged: {reason}", where=str(path), hint=damaged_hint) from None
        if plan.plan_id != plan_id:
            raise RunError(
                "does not have the content its plan_id stands for",
                where=str(path),
                hint="it was edited: restore it from a copy",
            )
        places.opened(self.path, self.checkpoints, facts.get("places", {}))
        return plan, facts
