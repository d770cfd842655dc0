"""The runs that trained a model before, and the rows they trained on.

A row is known by its content (see `plan/split.py`), in any file, order or format. Nothing here opens a model.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import blake3
import numpy as np

from finetune.data.example import Row
from finetune.data.sources.open import located, open_source
from finetune.errors import DataError, FinetuneError, RunError
from finetune.plan.plan import PinnedSource, Plan, Stage
from finetune.plan.split import BAD, PIECE, Seen, Split, by_position, content_of, texts
from finetune.recipe.schema import Source, drawn_of
from finetune.recipe.schema.tasks import SECTIONS
from finetune.store import cache
from finetune.store.checkpoints.manifest import read
from finetune.store.checkpoints.refs import find, parse, run_around
from finetune.store.run.directory import RunDirectory

VERSION = 1  # of the arrays in the cache
# Place of a source, and how often its rows are drawn; the rest of its section decides how its rows are read.
PLACE = {"path", "dataset", "name", "split", "revision", "files", "weight", "epochs"}
THIS_RUN = "this run"
PROVENANCE = "provenance.intoto.jsonl"
STAGES = "stages.json"  # of an average: the runs behind all of its members


def stages(text: str) -> tuple[Stage, ...]:
    """The runs that trained the model of a ref, the last one first; none if the model is not of a run."""
    ref = parse(text)
    if ref.kind == "checkpoint" and (ref.path / STAGES).is_file():
        return tuple(map(Stage.model_validate, json.loads((ref.path / STAGES).read_bytes())))
    if ref.kind == "checkpoint":
        run, step = run_around(ref.path), read(ref.path).step
    elif ref.kind == "run" or ref.kind == "base":
        run, step = ref.run, ref.step if isinstance(ref.step, int) else find(ref).step
    else:
        return _of_package(ref.path) if ref.kind == "model" else ()
    if run is None:
        return (Stage(ref=ref.text),)
    try:
        return up_to(run, step)
    except RunError:  # its checkpoints may still be sound
        return (Stage(ref=ref.text),)


def _of_package(directory: Path) -> tuple[Stage, ...]:
    """The runs named by one of our packages; packages of older versions name none."""
    if not (directory / PROVENANCE).is_file():
        return ()
    try:
        said = json.loads((directory / PROVENANCE).read_bytes())["predicate"]["buildDefinition"]
        return tuple(map(Stage.model_validate, said["internalParameters"]["stages"]))
    except (ValueError, KeyError, TypeError):  # pydantic's errors are ValueErrors
        return (Stage(ref=directory.name),)


def up_to(run: Path, step: int) -> tuple[Stage, ...]:
    """A run up to a step, and those before it. Step 0 is its base."""
    plan, _ = RunDirectory(run).plan()
    before = plan.stages if plan.stages is not None else _found_before(plan, run)
    return (stage_of(plan, f"{run.absolute().name}@{step}"), *before) if step else before


def stage_of(plan: Plan, ref: str) -> Stage:
    recipe = plan.recipe
    return Stage(
        ref=ref,
        task=recipe.task.name,
        data=recipe.data,
        train=plan.train,
        seed=recipe.train.seed,
        row_rules=plan.row_rules,
        split=plan.split,
    )


def _found_before(plan: Plan, run: Path) -> tuple[Stage, ...]:
    """For plans of older versions without this record: the branch's parent beside it, by its id, or the run of the base."""
    if plan.parent is None:
        try:
            return stages(plan.recipe.base.checkpoint)
        except FinetuneError:  # it is gone, which is fine for the base of a full fine-tune
            return (Stage(ref=plan.recipe.base.checkpoint),)
    for path in RunDirectory(run).neighbours():
        try:
            identity = RunDirectory(path).plan()[1].get("run")
        except RunError:  # damage of another run does not matter here
            continue
        if identity == plan.parent.run:
            return up_to(path, plan.parent.step)
    return (Stage(ref=plan.parent.ref),)


