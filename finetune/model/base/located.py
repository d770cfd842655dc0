"""Finds a pinned base again under any name with the same content."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import BaseError, CheckpointError
from finetune.plan.plan import PinnedBase
from finetune.recipe.schema import Base
from finetune.store import places
from finetune.store.checkpoints.refs import HubRef, Ref, parse
from finetune.store.checkpoints.store import Store

NAME_IT = "name the folder where it is now with --base PATH_OR_ID: equal content is the same base"


@dataclass(frozen=True)
class Look:
    """How to follow names; it asks the Hub only about names from the user."""

    place_of: Callable[[Ref], Path | None]
    """The directory or the file of a ref."""
    digest_of: Callable[[Path], str]
    commit_of: Callable[[HubRef], str]

    def place(self, name: str, is_given: bool = False) -> Path | None:
        try:
            ref = parse(name)
            return None if ref.kind == "hub" and not is_given else self.place_of(ref)
        except CheckpointError:
            return None


def located(base: Base, pinned: PinnedBase, look: Look) -> Base:
    """The base by its recorded name if that still leads to it, or by another one. BaseError if it is gone or has changed."""
    if pinned.digest is None:
        return _of_a_commit(base, pinned, look)
    others = []
    for name in places.bases():
        place = look.place(name, is_given=True)
        if place is not None and look.digest_of(place) == pinned.digest:
            return _renamed(base, str(place) if parse(name).kind == "hub" else name)
        others.append(name)
    if pinned.revision is not None:  # an adapter on the Hub
        return base
    for name in _candidates(base.checkpoint):
        place = look.place(name)
        if place is not None and look.digest_of(place) == pinned.digest:
            _say_unused(others, base)
            return base if name == base.checkpoint else _renamed(base, name)
    if others:
        raise BaseError(f"has other content than {base.checkpoint} had", where=others[0], hint="name an unchanged copy")
    if not places.is_there(base.checkpoint):
        raise BaseError("is not here any more", where=base.checkpoint, hint=NAME_IT)
    raise BaseError(
        "is not what it was when the run was planned", where=base.checkpoint, hint="restore it, or start a new run"
    )


def _of_a_commit(base: Base, pinned: PinnedBase, look: Look) -> Base:
    """A plan pins a Hub checkpoint by its commit, without a digest."""
    others = []
    for name in places.bases():
        ref = parse(name)
        if ref.kind != "hub":
            about = "its commit is recorded and no digest, so equal content is not checked"
            places.say(f"base {base.checkpoint} is taken from {name}: {about}")
            return _named(base, name)
        if look.commit_of(ref) == pinned.revision:
            recorded = parse(base.checkpoint)
            is_same_name = recorded.kind == "hub" and recorded.repo == ref.repo
            return base if is_same_name else _named(base, places.found(base.checkpoint, ref.repo, "base"))
        others.append(name)
    _say_unused(others, base)
    return base


def _candidates(recorded: str) -> Iterator[str]:
    """For a moving ref, like RUN@last, also the other steps of the run."""
    if recorded.startswith("package:"):
        yield recorded
    for name in places.around(recorded):
        yield name
        run, _, step = name.rpartition("@")
        if step in ("last", "best") and Path(run).is_dir():
            yield from (f"{run}@{item.step}" for item in reversed(Store(Path(run)).checkpoints()))


def _renamed(base: Base, name: str) -> Base:
    return _named(base, places.found(base.checkpoint, name, "base"))


def _named(base: Base, name: str) -> Base:
    return base.model_copy(update={"checkpoint": name, "revision": None})


def _say_unused(names: list[str], base: Base) -> None:
    for name in names:
        places.say(f"--base {name} has other content than {base.checkpoint} and is not used for it")
