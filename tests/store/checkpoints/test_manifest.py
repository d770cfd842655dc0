"""A manifest is valid JSON, keeps its own digest, and tells damaged, foreign and future ones apart."""

import json
import math
from dataclasses import replace

import blake3
import pytest

from finetune.errors import CheckpointError
from finetune.store.checkpoints import manifest
from finetune.store.checkpoints.manifest import FileRecord, Manifest, ManifestError
from finetune.store.tensors import TensorRecord

EXAMPLE = Manifest(
    run="r1",
    attempt="a1",
    step=500,
    parent={"ref": "runs/a@400", "digest": "blake3:00"},
    plan_id="blake3:11",
    amendments=[{"skip": [3, 4]}],
    metrics={"loss": 0.1 + 0.2, "worst": math.inf, "none": math.nan},
    versions={"torch": "2.13.0"},
    world={"size": 1},
    files={
        "state.json": FileRecord(10, "blake3:22"),
        "model.safetensors": FileRecord(99, "blake3:33", (TensorRecord("w", "F32", (2, 3), "xxh3-128:44"),)),
    },
)


def signed(entries):
    """A manifest with any content and the right last line, as another version could have written it."""
    body = "{" + "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in entries.items())
    return f'{body}"digest": "blake3:{blake3.blake3(body.encode()).hexdigest()}"}}\n'.encode()


def reason(data):
    with pytest.raises(ManifestError) as caught:
        manifest.parse(data, "m")
    return caught.value.reason


def test_a_manifest_comes_back_as_it_was_written():
    parsed = manifest.parse(EXAMPLE.to_bytes(), "m")
    assert parsed == replace(EXAMPLE, metrics={"loss": 0.1 + 0.2, "worst": "inf", "none": "nan"})
    assert parsed.to_bytes() == EXAMPLE.to_bytes()


def test_the_file_is_strict_json_and_its_last_line_is_the_digest_of_the_bytes_before_it():
    data = EXAMPLE.to_bytes()
    entries = json.loads(data, parse_constant=pytest.fail)
    assert list(entries["files"]["state.json"]) == ["bytes", "digest"]
    *before, last = data.splitlines(keepends=True)
    digest = f"blake3:{blake3.blake3(b''.join(before)).hexdigest()}"
    assert last.decode() == f'"digest": "{digest}"}}\n'
    assert entries["digest"] == manifest.parse(data, "m").digest == digest


def test_every_torn_manifest_is_damaged():
    data = EXAMPLE.to_bytes()
    for end in range(len(data)):
        assert reason(data[:end]) == "damaged"
    assert reason(b"\0" * len(data)) == "damaged"


def test_every_flipped_bit_is_damage():
    data = EXAMPLE.to_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        assert reason(bytes(flipped)) in ("damaged", "foreign")


def test_flipped_values_are_damage_and_not_a_future_format():
    assert reason(EXAMPLE.to_bytes().replace(b'"schema": 1', b'"schema": 3')) == "damaged"


@pytest.mark.parametrize("data", [b"{}", b"[1]", b'{"schema": 9}\n', b'{"files": []}'])
def test_another_programs_json_is_foreign(data):
    assert reason(data) == "foreign"


@pytest.mark.parametrize(
    "change", [{"schema": "x"}, {"schema": 0}, {"files": {"a": {}}}, {"files": {"../a": {}}}, {"files": 1}]
)
def test_signed_nonsense_is_foreign(change):
    entries = json.loads(EXAMPLE.to_bytes())
    entries.pop("digest")
    assert reason(signed(entries | change)) == "foreign"


def test_a_newer_format_says_so_whatever_else_is_in_it():
    with pytest.raises(ManifestError) as caught:
        manifest.parse(signed({"schema": 2, "anything": []}), "runs/a/manifest.json")
    assert caught.value.reason == "future"
    assert str(caught.value) == (
        "runs/a/manifest.json: the checkpoint has format 2 and was written by a newer version of finetune; this one reads up to 1\n"
        "hint: update finetune"
    )


def test_unknown_keys_of_this_format_are_ignored():
    entries = json.loads(EXAMPLE.to_bytes())
    entries.pop("digest")
    assert manifest.parse(signed(entries | {"new_fact": 1}), "m").step == 500


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "/a", ".hidden", "manifest.json", "a\0", "a\n"])
def test_names_that_leave_the_directory_are_refused(name):
    with pytest.raises(CheckpointError, match="cannot be the name of a file"):
        manifest.check_name(name)
