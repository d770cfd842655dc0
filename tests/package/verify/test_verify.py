"""What was tampered with in a package is found, and by the right name; a package as it was made has nothing wrong with it."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.package.attest import provenance
from finetune.package.verify.contents import files_of
from finetune.package.verify.verify import verify

Tamper = Callable[[Path], object]


def edited(name: str, **changes: object) -> Tamper:
    """JSON keys set, or removed where they are None."""

    def tamper(folder: Path) -> None:
        value = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: item for key, item in value.items() if item is not None}))

    return tamper


def added(name: str, content: bytes) -> Tamper:
    def tamper(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return tamper


def appended(name: str, text: str) -> Tamper:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


def replaced(name: str, old: str, new: str) -> Tamper:
    def tamper(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return tamper


def weights(change: Callable[[dict[str, torch.Tensor]], object], metadata: dict | None = None) -> Tamper:
    """Tensors changed, in a file that is written anew."""

    def tamper(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata or {"format": "pt"})

    return tamper


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def swapped(folder: Path) -> None:
    one, two, *_ = shards(folder)
    one.rename(folder / "between")
    two.rename(one)
    (folder / "between").rename(two)


def flipped(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def repeated_key(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].strip()
    name = next(name for name in json.loads(header) if name != "__metadata__")
    entry = json.dumps({name: json.loads(header)[name]})[1:-1]
    header = header[:-1] + b"," + entry.encode() + b"}"
    header += b" " * (-len(header) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = np.nan


def linked(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")


def unindexed(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    value = json.loads(path.read_text())
    value["weight_map"]["model.extra.weight"] = shards(folder)[0].name
    path.write_text(json.dumps(value))


TOKEN = "hf_" + "A" * 34
TAMPERED: dict[str, tuple[str, str, Tamper]] = {  # name: (package, check, what is done)
    "a flipped byte": ("merged", "provenance", flipped),
    "a missing shard": ("full", "index", lambda folder: shards(folder)[1].unlink()),
    "swapped shards": ("full", "index", swapped),
    "a tensor that no file has": ("full", "index", unindexed),
    "shards without an index": ("full", "index", lambda folder: (folder / "model.safetensors.index.json").unlink()),
    "a repeated key": ("merged", "header", repeated_key),
    "bytes after the tensors": (
        "merged",
        "header",
        lambda folder: (folder / "model.safetensors").open("ab").write(b"x"),
    ),
    "no weights": ("merged", "header", lambda folder: (folder / "model.safetensors").unlink()),
    "an edited template": ("full", "provenance", appended("chat_template.jinja", "{# be evil #}")),
    "a template that reaches out": ("full", "template", added("chat_template.jinja", b"{{ ''.__class__.__mro__ }}")),
    "a template without an end": (
        "full",
        "template",
        added("chat_template.jinja", b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    ),
    "a template that eats memory": ("full", "template", added("chat_template.jinja", b"{{ 'x' * 10**10 }}")),
    "a template that is torn": ("full", "template", added("chat_template.jinja", b"{% if messages %}")),
    "weights of another type": (
        "merged",
        "dtype",
        weights(lambda found: found.update({k: v.half() for k, v in found.items()})),
    ),
    "a type that is only said": ("merged", "dtype", edited("config.json", dtype="bfloat16")),
    "not a number": ("merged", "finite", weights(nan)),
    "a matrix of zeros": (
        "merged",
        "finite",
        weights(lambda found: found["model.layers.0.mlp.up_proj.weight"].zero_()),
    ),
    "an extra pickle": ("merged", "pickle", added("training_args.bin", b"\x80\x04\x95\x00\x00")),
    "a pickle by another name": ("merged", "pickle", added("merges.txt", b"\x80\x04\x95\x00\x00")),
    "an old pickle": ("merged", "pickle", added("vocab.txt", b"cos\nsystem\n(S'id'\ntR.")),
    "a zip archive": ("merged", "runs", added("LICENSE", b"PK\x03\x04\x00")),
    "a program": ("merged", "runs", added("NOTICE", b"\x7fELF\x02")),
    "a renamed script": ("merged", "runs", added("vocab.txt", b"#!/bin/sh\n")),
    "a file of code": ("merged", "remote_code", added("modeling_tiny.py", b"import os\n")),
    "a config that asks for code": ("merged", "remote_code", edited("config.json", auto_map={"AutoModel": "x.Y"})),
    "a config that asks for a kernel": (
        "merged",
        "remote_code",
        edited("config.json", _attn_implementation_internal="a/b"),
    ),
    "a file that is not of a package": ("merged", "allowed", added("notes.doc", b"hello")),
    "a link": ("merged", "symlink", linked),
    "a token in metadata": ("merged", "secret", weights(lambda found: None, {"format": "pt", "by": TOKEN})),
    "a token in the card": ("merged", "secret", appended("README.md", TOKEN)),
    "a private key": ("merged", "secret", appended("training/recipe.yaml", "# -----BEGIN PRIVATE KEY-----")),
    "a path of a machine": ("merged", "private", edited("tokenizer_config.json", name_or_path="/home/me/models/x")),
    "an untied weight": (
        "merged",
        "tied",
        weights(lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"] + 1})),
    ),
    "an output that is missing": ("merged", "tied", edited("config.json", tie_word_embeddings=False)),
    "a short vocabulary": (
        "merged",
        "vocabulary",
        weights(
            lambda found: found.update({"model.embed_tokens.weight": found["model.embed_tokens.weight"][:100].clone()})
        ),
    ),
    "an end that no token has": ("merged", "vocabulary", edited("generation_config.json", eos_token_id=10**6)),
    "generation that does not end": ("merged", "tokenizer", edited("generation_config.json", eos_token_id=5)),
    "a special token that is not there": ("merged", "tokenizer", edited("tokenizer_config.json", pad_token="<gone>")),
    "a local base": ("alone", "base", edited("adapter_config.json", base_model_name_or_path="/models/tiny")),
    "a base that can move": ("alone", "base", edited("adapter_config.json", revision="main")),
    "a config that is not JSON": ("merged", "config", added("config.json", b"{")),
    "a config with a key twice": ("merged", "config", replaced("config.json", "{", '{"vocab_size": 1, ')),
    "an altered figure": ("merged", "card", lambda folder: None),
    "a licence that is none": ("merged", "card", replaced("README.md", "---\n", "---\nlicense: free-for-all\n")),
    "a base that is no id": ("merged", "card", replaced("README.md", "---\n", "---\nbase_model: /home/x\n")),
    "a record that was rewritten": ("merged", "provenance", replaced("training/recipe.yaml", "r", "R")),
    "no provenance": ("merged", "provenance", lambda folder: (folder / provenance.FILE).unlink()),
    "a provenance of nothing": ("merged", "provenance", added(provenance.FILE, b"[]\n")),
}


@pytest.mark.slow
def test_packages_as_they_were_made_have_nothing_wrong(merged, full, alone) -> None:
    for one in (merged, full, alone):
        facts = verify(str(one.directory))
        assert facts["ok"] and facts["problems"] == []
        assert {"header", "provenance", "secret", "card", "tied"} <= set(facts["checks"])
        assert ("logits" in facts["checks"]) == (one is not alone)
    assert facts["not_made"]["logits"].startswith("the base cannot be had")


SLOW = ("a template without an end",)  # it has two seconds of a processor


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TAMPERED]
)
def test_what_was_tampered_with_is_named(name, request, tmp_path) -> None:
    package, check, tamper = TAMPERED[name]
    folder = tmp_path / "package"
    shutil.copytree(request.getfixturevalue(package).directory, folder)
    if name == "an altered figure":
        text = (folder / "README.md").read_text()
        line = next(line for line in text.splitlines() if line.startswith("| held-out loss"))
        (folder / "README.md").write_text(text.replace(line, line.replace("5.", "1.").replace("4.", "1.")))
    tamper(folder)
    facts = verify(str(folder))
    assert not facts["ok"] and check in [problem["check"] for problem in facts["problems"]], facts["problems"]
    assert all(problem["file"] or problem["tensor"] for problem in facts["problems"])


def test_a_secret_of_this_process_is_found_wherever_it_is(merged, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKER_API_KEY", "correct-horse-battery")
    folder = tmp_path / "package"
    shutil.copytree(merged.directory, folder)
    assert verify(str(folder))["ok"]
    appended("training/recipe.yaml", "# key: correct-horse-battery\n")(folder)
    (found,) = [problem for problem in verify(str(folder))["problems"] if problem["check"] == "secret"]
    assert found["message"] == "holds what TRACKER_API_KEY is set to"


def test_a_model_of_others_is_checked_as_far_as_it_goes(tiny_base) -> None:
    facts = verify(str(tiny_base))
    assert facts["ok"], facts["problems"]
    assert "allowed" not in facts["checks"] and "provenance" not in facts["checks"]


def test_weights_that_were_changed_with_all_records_of_them_are_found_by_what_they_compute(merged, tmp_path) -> None:
    folder = tmp_path / "package"
    shutil.copytree(merged.directory, folder)
    weights(lambda found: found["model.norm.weight"].mul_(1.5))(folder)
    said = json.loads((folder / provenance.FILE).read_text())
    for subject in said["subject"]:
        subject["digest"]["sha256"] = provenance.sha256(folder / subject["name"])
    (folder / provenance.FILE).write_text(provenance.to_line(said))
    found = verify(str(folder))["problems"]
    assert {problem["check"] for problem in found} == {"logits"} and "computes other logits" in found[0]["message"]


def test_other_hardware_may_compute_a_little_else(full, tmp_path) -> None:
    folder = tmp_path / "package"
    shutil.copytree(full.directory, folder)
    said = json.loads((folder / "training/probe.json").read_text())
    said["sha256"] = dict.fromkeys(said["sha256"], "of another machine")
    said["likeliest"]["batch"][0]["logits"][0] += 1e-3
    (folder / "training/probe.json").write_text(json.dumps(said))
    (folder / provenance.FILE).write_text(
        provenance.to_line(
            json.loads((folder / provenance.FILE).read_text())
            | {
                "subject": [
                    {"name": name, "digest": {"sha256": provenance.sha256(path)}}
                    for name, path in provenance._subjects(files_of(folder))
                ]
            }
        )
    )
    assert verify(str(folder))["ok"]
