"""The members of an average: opened, every byte verified, and refused by name if they do not fit together."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from finetune.compare.average_choice import Named
from finetune.errors import FinetuneError
from finetune.model import base
from finetune.model.base import files
from finetune.plan.plan import PinnedBase, Plan
from finetune.recipe.schema import Base
from finetune.store.checkpoints.manifest import Checkpoint
from finetune.store.checkpoints.refs import find, parse
from finetune.store.run.directory import RunDirectory
from finetune.store.run.records import MemberRecord


@dataclass(frozen=True)
class Member:
    ref: str
    """As its user names it."""
    weight: float
    directory: Path
    """Its own files: those of an adapter, or of a whole model."""
    name: str
    """How a manifest names it: no path of this machine."""
    digest: str | None
    run: Path | None = None
    plan: Plan | None = None
    checkpoint: Checkpoint | None = None
    is_base: bool = False
    """The base of its run, as RUN@0 names it."""
    replayed: int | None = None
    """The step of an adapter that a replay has made."""

    @property
    def is_adapter(self) -> bool:
        return (self.directory / "adapter_config.json").exists()

    @property
    def record(self) -> MemberRecord:
        return {"ref": self.name, "digest": self.digest, "weight": self.weight}

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else self.replayed or 0

    @cached_property
    def below(self) -> tuple[Base, PinnedBase]:
        """Of an adapter, its base."""
        if self.replayed and self.plan:
            return self.plan.recipe.base, self.plan.base
        return base.beneath(self.directory, self.ref)

    @cached_property
    def base_directory(self) -> Path:
        """Where the model's config is: of an adapter, the directory of its base."""
        return base.directory(*self.below) if self.is_adapter else self.directory

    @cached_property
    def tokenizer_directory(self) -> Path:
        if self.is_adapter:
            return base.tokenizer_directory(self.directory, self.base_directory)
        if self.plan and not base.has_tokenizer(self.directory):  # older code saved only some kinds
            return base.directory(self.plan.recipe.base, self.plan.base, with_weights=False)
        return self.directory


def opened(named: Sequence[Named]) -> list[Member]:
    """The members, one that is named twice with the sum of its weights. Raises a FinetuneError that names those that do not fit."""
    weights: dict[str, float] = {}
    for ref, weight in named:
        weights[ref] = weights.get(ref, 0.0) + weight
    found: dict[Path, Member] = {}
    for ref, weight in weights.items():
        member = _open(ref, weight)
        place = member.directory.resolve()
        found[place] = _open(ref, found[place].weight + weight) if place in found else member
    members = list(found.values())
    refuse_unlike(members)
    return members


def _open(text: str, weight: float) -> Member:
    base.refuse_foreign(text)
    ref = parse(text)
    if ref.kind == "base":
        plan, _ = RunDirectory(ref.run).plan()
        place = base.directory(plan.recipe.base, plan.base)
        digest = plan.base.digest or plan.base.revision
        return Member(text, weight, place, f"{ref.run.absolute().name}@0", digest, ref.run, plan, is_base=True)
    if ref.kind == "run" or ref.kind == "checkpoint":
        checkpoint = find(ref)
        base.refuse_damaged(checkpoint.path)
        run = ref.run if ref.kind == "run" else base.run_around(checkpoint.path)
        of_run = RunDirectory(run).plan()[0] if run else None
        is_step = checkpoint.manifest.kind != "average"
        name = f"{run.absolute().name}@{checkpoint.step}" if run and is_step else checkpoint.path.absolute().name
        return Member(text, weight, checkpoint.path, name, checkpoint.manifest.digest, run, of_run, checkpoint)
    if ref.kind == "model":
        return Member(text, weight, ref.path, ref.path.absolute().name, files.digest(ref.path))
    pinned = base.pin(Base(checkpoint=text))
    place = base.directory(Base(checkpoint=text), pinned)
    return Member(text, weight, place, text if ref.kind == "hub" else Path(text).name, pinned.revision or pinned.digest)


def refuse_unlike(members: Sequence[Member]) -> None:
    """FinetuneError that names two members of different bases or tokenizers. Shapes are compared where they are read."""
    trained = [member for member in members if not member.is_base]
    if not trained:
        raise FinetuneError("an average needs a checkpoint beside the base", where=members[0].ref, hint="name one")
    first, tokenizer = trained[0], _Tokenizer(trained[0])
    for other in members:
        if (one := _base_of(first)) and (two := _base_of(other)) and one != two:
            message = f"begins with another base than {first.ref}: {_told(two)}, not {_told(one)}"
            raise FinetuneError(message, where=other.ref, hint="average checkpoints of one base")
        if not other.is_base and (difference := tokenizer.difference(other)):
            message = f"has another tokenizer than {first.ref}: they differ in {difference}"
            raise FinetuneError(message, where=other.ref, hint="average checkpoints with one tokenizer")


def _base_of(member: Member) -> tuple[str, ...] | None:
    """What stands for the base under a member; None where that is unknown, as of whole weights of other people."""
    if member.is_adapter:
        named, pinned = member.below
    elif member.plan:
        named, pinned = member.plan.recipe.base, member.plan.base
    else:
        return None
    place = named.checkpoint.partition("@")[0] if pinned.kind == "hub" else ""
    return (
        pinned.kind,
        place,
        pinned.revision or "",
        pinned.digest or "",
        str(named.random_weights or ""),
        str(named.rope or ""),
    )


def _told(found: tuple[str, ...]) -> str:
    kind, place, revision, digest, *_ = found
    return " ".join(filter(None, [kind, place, revision or digest]))


class _Tokenizer:
    """The first member's, to be compared with the others'."""

    def __init__(self, member: Member):
        self._directory = member.tokenizer_directory
        self._digests = self._of(self._directory)
        self._own: PreTrainedTokenizerBase | None = None

    def difference(self, member: Member) -> str | None:
        if self._of(member.tokenizer_directory) == self._digests:
            return None
        self._own = self._own or base.load_tokenizer(self._directory)
        return base.difference(self._own, base.load_tokenizer(member.tokenizer_directory))

    def _of(self, directory: Path) -> list[tuple[str, str]]:
        return [(file.name, files.file_digest(file)) for file in base.tokenizer_files(directory)]
