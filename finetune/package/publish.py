"""Floor 7. A package goes to the Hub: staged, compared file by file with what it should be, promoted, tagged; `cli` calls it.

At every moment the target has the old tree or the new one. Whatever was interrupted is taken up by the same command: what is uploaded is
not uploaded again, what is committed is not committed again.
"""

from dataclasses import dataclass
from pathlib import Path

from finetune import plan as plans
from finetune.checkpoints.refs import parse
from finetune.errors import CheckpointError, PackageError, PublishError
from finetune.package import provenance, to_folder
from finetune.package.card import with_notes_of
from finetune.package.contents import files_of
from finetune.package.repository import Files, Repository, differences, digest, size_of
from finetune.package.verify import folder_findings
from finetune.recipe.schema import Recipe

CARD = "README.md"
STAGING = "staging-"


@dataclass(frozen=True)
class Choices:
    """How a package is published."""

    branch: str = "main"
    tag: str | None = None
    is_private: bool = True
    """Of a repository that is made; one that is there stays as it is."""
    is_dry_run: bool = False


def publish(directory: Path, target: str, choices: Choices) -> dict:
    """{target, revision, uploaded_bytes, commits, files, …}, as `publish --json` prints it.

    PublishError where the target is out of reach, refuses, or has something else in the end; PackageError for what must not go out.
    """
    files = _sound(directory)
    if target.startswith(to_folder.PREFIX):
        return to_folder.publish(files, Path(target.removeprefix(to_folder.PREFIX)), choices.is_dry_run)
    return _to_hub(files, target, choices)


