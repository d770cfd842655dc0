"""What a file is, and its hash: read once, and again as soon as it was written to."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.package.verify.contents import of_content, sha256


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_safetensors_header_whose_length_begins_like_a_pickle_is_none(tmp_path: Path, length) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt", "filling": ""})
    missing = length - int.from_bytes(path.read_bytes()[:8], "little")
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt", "filling": "x" * missing})
    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    assert list(of_content(path.name, path, {})) == []
    path.write_bytes(b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00}.")
    assert [item.check for item in of_content(path.name, path, {})] == ["pickle"]


def test_a_file_that_was_written_again_is_hashed_again(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = sha256(path)
    opened = []
    monkeypatch.setattr(Path, "open", lambda *arguments: opened.append(arguments))
    assert sha256(path) == first and not opened
    monkeypatch.undo()
    with path.open("r+b") as file:
        file.write(b"two")
    assert sha256(path) != first
