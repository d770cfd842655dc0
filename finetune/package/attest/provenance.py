"""The origin of a package as SLSA provenance v1 (https://slsa.dev/spec/v1.0/provenance) in an in-toto Statement v1.

It names every file by its hash. It must hold no time and no host: the same run gives the same bytes.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ruamel.yaml import YAML

from finetune.data.heldout import lineage
from finetune.package.card import facts as card_facts
from finetune.package.card import record
from finetune.package.card.facts import Facts, hub_base
from finetune.package.verify.contents import CARD, Finding, sha256
from finetune.plan.plan import PinnedSource, Plan
from finetune.recipe.schema import Source
from finetune.store.checkpoints.manifest import MANIFEST
from finetune.store.run.directory import step_name

FILE = lineage.PROVENANCE
STATEMENT = "https://in-toto.io/Statement/v1"
UNDER = "lies on"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:finetune:package:v1"
# People edit the card, the signature comes later, and the Hub writes the last one.
NOT_SUBJECTS = (FILE, CARD, "model.sig", ".gitattributes")


class Resource(TypedDict):
    """What something was made of, as in-toto names it."""

    name: str
    uri: str
    digest: dict[str, str]
    annotations: NotRequired[dict[str, str]]


Statement = dict[str, Any]
"""An in-toto statement, whose keys its schema has."""


def statement(facts: Facts, files: Mapping[str, Path], software: Mapping[str, str]) -> Statement:
    """The whole statement. `files` are those of the package, by name; `software` is the run's own record of it."""
    plan, manifest, made = facts.plan, facts.manifest, [*facts.averaged, facts.manifest]
    recipe = YAML(typ="safe", pure=True).load(record.recipe(plan))
    average: dict[str, object] = {"average": [each.step for each in made]} if facts.averaged else {}
    if manifest.members:
        weights = [{"ref": each["ref"], "weight": each["weight"]} for each in manifest.members]
        average = {"average": {"method": manifest.method, "members": weights}}
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": sha256(path)}} for name, path in _subjects(files)],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"recipe": recipe, "step": manifest.step, "form": facts.form, **average},
                "internalParameters": {
                    "plan": plan.plan_id,
                    "world": manifest.world,
                    "versions": manifest.versions,
                    "stages": [
                        record.public(each.model_dump(mode="json", exclude_defaults=True)) for each in facts.stages
                    ],
                },
                "resolvedDependencies": [
                    _base(plan),
                    *map(_source, plan.recipe.data.train, plan.train),
                    *_software(software, manifest.versions),
                ],
            },
            "runDetails": {
                "builder": {"id": "urn:finetune"},
                "metadata": {"invocationId": manifest.run},
                "byproducts": [
                    *({"name": f"{step_name(each.step)}/{MANIFEST}", "digest": _digest(each.digest)} for each in made),
                    *({"name": each["ref"], "digest": _digest(each["digest"])} for each in manifest.members),
                ],
            },
        },
    }


def to_line(value: Statement) -> str:
    return json.dumps(value, sort_keys=True) + "\n"


