"""Publishes a package to the Hub: staged, compared file by file, promoted, tagged.

At every moment the target has the old tree or the new one. The same command continues after an interruption, and must not upload or
commit anything twice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import CheckpointError, PackageError, PublishError, counted
from finetune.package.attest import provenance
from finetune.package.publish import ownership, rights, to_folder
from finetune.package.publish.repository import Repository
from finetune.package.publish.shown import Published
from finetune.package.publish.trees import Files, Stored, differences, digest, sha256_of, size_of
from finetune.package.verify.contents import files_of
from finetune.package.verify.verify import folder_findings
from finetune.store.checkpoints.refs import parse
from finetune.store.run.directory import RunDirectory

if TYPE_CHECKING:
    from finetune.package.export import Report

STAGING = "staging-"


@dataclass(frozen=True)
class Choices:
    """Options of a publish."""

    branch: str = "main"
    tag: str | None = None
    is_private: bool = True
    """A new repository is private; an existing public one is refused."""
    is_dry_run: bool = False
    is_replacing: bool = False
    """Whether people's changes may be overwritten; their additions stay."""


def publish(directory: Path, target: str, choices: Choices) -> Published:
    """Publishes a package, or says what that would change.

    Raises PublishError if the target is out of reach, refuses, or differs in the end; PackageError if the package must not go out.
    """
    files = _sound(directory)
    if target.startswith(to_folder.PREFIX):
        return to_folder.publish(
            files, Path(target.removeprefix(to_folder.PREFIX)), choices.is_dry_run, choices.is_replacing
        )
    return _to_hub(files, target, choices)


def _sound(directory: Path) -> dict[str, Path]:
    """The files of a package by name. Raises PackageError if there is none, or it has a problem."""
    if not directory.is_dir():
        raise PackageError("is not a folder", where=str(directory), hint="name a folder that `finetune package` made")
    _, wrong = folder_findings(directory)
    if wrong:
        check, file, tensor, message = wrong[0]
        more = f" (and {len(wrong) - 1} more: `finetune verify {directory}`)" if len(wrong) > 1 else ""
        told = f"{check}: {': '.join(filter(None, (file, tensor, message)))}{more}"
        raise PackageError(told, where=str(directory), hint="package it again; nothing was published")
    return files_of(directory)


def prepared(
    source: str, target: str | None, is_public: bool, report: "Report | None" = None
) -> tuple[Path, str, bool]:
    """The package, its target, and whether that is private. A checkpoint is packaged first, in its run; a second call reuses that
    package. `report` is that of `export.package`."""
    directory = Path(source)
    if directory.is_dir() and not RunDirectory(directory).is_run and not (directory / "manifest.json").exists():
        if target is None:
            raise PublishError("says not where to", where=source, hint="use --to OWNER/NAME or --to folder:PATH")
        return directory, target, not is_public
    if _kind_of(source) not in ("run", "checkpoint"):
        hint = "name a folder that `finetune package` made, or RUN@STEP, RUN@last or RUN@best"
        raise PublishError("is neither a folder nor a checkpoint of a run", where=source, hint=hint)
    from finetune.package import export  # heavy imports

    run, step = export.checkpoint_of(source)
    asked = RunDirectory(run).plan()[0].recipe.publish
    if target is None and asked is None:
        hint = "use --to OWNER/NAME or --to folder:PATH, or set publish.repo in the recipe"
        raise PublishError("says not where to", where=source, hint=hint)
    named, is_private = (asked.repo, asked.private) if asked else (None, True)
    directory = RunDirectory(run).package(step)
    if not directory.exists():
        export.package(f"{run}@{step}", directory, report=report)
    return directory, target or named or "", is_private and not is_public


def _kind_of(source: str) -> str | None:
    try:
        return parse(source).kind
    except CheckpointError:  # its message names Hub ids, like the target
        return None