def preflight(recipe: Recipe) -> None:
    """Whether the token may write to the repository that a recipe names, and the base may be published there; before a training, so that
    it is not found out after it. Nothing where this machine works offline."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return
    asked, base = recipe.publish, parse(recipe.base.checkpoint)
    repository = Repository(asked.repo)
    user = repository.whoami()
    owner, role = asked.repo.partition("/")[0], user.get("auth", {}).get("accessToken", {}).get("role")
    names = [user["name"], *(one["name"] for one in user.get("orgs", []))]
    if owner not in names or role == "read":
        why = f"the token of {user['name']} only reads" if role == "read" else f"{user['name']} is not of {owner}"
        hint = "use a token that may write there, or leave out `publish` and publish by hand"
        raise PublishError(f"cannot be published to: {why}", where=asked.repo, hint=hint)
    if not asked.private:
        _refuse_gated(base.repo if base.kind == "hub" else None, asked.repo, repository.facts())


def _refuse_gated(base: str | None, name: str, there: dict | None) -> None:
    """What its authors give to those alone whom they know does not become public by a fine-tune."""
    is_open = there is None or not (there["private"] or there["gated"])
    if base and is_open and (Repository(base).facts() or {}).get("gated"):
        hint = "publish it privately, or make the repository yourself and gate it as the base is"
        raise PublishError(f"would be open to everybody, and its base {base} is gated", where=name, hint=hint)


def _sound(directory: Path) -> dict[str, Path]:
    """The files of a package by name. PackageError where there is none, or something is wrong with it."""
    if not directory.is_dir():
        raise PackageError("is not a folder", where=str(directory), hint="name a folder that `finetune package` made")
    _, wrong = folder_findings(directory)
    if wrong:
        check, file, tensor, message = wrong[0]
        more = f" (and {len(wrong) - 1} more: `finetune verify {directory}`)" if len(wrong) > 1 else ""
        told = f"{check}: {': '.join(filter(None, (file, tensor, message)))}{more}"
        raise PackageError(told, where=str(directory), hint="package it again; nothing was published")
    return files_of(directory)


def prepared(source: str, target: str | None, is_public: bool) -> tuple[Path, str, bool]:
    """The package, where it goes, and whether that is private. A checkpoint is packaged first, in its run; the package stays there, and a
    second call takes it."""
    directory = Path(source)
    if directory.is_dir() and not (directory / "plan.json").exists() and not (directory / "manifest.json").exists():
        if target is None:
            raise PublishError("says not where to", where=source, hint="use --to OWNER/NAME or --to folder:PATH")
        return directory, target, not is_public
    if _kind_of(source) not in ("run", "checkpoint"):
        hint = "name a folder that `finetune package` made, or RUN@STEP, RUN@last or RUN@best"
        raise PublishError("is neither a folder nor a checkpoint of a run", where=source, hint=hint)
    from finetune.package import export  # the heavy half

    run, step = export.checkpoint_of(source)
    asked = plans.load(run)[0].recipe.publish
    if target is None and asked is None:
        hint = "use --to OWNER/NAME or --to folder:PATH, or set publish.repo in the recipe"
        raise PublishError("says not where to", where=source, hint=hint)
    directory = run / "packages" / f"step-{step:08d}"
    if not directory.exists():
        export.package(f"{run}@{step}", directory)
    return directory, target or asked.repo, not is_public if asked is None else asked.private and not is_public


def _kind_of(source: str) -> str | None:
    try:
        return parse(source).kind
    except CheckpointError:  # it speaks of Hub ids, which are what is published to
        return None


def _to_hub(files: dict[str, Path], name: str, choices: Choices) -> dict:
    repository = Repository(name)
    user = repository.whoami()["name"]
    there = repository.facts()
    if not choices.is_private or (there and not there["private"]):
        _refuse_gated(provenance.base_of(files), name, there)
    branches = repository.branches() if there else {}
    head = branches.get(choices.branch)
    tree = repository.tree(head) if head else {}
    if CARD in tree and CARD in files:
        files = files | {CARD: with_notes_of(repository.read(head, CARD), files[CARD])}
    changes = differences(tree, files)
    facts = {
        "target": name,
        "user": user,
        "is_new": there is None,
        "private": there["private"] if there else choices.is_private,
        "branch": choices.branch,
        "tag": choices.tag,
        "files": [{"name": one, "bytes": size_of(content)} for one, content in files.items()],
        "changes": {
            one: "removed" if change is None else "new" if one not in tree else "changed"
            for one, change in changes.items()
        },
        "uploaded_bytes": sum(size_of(change) for change in changes.values() if change),
    }
    if choices.is_dry_run:
        return facts | {"revision": head, "commits": 2 if changes else 0, "is_dry_run": True}
    if there is None:
        repository.create(choices.is_private)
        head = None
    if head is None:
        head = _begun(repository, choices.branch)
    title = f"Publish {choices.tag or digest(files)[:12]}"
    staging = STAGING + digest(files)[:12]
    revision = head
    if changes:
        _stage(repository, staging, files, head, f"Stage: {title}")
        revision = repository.commit(choices.branch, files, head, title)
        _refuse_other(repository, revision, files, choices.branch)
    if changes or staging in branches:  # left by a call that was killed after its last commit
        repository.remove_branch(staging)
    if choices.tag:
        repository.add_tag(choices.tag, revision)
    return facts | {"revision": revision, "commits": repository.commits, "is_dry_run": False}


def _begun(repository: Repository, branch: str) -> str:
    """The head of a branch that may have to be made, at the first commit."""
    if branch not in repository.branches():
        repository.add_branch(branch, repository.first_commit())
    return repository.branches()[branch]


def _stage(repository: Repository, staging: str, files: Files, head: str, title: str) -> None:
    """Uploads to a branch beside the target, and compares that with the package, file by file."""
    repository.add_branch(staging, head)
    staged = repository.commit(staging, files, repository.branches()[staging], title)
    _refuse_other(repository, staged, files, staging)


def _refuse_other(repository: Repository, revision: str, files: Files, branch: str) -> None:
    if wrong := sorted(differences(repository.tree(revision), files)):
        message = f"{branch} does not have what was uploaded: {', '.join(wrong[:3])}"
        raise PublishError(message, where=repository.name, hint="publish again; if it stays so, report it")


def listing(facts: dict) -> str:
    """The same for a reader."""
    kind = "" if facts["target"].startswith(to_folder.PREFIX) else f", {'private' if facts['private'] else 'public'}"
    lines = [f"{facts['target']}{kind}"]
    lines += [f"  {what}: {name}" for name, what in facts.get("changes", {}).items()]
    size = sum(file["bytes"] for file in facts["files"])
    lines.append(f"{len(facts['files'])} files, {size:,} bytes; {facts['uploaded_bytes']:,} to upload")
    if facts["is_dry_run"]:
        return "\n".join([*lines, f"would make {facts['commits']} commits"])
    return "\n".join([*lines, f"published {facts['revision']} in {facts['commits']} commits"])
