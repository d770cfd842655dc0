"""A base on the Hub: its commit, its files, and errors with a hint for the Hub's refusals."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import BaseError
from finetune.store import downloads, hub, leftovers
from finetune.store.checkpoints.refs import nearest_folder

# `*` matches `/` too: skip exports in folders, and Mistral's second copy of its weights.
OTHER_FILES = ("*/*", "consolidated*")


def commit_of(repo: str, revision: str | None) -> str:
    """The commit of a revision now; without the Hub, the last one seen from here."""
    import huggingface_hub

    with _errors(repo, revision), hub.waiting(f"which commit {repo} is at"):
        return huggingface_hub.HfApi().resolve_revision(repo, revision=revision).resolved


def download(repo: str, commit: str | None, patterns: tuple[str, ...]) -> Path:
    """The directory with the matching files of a commit, checked against it; downloads only missing ones, eight at once.

    A file that a kill interrupts is downloaded again, the whole ones before it are not.
    """
    import huggingface_hub

    _remove_leftovers(repo)
    with _errors(repo, commit), hub.waiting(f"files of {repo}"):
        path = huggingface_hub.snapshot_download(
            repo, revision=commit, allow_patterns=list(patterns), ignore_patterns=list(OTHER_FILES)
        )
    files = {file for pattern in patterns for file in Path(path).glob(pattern)}
    downloads.refuse_damaged(files, BaseError, f"{repo}@{commit}")
    return Path(path)


def file(repo: str, commit: str | None, name: str) -> Path:
    """One file of a commit, checked against it."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    where = f"{repo}@{commit}"
    _remove_leftovers(repo)
    with _errors(repo, commit), hub.waiting(f"{name} of {repo}"):
        try:
            path = Path(huggingface_hub.hf_hub_download(repo, name, revision=commit))
        except LocalEntryNotFoundError:  # without a network, also an entry that is not found
            raise
        except EntryNotFoundError:
            hint = f"look at https://huggingface.co/{repo}/tree/main"
            raise BaseError(f"the repository has no file {name}", where=where, hint=hint) from None
    downloads.refuse_damaged([path], BaseError, where)
    return path


def has_files(repo: str, commit: str | None, patterns: tuple[str, ...]) -> bool:
    """Whether a commit has matching files. Offline it is True if unknown: loading finds out."""
    import huggingface_hub
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError

    with (
        _errors(repo, commit),
        hub.without_remarks(),
        contextlib.suppress(DryRunError, LocalEntryNotFoundError),
        hub.waiting(f"what {repo} has"),
    ):
        return bool(
            huggingface_hub.snapshot_download(
                repo, revision=commit, allow_patterns=list(patterns), ignore_patterns=list(OTHER_FILES), dry_run=True
            )
        )
    return True


def _remove_leftovers(repo: str) -> None:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    leftovers.remove(Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo, repo_type="model")))


@contextmanager
def _errors(repo: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import constants, errors

    where = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except errors.GatedRepoError:
        raise BaseError("is gated", where=where, hint="ask for access at its page, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise BaseError(
            "is not on the Hub, or private", where=where, hint="check the name; for a private one set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise BaseError(
            "the repository has no such revision", where=where, hint="name a branch, a tag or a commit"
        ) from None
    # the last is Xet's
    except (errors.RevisionResolutionError, hub.http().HTTPError, OSError, RuntimeError) as error:
        if refusal := downloads.refusal_of_disk(error, BaseError, f"HF_HOME={constants.HF_HOME}"):
            raise refusal from None
        told = hub.refusal(error)
        hint = told.hint or "`finetune fetch` a recipe where there is a network"
        raise BaseError(told.message, where=where, hint=hint) from None


@contextmanager
def nearest_named(text: str) -> Iterator[None]:
    """The Hub's error about a name that is likely a misspelled folder."""
    try:
        yield
    except BaseError as error:
        if near := nearest_folder(text):
            message = f"is no folder here, and as a Hub id: {error.message}"
            raise BaseError(message, where=text, hint=f"did you mean the folder `{near}`?") from None
        raise