def findings(directory: Path) -> Iterator[Finding]:
    """Files that differ from the statement or are missing in it. Empty if there is no statement."""
    try:
        said = _said((directory / FILE).read_bytes())
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield Finding("provenance", FILE, None, f"cannot be read: {error!r}")
        return
    there = dict(_subjects({path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*"))}))
    for name in sorted(said.keys() | there.keys()):
        if name not in there:
            yield Finding("provenance", name, None, "is missing")
        elif name not in said:
            yield Finding("provenance", name, None, "was not there when the package was made")
        elif sha256(there[name]) != said[name]:
            yield Finding("provenance", name, None, "is not the file that was packaged")


def subjects(content: bytes) -> dict[str, str] | None:
    """The files of a statement with their SHA-256; None if it is no statement."""
    try:
        return _said(content)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _said(content: bytes) -> dict[str, str]:
    value = json.loads(content.decode().partition("\n")[0])
    if value["_type"] != STATEMENT or value["predicateType"] != PREDICATE:
        raise ValueError("it is no SLSA provenance")
    return {item["name"]: item["digest"]["sha256"] for item in value["subject"]}


def step_of(directory: Path) -> int:
    """The step in the statement of a package. Raises KeyError, ValueError or OSError if there is none."""
    value = json.loads((directory / FILE).read_text(encoding="utf-8"))
    return value["predicate"]["buildDefinition"]["externalParameters"]["step"]


def base_of(files: Mapping[str, Path]) -> str | None:
    """The Hub checkpoint under a package, from its statement; None if it names none."""
    try:
        value = json.loads(files[FILE].read_text(encoding="utf-8"))
        (base,) = [
            one for one in value["predicate"]["buildDefinition"]["resolvedDependencies"] if one["name"] == "base"
        ]
        uri = base["uri"]
    except (ValueError, KeyError, TypeError, OSError):
        return None
    return uri.removeprefix("hf://").partition("@")[0] if uri.startswith("hf://") else None


def _subjects(files: Mapping[str, Path]) -> list[tuple[str, Path]]:
    return sorted((name, path) for name, path in files.items() if name not in NOT_SUBJECTS and path.is_file())


def lies_on(directory: Path) -> str | None:
    """The weights under a package, from its statement, where they are not those in its base's files."""
    try:
        value = json.loads((directory / FILE).read_text(encoding="utf-8"))
        made_of = value["predicate"]["buildDefinition"]["resolvedDependencies"]
        return next((str(one["annotations"][UNDER]) for one in made_of if "annotations" in one), None)
    except (ValueError, KeyError, TypeError, OSError):
        return None


def _base(plan: Plan) -> Resource:
    found = _named_base(plan)
    if under := card_facts.lies_on(plan):
        found["annotations"] = {UNDER: under}
    return found


def _named_base(plan: Plan) -> Resource:
    if plan.recipe.base.random_weights is not None:  # no weights are from there
        name, revision = plan.recipe.base.checkpoint, plan.base.revision
        uri = f"hf://{name.partition('@')[0]}@{revision}" if revision else f"local:{record.public_name(name)}"
        digest = {"gitCommit": revision} if revision else _digest(plan.base.digest)
        return {"name": "config", "uri": uri, "digest": digest}
    if (hub := hub_base(plan)) and hub[1]:
        return {"name": "base", "uri": f"hf://{hub[0]}@{hub[1]}", "digest": {"gitCommit": hub[1]}}
    name = record.public_name(plan.recipe.base.checkpoint)
    return {"name": "base", "uri": f"hf://{hub[0]}" if hub else f"local:{name}", "digest": _digest(plan.base.digest)}


def _source(source: Source, pinned: PinnedSource) -> Resource:
    if source.dataset:
        digest = {"gitCommit": pinned.revision or "", **_digest(pinned.fingerprint)}
        return {"name": "data", "uri": f"hf://datasets/{source.dataset}@{pinned.revision}", "digest": digest}
    return {"name": "data", "uri": f"local:{record.public_name(pinned.name)}", "digest": _digest(pinned.fingerprint)}


def _software(recorded: Mapping[str, str], versions: Mapping[str, str]) -> list[Resource]:
    """Code, lock and image of the training. Only the digest of an image: its registry is private. Older runs have no record."""
    uris = {"code": f"pkg:pypi/finetune@{versions.get('finetune', 'unknown')}", "lock": "local:installed-packages"}
    found: list[Resource] = [
        {"name": one, "uri": uris[one], "digest": _digest(recorded[one])} for one in uris if one in recorded
    ]
    name, _, digest = recorded.get("image", "").partition("@")
    if digest:
        found.append({"name": "image", "uri": f"local:{name.rpartition('/')[2]}", "digest": _digest(digest)})
    return found


def _digest(text: str | None) -> dict[str, str]:
    """`blake3:…` in in-toto's form, a map of algorithm to digest."""
    algorithm, _, value = (text or "").partition(":")
    return {algorithm: value} if value else {}