def _to_hub(package: dict[str, Path], name: str, choices: Choices) -> Published:
    repository = Repository(name, choices.is_private)
    user = repository.whoami()
    rights.refuse_no_right(user, name)
    there = rights.refuse_visible(repository, choices.is_private, provenance.base_of(package))
    branches = repository.branches() if there else {}
    head = branches.get(choices.branch)
    tree = repository.tree(head) if head else {}
    found = _sorted_out(repository, head, tree, package)
    if not choices.is_replacing:
        ownership.refuse_edited(found, name)
    files = found.files
    changes = differences(tree, files, found.gone)
    facts: Published = {
        "target": name,
        "user": user["name"],
        "is_new": there is None,
        "private": there["private"] if there else choices.is_private,
        "branch": choices.branch,
        "tag": choices.tag,
        "files": [{"name": one, "bytes": size_of(content)} for one, content in files.items()],
        "changes": {
            one: "removed" if change is None else "new" if one not in tree else "changed"
            for one, change in changes.items()
        },
        "overwritten": list(found.edited),
        "uploaded_bytes": sum(size_of(change) for change in changes.values() if change),
        "revision": head,
        "commits": 2 if changes else 0,
        "is_dry_run": choices.is_dry_run,
    }
    if choices.is_dry_run:
        return facts
    if there is None:
        repository.create(choices.is_private)
        head = None
    if head is None:
        head = _begun(repository, choices.branch)
    staging, revision = STAGING + digest(files)[:12], head
    if changes:
        revision = _promoted(repository, found, head, staging, choices)
    if changes or staging in branches:  # left by a call killed after its last commit
        repository.remove_branch(staging)
    if choices.tag:
        repository.add_tag(choices.tag, revision)
    return {**facts, "revision": revision, "commits": repository.commits}


def _sorted_out(repository: Repository, head: str | None, tree: Mapping[str, Stored], files: Files) -> ownership.Sorted:
    return ownership.sort_out(
        tree.keys(),
        files,
        is_same=lambda name, content: tree[name].is_same(content),
        read=lambda name: repository.read(head or "", name),  # a tree has a head
        sha256_of=lambda name: tree[name].sha256 or sha256_of(repository.read(head or "", name)),
    )


def _promoted(repository: Repository, found: ownership.Sorted, head: str, staging: str, choices: Choices) -> str:
    """Staged, compared, and committed to the target branch; the new head."""
    title = f"Publish {choices.tag or digest(found.files)[:12]}"
    _stage(repository, staging, found, head, f"Stage: {title}")
    revision = repository.commit(choices.branch, found.files, head, title, found.gone)
    _refuse_other(repository, revision, found, choices.branch)
    return revision


def _begun(repository: Repository, branch: str) -> str:
    """The head of a branch, made at the first commit if it is missing."""
    if branch not in repository.branches():
        repository.add_branch(branch, repository.first_commit())
    return repository.branches()[branch]


def _stage(repository: Repository, staging: str, found: ownership.Sorted, head: str, title: str) -> None:
    """Uploads to a branch beside the target, and compares it with the package, file by file."""
    repository.add_branch(staging, head)
    staged = repository.commit(staging, found.files, repository.branches()[staging], title, found.gone)
    _refuse_other(repository, staged, found, staging)


def _refuse_other(repository: Repository, revision: str, found: ownership.Sorted, branch: str) -> None:
    if wrong := sorted(differences(repository.tree(revision), found.files, found.gone)):
        message = f"{branch} does not have what was uploaded: {', '.join(wrong[:3])}"
        raise PublishError(message, where=repository.name, hint="publish again; if it stays so, report it")


def listing(facts: Published) -> str:
    """The same as lines of text."""
    kind = f", {'private' if facts['private'] else 'public'}" if "private" in facts else ""
    lines = [f"{facts['target']}{kind}"]
    lost = facts["overwritten"]
    lines += [
        f"  {what}: {name}" + (" (people's changes are overwritten)" if name in lost else "")
        for name, what in facts.get("changes", dict.fromkeys(lost, "changed")).items()
    ]
    size = sum(file["bytes"] for file in facts["files"])
    lines.append(
        f"{counted(len(facts['files']), 'file')}, {counted(size, 'byte')}; {facts['uploaded_bytes']:,} to upload"
    )
    if facts["is_dry_run"]:
        return "\n".join([*lines, f"would make {counted(facts['commits'], 'commit')}"])
    return "\n".join([*lines, f"published {facts['revision']} in {counted(facts['commits'], 'commit')}"])
