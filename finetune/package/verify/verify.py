"""Verifies a model folder or a repository of the Hub: runs named checks, and skips those without a record.

It must load nothing before every check without loading has passed.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NotRequired

from finetune.errors import BaseError, PackageError
from finetune.package.attest import provenance, signing
from finetune.package.card import figures, metadata
from finetune.package.verify import contents
from finetune.package.verify.checks import CHECKS
from finetune.package.verify.contents import CARD, Finding
from finetune.package.verify.folder import Folder
from finetune.recipe.schema import tasks
from finetune.store.checkpoints.refs import parse
from finetune.store.run.directory import JOURNAL, RECIPE
from finetune.store.run.shown import Verification

HUB = "hub:"
OURS = f"training/{RECIPE}"
FIGURES = f"training/{JOURNAL}"
PROBE = "training/probe.json"
DANGEROUS = ("unsafe", "suspicious")  # other words mean a waiting or failed scan
OF_CONTENT = ("symlink", "runs", "pickle", "secret", "private")


class Report(Verification):
    """What `verify --json` prints of a package."""

    checks: list[str]
    """Names of those that were made."""
    not_made: dict[str, str]
    """Names of the others, and why."""
    revision: NotRequired[str]
    lies_on: NotRequired[str]
    """The weights under it, where they are not those in its base's files."""


def verify(target: str, key: Path | None = None) -> Report:
    """{ok, problems: [{check, file, tensor, message}], checks: [names of the checks made], not_made: {name: why}, revision}.

    If you give a public `key`, the signature has to match it.
    """
    if target.startswith(HUB):
        with tempfile.TemporaryDirectory() as folder:
            revision, problems, unscanned = _fetched(target.removeprefix(HUB), Path(folder))
            facts = _of_folder(Path(folder), key, ("hub", "scan"), problems)
            if unscanned:
                facts["not_made"]["scan"] = f"the Hub has not looked at {', '.join(unscanned[:3])} yet"
            return {**facts, "revision": revision}
    if not Path(target).is_dir():
        raise PackageError("is not a folder", where=target, hint="name a folder, or hub:OWNER/NAME@REVISION")
    return _of_folder(Path(target), key)


def _of_folder(directory: Path, key: Path | None, made: Sequence[str] = (), found: Sequence[Finding] = ()) -> Report:
    """The checks of a folder. If they find nothing and there is a probe, the model runs as well."""
    more, others = folder_findings(directory, key)
    checks, findings = [*made, *more], [*found, *others]
    not_made: dict[str, str] = {}
    if not findings and (directory / "config.json").is_file() and not (directory / "adapter_config.json").is_file():
        from finetune.package import classes  # with torch

        try:
            findings += classes.findings(directory)
            checks.append("class")
        except PackageError as error:
            not_made["class"] = error.message
    if (directory / PROBE).is_file() and not findings:
        from finetune.package import reference  # with torch

        try:
            findings += reference.findings(directory)
            checks += ["load", "logits"]
        except BaseError as error:
            not_made["logits"] = f"the base cannot be had: {error.message}"
    elif findings:
        not_made["logits"] = "what has problems is not loaded"
    problems = [finding.report for finding in findings]
    report: Report = {"ok": not problems, "problems": problems, "checks": checks, "not_made": not_made}
    if under := provenance.lies_on(directory):
        report["lies_on"] = under
    return report


def folder_findings(directory: Path, key: Path | None = None) -> tuple[list[str], list[Finding]]:
    """The names of the checks made, and their problems."""
    folder, is_ours = Folder(directory), (directory / OURS).is_file()
    found = [item for item in contents.findings(directory) if is_ours or item.check in OF_CONTENT]
    made = [*(["allowed"] if is_ours else []), *OF_CONTENT]
    for name, check in CHECKS.items():
        found += check(folder)
        made.append(name)
    if (directory / provenance.FILE).exists() or is_ours:
        made.append("provenance")
        found += provenance.findings(directory)
        if is_ours and not (directory / provenance.FILE).exists():
            found.append(Finding("provenance", provenance.FILE, None, "is missing"))
    if (directory / signing.FILE).exists() or key:
        made.append("signature")
        found += signing.findings(directory, key)
    if (directory / CARD).is_file():
        made.append("card")
        found += _of_card(directory, is_ours)
    return made, list(dict.fromkeys(found))


def _of_card(directory: Path, is_ours: bool) -> Iterator[Finding]:
    """The Hub's rules for front matter; for our packages also that the figures equal those of the record."""
    text = (directory / CARD).read_text(encoding="utf-8", errors="replace")
    yield from (Finding("card", CARD, None, problem) for problem in metadata.problems(text))
    if not is_ours:
        return
    if "library_name" not in (metadata.read(text) or {}):
        yield Finding("card", CARD, None, "does not name its library_name, which the Hub no longer guesses")
    try:
        records = [json.loads(line) for line in (directory / FIGURES).read_text().splitlines()]
        step = provenance.step_of(directory)
        ways = {figures.shown(records, step, section.figures) for section in tasks.SECTIONS.values()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        yield Finding("card", FIGURES, None, f"cannot be read: {error!r}")
        return
    if not any(said in text for said in ways):
        yield Finding("card", CARD, None, "does not say the figures of the training's record")


def _fetched(name: str, directory: Path) -> tuple[str, list[Finding], list[str]]:
    """Downloads a revision, past every cache, and compares each file with its hash on the Hub. Also reports the findings of the Hub's
    own scanners; they may not have seen all files yet."""
    from finetune.package.publish.repository import Repository
    from finetune.package.publish.trees import differences

    ref = parse(name)
    if ref.kind != "hub":
        raise PackageError("is not a repository of the Hub", where=HUB + name, hint="name hub:OWNER/NAME@REVISION")
    repository = Repository(ref.repo)
    revision = repository.download(ref.revision or "main", directory)
    files = contents.files_of(directory)
    wrong, scans = differences(repository.tree(revision), files), repository.scans(revision)
    found = [
        Finding("hub", file, None, "is not the file that the Hub names" if there else "was not downloaded")
        for file, there in sorted(wrong.items())
    ]
    found += [
        Finding("scan", file, None, f"is called {status} by the Hub's scanners")
        for file, status in sorted(scans.items())
        if status in DANGEROUS
    ]
    return revision, found, sorted(file for file, status in scans.items() if status not in (*DANGEROUS, "safe"))
