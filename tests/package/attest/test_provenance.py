"""A statement names what a package was made from by digests, and nothing of the place where it was made."""

import json

from finetune.package.attest import provenance
from finetune.package.verify.contents import files_of
from finetune.store.run.directory import RunDirectory


def dependencies(statement: dict) -> dict[str, dict]:
    return {one["name"]: one for one in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}


def test_code_and_lock_of_the_training_are_named_by_their_digests(merged) -> None:
    recorded = RunDirectory(merged.run).plan()[1]["software"]
    found = dependencies(json.loads((merged.directory / provenance.FILE).read_text()))
    for name in ("code", "lock"):
        assert f"sha256:{found[name]['digest']['sha256']}" == recorded[name] and len(recorded[name]) == 71
    assert "image" not in found


def test_of_an_image_the_digest_is_told_and_not_the_registry(merged) -> None:
    software = {"image": "registry.example.internal:5000/team/finetune:1@sha256:" + "ab" * 32}
    versions = {"finetune": "0.1.0"}
    (image,) = provenance._software(software, versions)
    assert image == {"name": "image", "uri": "local:finetune:1", "digest": {"sha256": "ab" * 32}}
    assert provenance._software({"image": "finetune:latest"}, versions) == []


def test_the_base_is_read_back_where_it_is_on_the_hub(merged, alone) -> None:
    assert provenance.base_of(files_of(merged.directory)) is None
    assert provenance.base_of(files_of(alone.directory)) == "owner/tiny"
    assert provenance.base_of({}) is None
