"""Floor 1. A base on the Hub: its commit, its files, and what the Hub's refusals mean; `base` calls it."""

import contextlib
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from finetune import cache
from finetune.checkpoints import durable
from finetune.errors import BaseError

# `*` matches `/` too: leave out exports in folders, and Mistral's second copy of its weights.
OTHER_FILES = ("*/*", "consolidated*")


def commit_of(repo: str, revision: str | None) -> str:
    """The commit of a revision now; where the Hub cannot be reached, the one that was last seen from here."""
    import huggingface_hub

    with _errors(repo, revision):
        return huggingface_hub.HfApi().resolve_revision(repo, revision=revision).resolved


def download(repo: str, commit: str, patterns: tuple[str, ...]) -> Path:
    """The directory with the files of a commit that match; what is there already is not downloaded again.

    BaseError where one of them is not what the commit has, which the Hub's client does not look at. All are read once a boot, as long
    as nobody writes to them.
    """
    import huggingface_hub

    with _errors(repo, commit):
        path = huggingface_hub.snapshot_download(
            repo, revision=commit, allow_patterns=list(patterns), ignore_patterns=list(OTHER_FILES)
        )
    files = {file for pattern in patterns for file in Path(path).glob(pattern) if file.is_symlink() and file.exists()}
    blobs = sorted((file.readlink().name, str(file.resolve())) for file in files)
    facts = [[*blob, *_state(Path(blob[1]))] for blob in blobs]
    cache.found("downloads", [facts, cache.boot_id()], lambda: _refuse_damaged(blobs, f"{repo}@{commit}"))
    return Path(path)


def _state(blob: Path) -> list[int]:
    status = blob.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _refuse_damaged(blobs: list[tuple[str, str]], where: str) -> None:
    """The Hub's cache calls a large file by its SHA-256, another one by git's SHA-1, and may keep it elsewhere under another hash
    (https://huggingface.co/docs/hub/local-cache). Without symbolic links nothing tells what a file should be."""
    with ThreadPoolExecutor() as threads:
        damaged = [
            place for (_, place), is_sound in zip(blobs, threads.map(_is_sound, blobs), strict=True) if not is_sound
        ]
    if damaged:
        message = "a file is not what the Hub has: it was damaged on its way, or on this disk"
        raise BaseError(message, where=where, hint=f"remove {damaged[0]}, so that it is downloaded again")


def _is_sound(blob: tuple[str, str]) -> bool:
    """Whether the file has the hash that is its name, told by the number of digits; another name is none."""
    name, place = blob
    header = b"blob %d\0" % Path(place).stat().st_size
    starts = {64: hashlib.sha256(), 40: hashlib.sha1(header, usedforsecurity=False)}
    if len(name) not in starts:
        return True
    with open(place, "rb", buffering=0) as stream:
        return hashlib.file_digest(stream, lambda: starts[len(name)]).hexdigest() == name


def has_files(repo: str, commit: str, patterns: tuple[str, ...]) -> bool:
    """Whether a commit has files that match; offline, where nobody knows, True: loading finds out."""
    import huggingface_hub
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError

    with contextlib.suppress(DryRunError, LocalEntryNotFoundError):
        return bool(
            huggingface_hub.snapshot_download(
                repo, revision=commit, allow_patterns=list(patterns), ignore_patterns=list(OTHER_FILES), dry_run=True
            )
        )
    return True


@contextmanager
def _errors(repo: str, revision: str | None) -> Iterator[None]:
    from httpx2 import HTTPError
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
    except (errors.RevisionResolutionError, HTTPError, OSError, RuntimeError) as error:  # the last is Xet's
        if of_disk := durable.of_disk(error, BaseError, f"HF_HOME={constants.HF_HOME}"):
            raise of_disk from None
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise BaseError(
            f"the Hub cannot be reached: {reason}",
            where=where,
            hint="`finetune fetch` a recipe where there is a network",
        ) from None