@dataclass(frozen=True)
class Contents:
    """The content of the rows of sources, for one task: a hash of 64 bits a row, kept in the cache."""

    task: str
    of: Callable[[Row], object]
    """A row -> its content."""
    known: Mapping[tuple[str, str], np.ndarray] = field(default_factory=dict)
    """Of encoded sources."""

    def of_source(self, source: Source, pin: PinnedSource, row_rules: int, skips_bad: bool = False) -> np.ndarray:
        """Raises DataError if the source has changed. `skips_bad` gives a row that cannot be read the content `BAD`."""
        key = source_key(source, pin)
        if key in self.known:
            return self.known[key]
        facts = [str(VERSION), self.task, *key, *(["skips bad rows"] if skips_bad else [])]
        digest = blake3.blake3("\n".join(facts).encode()).hexdigest()[:32]
        made = cache.built("contents", digest, partial(self._build, source, pin, row_rules, skips_bad))
        return np.load(made / "contents.npy", mmap_mode="r")

    def _build(self, source: Source, pin: PinnedSource, row_rules: int, skips_bad: bool, directory: Path) -> None:
        form = SECTIONS[self.task].row_form
        rows = open_source(located(source, pin), pin.revision, row_rules, form, skips_bad)
        if rows.fingerprint != pin.fingerprint:
            raise DataError("has other content than it had then", where=rows.name, hint="restore the file")
        made = np.lib.format.open_memmap(directory / "contents.npy", "w+", np.uint64, (len(rows),))
        for row in range(len(rows)):
            try:
                made[row] = content_of(self.of(rows[row]))
            except DataError:
                if not skips_bad:
                    raise
                made[row] = BAD
        made.flush()

    def held_out(self, stage: Stage, split: Split | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All rows of a run, a piece at a time, with a mask of the held-out ones."""
        if stage.data is None:
            raise DataError("its plan is not to be found", where=stage.ref)
        pairs = zip(stage.data.train, stage.train, strict=True)
        skips_bad = stage.data.on_bad_row == "skip"
        sources = [self.of_source(*pair, stage.row_rules, skips_bad) for pair in pairs]
        share = drawn_of(stage.data) if split is None else None
        rows = np.zeros(0, np.int64) if share is None else by_position(share, sum(map(len, sources)), stage.seed)
        first = 0
        for contents in sources:
            for start in range(0, len(contents), PIECE):
                piece = contents[start : start + PIECE]
                numbers = np.arange(first + start, first + start + len(piece))
                yield piece, split.holds_out(piece) if split else np.isin(numbers, rows)
            first += len(contents)


def source_key(source: Source, pin: PinnedSource) -> tuple[str, str]:
    """Key of the rows of a source as a task reads them: its content, and the settings of reading."""
    reading = source.model_dump(mode="json", exclude_defaults=True, exclude=PLACE)
    return pin.fingerprint, json.dumps(reading, sort_keys=True)


@dataclass(frozen=True)
class Found:
    """Held-out rows that earlier runs trained on."""

    seen: tuple[Seen, ...]
    """One entry for each run that trained on some, or may have."""
    rows: int | None
    """The number of rows that at least one run trained on; None if this is unknown for a run."""


def seen(held_out: np.ndarray, split: Split | None, by: Sequence[Stage], contents: Contents) -> Found:
    """The held-out rows (uint64 each) that the runs trained on: by their rules alone if that is enough, else by content."""
    found, is_seen = [], np.zeros(len(held_out), dtype=bool)
    for stage in by if len(held_out) else ():
        if stage.data is None:
            found.append(Seen(by=stage.ref, rows=None, why="its plan is not to be found"))
        elif stage.task == contents.task and not (split and split.is_within(stage.split)):
            try:
                trained = _trained(stage, held_out, contents)
            except FinetuneError as error:
                why = ": ".join(filter(None, (error.where, error.message)))
                found.append(Seen(by=stage.ref, rows=None, why=why))
                continue
            is_seen |= trained
            found += [Seen(by=stage.ref, rows=int(trained.sum()))] if trained.any() else []
    is_known = all(item.rows is not None for item in found)
    return Found(tuple(found), int(is_seen.sum()) if is_known else None)


def _trained(stage: Stage, rows: np.ndarray, contents: Contents) -> np.ndarray:
    is_trained = np.zeros(len(rows), dtype=bool)
    for piece, is_out in contents.held_out(stage, stage.split):
        is_trained |= np.isin(rows, piece[~is_out])
    return is_trained


def has_rows_of(stage: Stage, own: Sequence[np.ndarray], contents: Contents) -> bool:
    """Whether a run had any of these rows, trained on or held out; also True if that cannot be found out."""
    try:
        for piece, _ in contents.held_out(stage, stage.split):
            some = np.unique(piece[piece != BAD])
            if any(
                np.isin(each[start : start + PIECE], some).any() for each in own for start in range(0, len(each), PIECE)
            ):
                return True
    except FinetuneError:
        return True
    return False


def named(stage: Stage, contents: Contents) -> Split:
    """The content of the rows that a run of an older version held out, without those it also trained on."""
    pieces = list(contents.held_out(stage, None))
    held_out = np.concatenate([piece[is_out] for piece, is_out in pieces])
    trained = [piece[~is_out] for piece, is_out in pieces]
    return Split(seed=stage.seed, contents=texts(held_out[~np.isin(held_out, np.concatenate(trained))]))
