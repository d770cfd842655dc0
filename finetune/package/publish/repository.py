"""Reads and writes a repository of the Hub, in commits that land once or not at all.

Requests are retried if that can help. If the reply to a commit is lost, its tree identifies it, so no commit is made twice
(https://huggingface.co/docs/huggingface_hub/package_reference/hf_api, `create_commit`).
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import GitRefs, RepoFile
from huggingface_hub.utils import parse_ratelimit_headers

from finetune.errors import PublishError
from finetune.package.publish.shown import Visibility
from finetune.package.publish.trees import Files, Stored, differences
from finetune.store import downloads, hub

CHECKPOINTS = "checkpoints.json"
TRIES = 6
FIRST_WAIT_SECONDS = 0.5
MOST_WAIT_SECONDS = 300.0  # the window of the Hub's rate limits
PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}  # a commit lock is 409; 412 is checked before the next try
AGAIN = "try again: what was uploaded is not uploaded twice"
HTTPError, RequestError = hub.http().HTTPError, hub.http().RequestError
Answer = TypeVar("Answer")


class Repository:
    """A model repository, by name. The token is the one of the Hub's own library: HF_TOKEN, or the store of `hf auth login`."""

    def __init__(self, name: str, is_private: bool = False):
        self.name = name
        self.is_private = is_private
        """Whether to refuse commits while the repository is public."""
        self.commits = 0
        """Made by this object."""
        self._api = HfApi(library_name="finetune")

    def whoami(self) -> dict[str, Any]:
        """The owner of the token. Raises PublishError if there is none, or it is no longer valid."""
        return self._ask(self._api.whoami)

    def create(self, is_private: bool) -> None:
        self._ask(lambda: self._api.create_repo(self.name, private=is_private, exist_ok=True))

    def facts(self) -> Visibility | None:
        """{private, gated}; None if there is no such repository."""
        try:
            info = self._ask(lambda: self._api.model_info(self.name))
        except _Missing:
            return None
        return {"private": bool(info.private), "gated": info.gated or False}

    def branches(self) -> dict[str, str]:
        """The commit at the head of each."""
        return {ref.name: ref.target_commit for ref in self._refs().branches}

    def tags(self) -> dict[str, str]:
        return {ref.name: ref.target_commit for ref in self._refs().tags}

    def tree(self, revision: str) -> dict[str, Stored]:
        entries = self._ask(lambda: list(self._api.list_repo_tree(self.name, recursive=True, revision=revision)))
        return {
            entry.path: Stored(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    def scans(self, revision: str) -> dict[str, str]:
        """The verdict of the Hub's scanners on each file, if any: `safe`, `unsafe`, `suspicious`, or still waiting."""
        entries = self._ask(
            lambda: list(self._api.list_repo_tree(self.name, recursive=True, revision=revision, expand=True))
        )
        return {
            entry.path: entry.security.status for entry in entries if isinstance(entry, RepoFile) and entry.security
        }

    def read(self, revision: str, name: str) -> bytes:
        """A small file."""
        with tempfile.TemporaryDirectory() as folder:
            self._ask(lambda: self._fetch(revision, name, Path(folder, "files")))
            return Path(folder, "files", name).read_bytes()

    def download(self, revision: str, directory: Path) -> str:
        """Downloads all files of a revision, past every cache; returns its commit."""
        commit = self._ask(lambda: self._api.model_info(self.name, revision=revision)).sha or revision
        for name in self.tree(commit):
            self._ask(partial(self._fetch, commit, name, directory))
        return commit

    def _fetch(self, commit: str, name: str, directory: Path) -> None:
        with tempfile.TemporaryDirectory(dir=directory.parent) as cache:
            with self._unwrapped("download", Path(cache)):
                path = self._api.hf_hub_download(self.name, name, revision=commit, cache_dir=cache)
            target = (directory / name).resolve()
            if not target.is_relative_to(directory.resolve()):
                raise PublishError(f"has a file called {name}", where=self.name, hint="do not use this repository")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(path).resolve(), target)

    def first_commit(self) -> str:
        """The first commit. Branches begin there, so they share no weights with each other."""
        return self._ask(lambda: self._api.list_repo_commits(self.name))[-1].commit_id

    def add_branch(self, name: str, at: str) -> None:
        self._ask(lambda: self._api.create_branch(self.name, branch=name, revision=at, exist_ok=True))

    def remove_branch(self, name: str) -> None:
        try:
            self._ask(lambda: self._api.delete_branch(self.name, branch=name))
        except _Missing:  # an earlier try landed, and its reply was lost
            return

    def add_tag(self, name: str, at: str) -> None:
        """Raises PublishError if the tag exists at another commit."""
        if (there := self.tags().get(name)) is None:
            self._ask(lambda: self._api.create_tag(self.name, tag=name, revision=at, exist_ok=True))
            there = self.tags()[name]
        if there != at:
            hint = "use another --tag, or delete that one on the Hub"
            raise PublishError(f"the tag {name} is at another commit, {there[:8]}", where=self.name, hint=hint)

    def refuse_public(self, there: Visibility | None) -> None:
        """Raises PublishError if the repository exists and is public; `there` is the result of `facts`."""
        if there and not there["private"]:
            hint = (
                "--public (in a recipe, publish.private: false) publishes for everybody; or make it private on the Hub"
            )
            raise PublishError("is public, and the package is to be private", where=self.name, hint=hint)

    def commit(self, branch: str, files: Files, head: str, title: str, gone: Collection[str] = ()) -> str:
        """Gives a branch these files, and removes the old ones, in one commit on the given head. Returns the new head, or the same one if
        nothing changes. Raises PublishError if somebody else has moved the branch, or made a private repository public."""

        def attempt() -> str:
            now = self.branches().get(branch)
            changes = differences(self.tree(now), files, gone) if now else {}
            if now and not changes:
                return now  # it landed before; the reply was lost
            if now != head:
                hint = "look at what was committed there, and publish again"
                raise PublishError(f"{branch} was moved by somebody else", where=self.name, hint=hint)
            added = [CommitOperationAdd(name, content) for name, content in changes.items() if content is not None]
            removed = [CommitOperationDelete(name) for name, content in changes.items() if content is None]
            self._refuse_seen()
            with self._unwrapped("upload"):
                self._api.preupload_lfs_files(self.name, added, revision=branch)
            self._refuse_seen()  # uploads take hours: somebody may have made it public
            with self._unwrapped("upload"):
                made = self._api.create_commit(
                    self.name, [*added, *removed], commit_message=title, revision=branch, parent_commit=head
                )
            self.commits += 1
            return made.oid

        return self._ask(attempt)

    def _refuse_seen(self) -> None:
        if self.is_private:
            self.refuse_public(self.facts())

    def _refs(self) -> GitRefs:
        return self._ask(lambda: self._api.list_repo_refs(self.name))

    @contextmanager
    def _unwrapped(self, what: str, disk: Path | None = None) -> Iterator[None]:
        """The client wraps errors, and Xet raises only RuntimeError and OSError. This returns an error that `_ask` knows, or
        one that a retry does not fix."""
        try:
            yield
        except (HTTPError, ConnectionError):
            raise
        except (RuntimeError, OSError) as error:
            if isinstance(error.__cause__, HTTPError | ConnectionError):
                raise error.__cause__ from None
            if disk and (refusal := downloads.refusal_of_disk(error, PublishError, str(disk))):
                raise refusal from None
            raise PublishError(f"the {what} failed: {_reason(error)}", where=self.name, hint=AGAIN) from None

    def _ask(self, request: Callable[[], Answer]) -> Answer:
        """The Hub's answer, with retries if they can help; says so if the Hub is silent."""
        with hub.waiting(f"an answer about {self.name}"):
            return self._answer(request)

    def _answer(self, request: Callable[[], Answer]) -> Answer:
        wait = FIRST_WAIT_SECONDS
        for tries_left in reversed(range(TRIES)):
            try:
                return request()
            except (RepositoryNotFoundError, RevisionNotFoundError) as error:
                raise _Missing(f"has no such repository or revision: {_reason(error)}", where=self.name) from None
            except HFValidationError as error:
                raise PublishError(str(error), where=self.name, hint="a name is OWNER/NAME") from None
            except LocalTokenNotFoundError:
                hint = "set HF_TOKEN to a token with write access, or run `hf auth login`"
                raise PublishError("there is no token for the Hub", where=self.name, hint=hint) from None
            except (HTTPError, ConnectionError) as error:
                if not tries_left or not _is_passing(error):
                    told = hub.refusal(error)
                    kind = UnreachableError if told.status is None else PublishError
                    raise kind(told.message, where=self.name, hint=told.hint or AGAIN) from None
                time.sleep(_asked_wait(error) or wait)
                wait *= 2
        raise AssertionError("the last try returns or raises")


class UnreachableError(PublishError):
    """The Hub did not answer."""


class _Missing(PublishError):
    """The requested object is not there."""


def _is_passing(error: Exception) -> bool:
    return (
        error.response.status_code in PASSING if isinstance(error, HfHubHTTPError) else isinstance(error, RequestError)
    )


def _asked_wait(error: Exception) -> float | None:
    """Seconds to wait, by the Hub's headers (RateLimit, IETF draft; Retry-After, RFC 9110)."""
    if not isinstance(error, HfHubHTTPError):
        return None
    limit = parse_ratelimit_headers(error.response.headers)
    if limit and limit.remaining == 0:
        return min(limit.reset_in_seconds + 1.0, MOST_WAIT_SECONDS)
    after = error.response.headers.get("retry-after", "")
    return min(float(after), MOST_WAIT_SECONDS) if after.isdecimal() else None


def _reason(error: Exception) -> str:
    told = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return told.strip().partition("\n")[0]
