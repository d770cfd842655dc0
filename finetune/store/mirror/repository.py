"""A mirror in a private repository of the Hub: what belongs together is one commit, on the head that was read.

Large pieces are uploaded before their commit, and a piece that the Hub has is not uploaded again.
"""

import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import MirrorError
from finetune.store import hub
from finetune.store.mirror.bucket import CLIENTS, asked
from finetune.store.told import without_secrets

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

BRANCH = "main"


class RepositoryBucket:
    """`hf://owner/name`, with a prefix if you like; a repository that is not there is made, private."""

    parallel = 4

    def __init__(self, place: str):
        from huggingface_hub import HfApi

        self.place = place
        parts = place.removeprefix("hf://").split("/")
        self._type = "dataset" if parts[0] == "datasets" else "model"
        names = parts[1:] if parts[0] == "datasets" else parts
        if len(names) < 2 or not hub.HUB_ID.fullmatch("/".join(names[:2])) or parts[0] in ("buckets", "spaces"):
            hint = "name a model or dataset repository: `hf://owner/name` or `hf://datasets/owner/name`"
            raise MirrorError("is not the address of a repository", where=place, hint=hint)
        self._repo, self._prefix = "/".join(names[:2]), "".join(f"{part}/" for part in names[2:])
        self._api = HfApi(library_name="finetune")
        self._head: str | None = None
        """The commit that was read last, or made by this object; None if there is no repository."""
        self._is_private = True
        self._added: dict[str, CommitOperationAdd] = {}
        self._removed: set[str] = set()
        self._lock = threading.Lock()

    def sizes(self, folder: str) -> dict[str, int]:
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        if not self._is_read():
            return {}
        with self._asked():
            try:
                path = f"{self._prefix}{folder}".strip("/") or None
                tree = self._api.list_repo_tree(
                    self._repo, path, recursive=True, revision=self._head, repo_type=self._type
                )
                return {each.path.removeprefix(self._prefix): each.size for each in tree if isinstance(each, RepoFile)}
            except EntryNotFoundError:
                return {}

    def read(self, name: str) -> bytes | None:
        from huggingface_hub.errors import RemoteEntryNotFoundError

        if not self._is_read():
            return None
        with self._asked(), tempfile.TemporaryDirectory() as folder:
            try:
                path = self._api.hf_hub_download(
                    self._repo, f"{self._prefix}{name}", revision=self._head, repo_type=self._type, cache_dir=folder
                )
            except RemoteEntryNotFoundError:
                return None
            return Path(path).read_bytes()

    def put(self, name: str, content: bytes) -> None:
        from huggingface_hub import CommitOperationAdd

        self._refuse_public()
        added = CommitOperationAdd(f"{self._prefix}{name}", content)
        with self._asked():
            # Its bytes are not kept after they are uploaded.
            self._api.preupload_lfs_files(self._repo, [added], revision=BRANCH, repo_type=self._type)
        with self._lock:
            self._added[added.path_in_repo] = added

    def remove(self, names: Collection[str]) -> None:
        self._removed |= {f"{self._prefix}{name}" for name in names}

    def settle(self, title: str) -> None:
        """One commit. MirrorError if somebody else has made one since the last read: nothing is changed then."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if not self._added and not self._removed:
            return
        there = {f"{self._prefix}{name}" for name in self.sizes("")} if self._removed else set()
        changes: list[CommitOperationAdd | CommitOperationDelete] = [*self._added.values()]
        changes += [CommitOperationDelete(path) for path in sorted(self._removed & there)]
        self._added, self._removed = {}, set()
        if changes:
            with self._asked():
                made = self._api.create_commit(
                    self._repo,
                    changes,
                    commit_message=title,
                    revision=BRANCH,
                    parent_commit=self._head,
                    repo_type=self._type,
                )
                self._head = made.oid

    def _is_read(self) -> bool:
        """Whether the repository is there; goes to its newest commit, unless changes wait for theirs."""
        from huggingface_hub.errors import RepositoryNotFoundError

        if self._head and (self._added or self._removed):
            return True
        with self._asked():
            try:
                info = self._api.repo_info(self._repo, revision=BRANCH, repo_type=self._type)
            except RepositoryNotFoundError:
                self._head = None
                return False
        self._head, self._is_private = info.sha, bool(info.private)
        return True

    def _refuse_public(self) -> None:
        """Makes the repository if it is not there. MirrorError if it is public: a mirror has optimizer state and losses of rows."""
        with self._lock:
            if self._head is None:
                with self._asked():
                    self._api.create_repo(self._repo, private=True, exist_ok=True, repo_type=self._type)
                self._is_read()
        if not self._is_private:
            hint = "make it private on the Hub, or name another one"
            raise MirrorError("is public, and a mirror must not be", where=self.place, hint=hint)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """As `asked`, with what the status of the Hub's answer means."""
        try:
            with asked(self.place, CLIENTS["hf"].credentials):
                yield
        except MirrorError as error:
            if error.__cause__ is None:
                raise
            told = hub.refusal(error.__cause__)
            raise MirrorError(
                without_secrets(told.message), where=self.place, hint=told.hint or "look at your network, and try again"
            ) from error.__cause__
